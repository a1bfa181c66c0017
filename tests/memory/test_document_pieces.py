"""Cutting: nothing is lost, nothing is too long, and a change stays where it was made."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory.documents import keeping, pieces
from memos_vllm.memory.documents.blocks import Block
from memos_vllm.memory.documents.formats import MARKDOWN
from tests.memory.document_factories import markdown, paragraph, read

MAX_WORDS = 40


def blocks_of(*texts: str, path: tuple[str, ...] = (), page: int | None = None) -> list[Block]:
    return [Block(text, path, 10 * place, page) for place, text in enumerate(texts)]


def cut(blocks: Sequence[Block]) -> list[str]:
    return [piece.text for piece in pieces.cut(blocks, MAX_WORDS)]


words = st.text(alphabet='abc茶.! \n"(—', max_size=400)
paths = st.lists(st.sampled_from(["A", "B " * 30, "C"]), max_size=3).map(tuple)


@given(st.lists(st.builds(Block, words, paths, st.just(0), st.sampled_from([None, 1, 2])), max_size=12))
def test_no_word_is_lost_and_no_piece_too_long(blocks: list[Block]) -> None:
    found = pieces.cut(blocks, MAX_WORDS)
    assert all(pieces.count_words(piece.text) <= MAX_WORDS for piece in found)
    bodies = [piece.text.removeprefix(pieces._heading(piece.path, MAX_WORDS)) for piece in found]
    assert "".join("".join(bodies).split()) == "".join("".join(block.text for block in blocks).split())


def test_short_ones_stand_together_long_ones_alone() -> None:
    long = paragraph("ferry")
    assert cut(blocks_of("To pack:", "- usb", "- wall", long, "- one")) == ["To pack:\n- usb\n- wall", long, "one"]


def test_headings_and_pages_are_boundaries() -> None:
    blocks = [Block("a", ("T",), 0), Block("b", ("T",), 2), Block("c", ("T", "U"), 4), Block("d", ("T", "U"), 6, 2)]
    assert cut(blocks) == ["T\na\nb", "T > U\nc", "T > U\nd"]


def test_a_long_paragraph_is_cut_between_sentences() -> None:
    sentences = [f"Sentence {number} has exactly seven words." for number in "abcdefgh"]
    found = pieces.cut(blocks_of(" ".join(sentences)), MAX_WORDS)
    assert [piece.text for piece in found] == [" ".join(sentences[:6]), " ".join(sentences[6:])]
    assert found[1].offset == " ".join(sentences).index("Sentence g")


@pytest.mark.parametrize("text", ["x" * 100_000, "茶" * 10_000, "(" * 50_000, "“" * 50_000], ids=lambda text: text[:1])
def test_what_has_no_words_is_cut_all_the_same(text: str) -> None:
    assert "".join(cut(blocks_of(text))) == text


@pytest.mark.timeout(30)
@pytest.mark.parametrize("part", ['("a. ', 'e.g. "'], ids=range(2))
def test_a_long_line_takes_no_more_than_its_length(part: str) -> None:
    """Less than a second; its square would take more than a minute."""
    text = part * 60_000
    assert "".join("".join(cut(blocks_of(text))).split()) == "".join(text.split())


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True), st.data())
def test_a_change_moves_no_boundary_elsewhere(subjects: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(subjects)))
    added = data.draw(st.sampled_from([["new"], []]))
    changed = [*subjects[:place], *added, *subjects[place + (not added) :]]
    before = cut(read(markdown(*subjects), MARKDOWN))
    after = cut(read(markdown(*changed), MARKDOWN)) if changed else []
    assert len(set(before) ^ set(after)) <= 1


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("abc", "abc", [0, 1, 2]),
        ("abc", "axc", [0, 1, 2]),
        ("abc", "ac", [0, 2]),
        ("abc", "axbc", [0, None, 1, 2]),
        ("abc", "cab", [2, 0, 1]),
        ("aba", "aab", [0, 2, 1]),
        ("ab", "xyb", [0, None, 1]),
        ("", "ab", [None, None]),
        ("abc", "xyz", [0, 1, 2]),
    ],
)
def test_which_piece_is_which(old: str, new: str, expected: list[int | None]) -> None:
    assert keeping.match(old, new) == expected
