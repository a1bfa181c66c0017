"""BM25 over one user's memories, each read together with what was said around it.

A turn of a conversation often answers in words that the turn before it used: "Where did you go?" "To
Lisbon." So a memory has the terms of the memories beside it in its conversation too, at half their
frequency, those two away at a quarter, and no further: each step halves. The frequencies of this *window*
then take the place of the memory's own in BM25, its length included. That is BM25 over weighted fields
(Robertson, Zaragoza and Taylor, "Simple BM25 extension to multiple weighted fields", CIKM 2004): weights
apply to frequencies, before they saturate. Half is no fitted number, see docs/RECALL.md for how flat the
choice is. Nothing of a window is stored: the neighbours are looked up when a query comes.

Scores follow Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), with
the constants usual there (and Lucene's) and an inverse document frequency that stays positive (Lucene's: a
term that stands in every memory still counts a little).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memos_vllm.memory.neighbours import Neighbours
from memos_vllm.memory.postings import Postings, Slots
from memos_vllm.memory.times import TIME_MARK

K1 = 1.2
B = 0.75

Scores = npt.NDArray[np.float32]

_SPARSE_SHARE = 8
"""A term in fewer slots than one of this many is scored there only; two passes over all slots cost less
above. Measured on 10,000 slots, where the two meet between 4 and 16."""


@dataclass(frozen=True, slots=True)
class TermScores:
    """One term's part of the scores."""

    term: str
    slots: Slots | None
    """Sorted; None where ``parts`` has all slots."""

    parts: Scores

    def of(self, slot: int) -> float:
        if self.slots is None:
            return float(self.parts[slot])
        place = int(np.searchsorted(self.slots, slot))
        return float(self.parts[place]) if place < len(self.slots) and self.slots[place] == slot else 0.0


class Lexical:
    """Slots 1 and up; slot 0 stands for none. A slot that is taken out keeps its postings until ``renumbered``."""

    def __init__(self) -> None:
        self.postings = Postings()
        self.neighbours = Neighbours()
        self._alive = np.zeros(16, bool)
        self._lengths = np.zeros(16, np.float32)
        self._norms: Scores | None = None
        self.num_alive = 0
        self.num_slots = 1

    def add(self, counts: Mapping[str, int], length: int) -> int:
        """Terms with their frequencies into the next slot; ``length`` counts those that are words."""
        slot = self.num_slots
        self.num_slots += 1
        if slot >= len(self._alive):
            self._alive = np.concatenate([self._alive, np.zeros_like(self._alive)])
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
        self.postings.add(slot, counts)
        self._alive[slot] = True
        self._lengths[slot] = length
        self.neighbours.grow(slot)
        self.num_alive += 1
        self._norms = None
        return slot

    def remove(self, slot: int) -> None:
        self._alive[slot] = False
        self._lengths[slot] = 0
        self.neighbours.unlink(slot)
        self.num_alive -= 1
        self._norms = None

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """[num slots]"""
        return self._alive[: self.num_slots]

    def holders(self, label: str) -> Slots:
        """Living slots that have the term itself."""
        slots = self.postings.slots(label)
        return slots[self._alive[slots]]

    def match(self, terms: Iterable[str]) -> list[TermScores]:
        """What each term adds to whom; terms that nobody has are left out."""
        return [found for term in terms if (found := self._term_scores(term)) is not None]

    def total(self, matched: Iterable[TermScores]) -> Scores:
        """The sum over the terms, 0 where none is near. [num slots]"""
        scores = np.zeros(self.num_slots, np.float32)
        for found in matched:
            if found.slots is None:
                scores += found.parts
            else:
                scores[found.slots] += found.parts
        return scores

    def renumbered(self, new_slots: npt.NDArray[np.int64], num_slots: int) -> Lexical:
        """Without the slots that are out: ``new_slots`` says where each goes, 0 for nowhere."""
        renewed = Lexical()
        kept = new_slots > 0
        renewed._alive = np.zeros(max(16, 2 * num_slots), bool)
        renewed._lengths = np.zeros(max(16, 2 * num_slots), np.float32)
        renewed._alive[new_slots[kept]] = True
        renewed._lengths[new_slots[kept]] = self._lengths[: len(new_slots)][kept]
        renewed.postings = self.postings.renumbered(new_slots)
        renewed.neighbours = self.neighbours.renumbered(new_slots, num_slots)
        renewed.num_alive = self.num_alive
        renewed.num_slots = num_slots
        return renewed

    def _term_scores(self, term: str) -> TermScores | None:
        slots, frequencies = self.postings.of(term)
        living = self._alive[slots]
        slots, weights = slots[living], frequencies[living].astype(np.float64)
        if not len(slots):
            return None
        if not term.startswith(TIME_MARK):
            slots, weights = self.neighbours.spread_sparse(slots, weights)
        norms = self._window_norms()
        if len(slots) * _SPARSE_SHARE < self.num_slots:
            slots, places = np.unique(slots, return_inverse=True)
            frequency = np.bincount(places, weights).astype(np.float32)
            return TermScores(term, slots, self._weight(len(slots)) * frequency / (frequency + norms[slots]))
        frequency = np.bincount(slots, weights, self.num_slots).astype(np.float32)
        weight = self._weight(int(np.count_nonzero(frequency)))
        return TermScores(term, None, weight * frequency / (frequency + norms))

    def _weight(self, num_holders: int) -> float:
        return (K1 + 1) * math.log(1 + (self.num_alive - num_holders + 0.5) / (num_holders + 0.5))

    def _window_norms(self) -> Scores:
        """BM25's part of the denominator that the window's length gives. [num slots]"""
        if self._norms is None:
            lengths = self.neighbours.spread(self._lengths[: self.num_slots])
            mean = float(lengths.sum()) / max(1, self.num_alive) or 1.0
            self._norms = (K1 * (1 - B + B * lengths / mean)).astype(np.float32)
            self._norms[0] = 1.0
        return self._norms
