"""Scores of several retrievers on one scale, and the best of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory.fusion import best_first, fuse, standardised

ALL = np.ones(4, bool)
BOTH = {"a": ALL, "b": ALL}


def scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_standardised_has_mean_zero_and_deviation_one() -> None:
    found = standardised(scores(1, 2, 3, 10), ALL)
    assert (found.mean(), found.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))


def test_no_difference_says_nothing() -> None:
    assert standardised(scores(5, 5, 5, 5), ALL).tolist() == [0, 0, 0, 0]
    assert standardised(scores(0, 0, 0, 0), ~ALL).tolist() == [0, 0, 0, 0]


def test_what_is_not_among_them_does_not_count() -> None:
    among = np.array([False, True, True, True])
    assert standardised(scores(1e6, 1, 2, 3), among)[1:].tolist() == pytest.approx([-1.2247, 0, 1.2247], abs=1e-3)


def test_the_scale_of_a_retriever_does_not_matter() -> None:
    a, b = scores(0, 0, 3, 1), scores(0.2, 0.1, 0.3, 0.9)
    assert fuse({"a": a, "b": b}, BOTH) == pytest.approx(fuse({"a": 1000 * a, "b": b - 7}, BOTH), abs=1e-4)


def test_one_retriever_keeps_its_scores() -> None:
    assert fuse({"a": scores(0, 0, 3, 1)}, BOTH).tolist() == [0, 0, 3, 1]


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=30), st.integers(1, 30), st.data())
def test_best_first_is_a_sort(values: list[float], limit: int, data: st.DataObject) -> None:
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    expected = sorted(
        (place for place in range(len(values)) if allowed[place]), key=lambda place: (-values[place], -place)
    )
    assert best_first(scores(*values), allowed, limit).tolist() == expected[:limit]
