"""Normal forms of any text, in linear time."""

from __future__ import annotations

import unicodedata
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory import analysis, claims
from memos_vllm.memory.normal_forms import MAX_MARKS, normalised

MARKS = "a" + "\u0301\u0316" * 500


def longest_run(text: str) -> int:
    runs = groupby(text, lambda char: unicodedata.combining(char) > 0)
    return max((len(list(run)) for are_marks, run in runs if are_marks), default=0)


@given(st.text())
def test_ordinary_text_is_as_unicode_has_it(text: str) -> None:
    if longest_run(text) <= MAX_MARKS:
        for form in ("NFC", "NFD", "NFKC"):
            assert normalised(form, text) == unicodedata.normalize(form, text)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC"])
def test_no_run_that_is_sorted_is_long(form: str) -> None:
    assert longest_run(normalised(form, MARKS)) <= MAX_MARKS  # type: ignore[arg-type]


def test_keys_and_terms_are_made_of_short_runs() -> None:
    assert longest_run(claims.fold(MARKS)) <= MAX_MARKS
    assert max(map(longest_run, analysis.terms(MARKS))) <= MAX_MARKS
