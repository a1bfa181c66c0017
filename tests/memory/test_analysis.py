"""Text into terms: word boundaries, languages, scripts without spaces."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory import languages
from memos_vllm.memory.analysis import query_terms, terms, without_stop_words

ANY_TEXT = st.text() | st.text("the der la 東京 乌龙茶 ラーメン tea's é한국 ไทย 2.5", max_size=60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Drinking drinks", ["drink", "drink"]),
        ("The ＤＲＩＮＫ of Alice's cat", ["drink", "alic", "cat"]),
        ("Straße naïve naive café", ["strass", "naiv", "naiv", "cafe"]),
        ("version 3.14 of snake_case, don't", ["version", "3.14", "snake_cas"]),
        ("мои книги", ["мо", "книг"]),
        ("किताबें", ["किताब"]),
        ("한국어", ["한국", "국어"]),
        ("... !?", []),
    ],
)
def test_terms(text: str, expected: list[str]) -> None:
    assert list(terms(text)) == expected


def test_chinese_has_words_pairs_and_characters() -> None:
    assert query_terms("我最喜欢的饮料是乌龙茶")[:5] == ["最", "喜欢", "饮料", "乌龙", "乌龙茶"]
    assert set("乌龙茶") | {"乌龙", "龙茶", "乌龙茶"} == set(terms("乌龙茶"))


def test_japanese_has_words_in_their_normal_form() -> None:
    found = query_terms("昨日東京都の大学で友達とラーメンを食べました。")
    assert {"東京", "大学", "友達", "ラーメン", "食べる"} <= set(found)
    assert not {"の", "で", "と", "を", "た"} & set(found)


@pytest.mark.parametrize("query", ["東京", "大学", "ラーメン"])
def test_a_short_query_meets_a_japanese_text(query: str) -> None:
    assert set(query_terms(query)) & set(terms("昨日東京都の大学で友達とラーメンを食べました。"))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("I went to the market with my cat", "english"),
        ("Ich mag meine Katzen und Hunde nicht", "german"),
        ("je suis dans le jardin avec mon chat", "french"),
        ("mi gata no es de la vecina", "spanish"),
        ("ik ben met mijn kat naar de markt", "dutch"),
        ("die", "english"),
        ("Los Angeles", "english"),
        ("", "english"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert languages.of(text.lower().split()) == language


def test_a_query_of_one_word_meets_a_text_whose_language_was_seen() -> None:
    text = set(terms("Ich habe zwei Katzen und einen Hund"))
    for query in ("Katze", "Katzen", "Hunde"):
        assert set(query_terms(query)) & text


@given(ANY_TEXT)
def test_a_text_has_the_terms_that_ask_for_it(text: str) -> None:
    assert set(query_terms(text)) <= set(terms(text))


@given(ANY_TEXT)
def test_no_word_can_be_taken_for_a_time_or_a_label(text: str) -> None:
    assert not [term for term in terms(text) if term.startswith(("@", "\0"))]


def test_without_stop_words_keeps_words_as_they_are() -> None:
    assert without_stop_words("The Cats of Alice, and 乌龙茶!") == "Cats Alice 乌龙茶"


@pytest.mark.parametrize(
    ("package", "text", "message"),
    [
        ("rjieba", "我喜欢喝绿茶", "Chinese text needs rjieba"),
        ("sudachipy", "お茶が好きです", "Japanese text needs sudachipy"),
    ],
)
def test_a_package_that_is_missing_is_named_by_the_first_text_that_needs_it(package, text, message):
    """In a process of its own, where nothing has imported it: other languages do without."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from memos_vllm.errors import MissingPackage\n"
        "from memos_vllm.memory import segmentation\n"
        "assert list(segmentation.words('차를', False))\n"
        f"try: list(segmentation.words({text!r}, segmentation.is_japanese({text!r})))\n"
        "except MissingPackage as error: print(error.status, error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.startswith(f"501 {message}"), found.stderr
