"""BM25 over memories and what was said around them, held to a plain computation of the same formula."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory.lexical import K1, B, Lexical
from memos_vllm.memory.postings import Postings

WORDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8)


def plain_scores(chains: list[list[list[str]]], query: list[str]) -> list[float]:
    """Chains of texts of words; weights 1, 1/2, 1/4 by distance."""
    windows = []
    for chain in chains:
        for place in range(len(chain)):
            window: dict[str, float] = Counter()
            for other, words in enumerate(chain):
                if abs(other - place) <= 2:
                    for word in words:
                        window[word] += 0.5 ** abs(other - place)
            windows.append(window)
    mean = sum(sum(window.values()) for window in windows) / len(windows)
    scores = []
    for window in windows:
        score = 0.0
        for term in query:
            holders = sum(term in other for other in windows)
            idf = math.log(1 + (len(windows) - holders + 0.5) / (holders + 0.5))
            norm = K1 * (1 - B + B * sum(window.values()) / mean)
            score += idf * (K1 + 1) * window.get(term, 0) / (window.get(term, 0) + norm)
        scores.append(score)
    return scores


def indexed(chains: list[list[list[str]]]) -> Lexical:
    lexical = Lexical()
    for chain in chains:
        before = 0
        for words in chain:
            slot = lexical.add(Counter(words), len(words))
            if before:
                lexical.neighbours.link(before, slot)
            before = slot
    return lexical


def scores(lexical: Lexical, query: list[str]) -> np.ndarray:
    return lexical.total(lexical.match(query))[lexical.alive]


@given(st.lists(st.lists(WORDS, min_size=1, max_size=6), min_size=1, max_size=6), st.sets(st.sampled_from("abcdefg")))
def test_scores_are_bm25_of_windows(chains: list[list[list[str]]], query: set[str]) -> None:
    found = scores(indexed(chains), sorted(query))
    assert found == pytest.approx(plain_scores(chains, sorted(query)), abs=1e-4)


def test_a_rare_term_scores_as_a_common_one_does() -> None:
    chains = [[["x"], ["y"]]] + [[["z"]]] * 200  # few holders: the other way of adding up
    assert scores(indexed(chains), ["x", "z"]) == pytest.approx(plain_scores(chains, ["x", "z"]), abs=1e-4)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=5), min_size=1, max_size=5), st.data())
def test_what_was_removed_is_as_if_it_had_never_been(chains: list[list[list[str]]], data: st.DataObject) -> None:
    lexical = indexed(chains)
    places = [(i, j) for i, chain in enumerate(chains) for j in range(len(chain))]
    gone = data.draw(st.sets(st.sampled_from(range(len(places)))))
    for place in gone:
        lexical.remove(place + 1)
    kept = [
        [words for j, words in enumerate(chain) if places.index((i, j)) not in gone] for i, chain in enumerate(chains)
    ]
    kept = [chain for chain in kept if chain]
    expected = plain_scores(kept, ["a", "b"]) if kept else []
    assert scores(lexical, ["a", "b"]) == pytest.approx(expected, abs=1e-4)
    new_slots = np.zeros(lexical.num_slots, np.int64)
    new_slots[np.flatnonzero(lexical.alive)] = np.arange(1, lexical.num_alive + 1)
    renewed = lexical.renumbered(new_slots, lexical.num_alive + 1)
    assert scores(renewed, ["a", "b"]) == pytest.approx(expected, abs=1e-4)
    assert not gone or len(renewed.postings) <= len(lexical.postings)


def test_renumbered_postings_have_nothing_of_a_removed_slot() -> None:
    postings = Postings()
    postings.add(1, {"only": 1, "both": 2})
    postings.add(2, {"both": 3})
    renewed = postings.renumbered(np.array([0, 0, 1]))
    assert len(renewed) == 1
    assert [part.tolist() for part in renewed.of("both")] == [[1], [3]]


def test_a_frequency_has_a_limit_and_does_not_run_into_the_slot() -> None:
    postings = Postings()
    postings.add(7, {"a": 100_000})
    assert [part.tolist() for part in postings.of("a")] == [[7], [255]]


def test_parts_of_a_score_add_up() -> None:
    lexical = indexed([[["a", "b"], ["c"]], [["a"]]])
    matched = lexical.match(["a", "c", "x"])
    total = lexical.total(matched)
    for slot in range(1, lexical.num_slots):
        assert sum(found.of(slot) for found in matched) == pytest.approx(float(total[slot]), abs=1e-5)
