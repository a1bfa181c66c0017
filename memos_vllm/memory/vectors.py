"""One user's embeddings in memory, and their similarity to a query's.

Vectors of one user have a large part in common (what this person talks about at all, and the usual skew
of embeddings), which says nothing about any one of them. So the mean over the user's memories is taken
off both sides before the cosine: a form of common component removal (Arora, Liang and Ma, "A simple but
tough-to-beat baseline for sentence embeddings", ICLR 2017, section 3) that needs no decomposition when
a memory comes or goes. A similarity above 0 then means: nearer to the query than this user's average.

Up to ``EXACT_UP_TO`` vectors each is compared. Beyond, ``cells`` names candidates, which are compared
exactly, as are those that the caller names; all others count as average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memos_vllm.memory.cells import Cells
from memos_vllm.memory.postings import Slots

Vector = npt.NDArray[np.float32]

EXACT_UP_TO = 30_000
"""``python -m benchmarks.vectors`` measures where cells begin to pay; docs/RECALL.md has the table."""

NUM_CANDIDATES = 1000
_SAMPLE = 1000
_FIRST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Similarities:
    scores: Vector
    """[num slots]"""

    sample: npt.NDArray[np.bool_]
    """Slots whose scores are exact and were not chosen by them: what the others are like. [num slots]"""


class Vectors:
    """Rows are slots of the index; a slot without a vector scores 0."""

    def __init__(self, num_dims: int):
        self.num_dims = num_dims
        self._rows = np.zeros((_FIRST_ROWS, num_dims), np.float32)
        self._has = np.zeros(_FIRST_ROWS, bool)
        self._sum = np.zeros(num_dims, np.float64)
        self._count = 0
        self._inverse_norms: Vector | None = None
        self._cells: Cells | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def are_few(self) -> bool:
        """So few that every one is compared."""
        return self._count <= EXACT_UP_TO

    def put(self, slot: int, vector: Vector) -> None:
        """Takes a vector of any length; a zero vector says nothing and is kept as that."""
        self.remove(slot)
        while slot >= len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._has = np.concatenate([self._has, np.zeros_like(self._has)])
        norm = float(np.linalg.norm(vector))
        if not norm > 0 or not np.isfinite(norm):
            return
        self._rows[slot] = vector / norm
        self._has[slot] = True
        self._sum += self._rows[slot]
        self._count += 1
        self._inverse_norms = None
        if self._cells is not None:
            self._cells.add(slot, self._rows[slot])

    def remove(self, slot: int) -> None:
        if slot < len(self._has) and self._has[slot]:
            self._sum -= self._rows[slot]
            self._rows[slot] = 0
            self._has[slot] = False
            self._count -= 1
            self._inverse_norms = None
            if self._cells is not None:
                self._cells.remove(slot)

    def has(self, slot: int) -> bool:
        return slot < len(self._has) and bool(self._has[slot])

    def score(
        self, query: Vector, num_slots: int, also: Slots | None = None, reach: Callable[[Slots], Slots] | None = None
    ) -> Similarities:
        """Cosine with the query, both less the mean.

        Args:
            also: slots to compare in any case.
            reach: gives the slots without whose scores those of some slots are not complete.
        """
        scores = np.zeros(num_slots, np.float32)
        sample = np.zeros(num_slots, bool)
        norm = float(np.linalg.norm(query))
        if not self._count or not norm > 0:
            return Similarities(scores, sample)
        mean = (self._sum / self._count).astype(np.float32) if self._count > 1 else np.zeros_like(query)
        wanted = query / norm - mean
        wanted /= max(float(np.linalg.norm(wanted)), 1e-9)
        size = min(num_slots, len(self._rows))
        if self.are_few:
            products = _products(self._rows[:size], wanted) - float(mean @ wanted)
            scores[:size] = np.where(self._has[:size], products * self._centred(mean)[:size], 0)
            sample[:size] = self._has[:size]
            return Similarities(scores, sample)
        drawn = np.linspace(1, size - 1, _SAMPLE).astype(np.int64)  # evenly: no draw differs from another
        chosen = [drawn, self._current_cells().search(wanted, NUM_CANDIDATES), *([] if also is None else [also])]
        compared = np.unique(np.concatenate(chosen))
        if reach is not None:
            compared = reach(compared)
        compared = compared[compared < size]
        compared = compared[self._has[compared]]
        products = _products(self._rows[compared], wanted) - float(mean @ wanted)
        scores[compared] = products * self._centred(mean)[compared]
        sample[drawn] = self._has[drawn]
        return Similarities(scores, sample)

    def renumbered(self, new_slots: npt.NDArray[np.int64], num_slots: int) -> Vectors:
        renewed = Vectors(self.num_dims)
        renewed._rows = np.zeros((max(_FIRST_ROWS, 2 * num_slots), self.num_dims), np.float32)
        renewed._has = np.zeros(len(renewed._rows), bool)
        size = min(len(new_slots), len(self._rows))
        kept = (new_slots[:size] > 0) & self._has[:size]
        renewed._rows[new_slots[:size][kept]] = self._rows[:size][kept]
        renewed._has[new_slots[:size][kept]] = True
        renewed._sum = renewed._rows.sum(axis=0, dtype=np.float64)
        renewed._count = int(kept.sum())
        if self._cells is not None:
            self._cells.renumber(new_slots)
            renewed._cells = self._cells
        return renewed

    def _current_cells(self) -> Cells:
        if self._cells is None or self._cells.is_outgrown:
            slots = np.flatnonzero(self._has)
            self._cells = Cells(self._rows[slots], slots)
        return self._cells

    def _centred(self, mean: Vector) -> Vector:
        """One over the length of each row less the mean. [capacity]"""
        if self._inverse_norms is None:
            squares = 1 - 2 * _products(self._rows, mean) + float(mean @ mean)
            self._inverse_norms = 1 / np.sqrt(np.maximum(squares, 1e-9))
        return self._inverse_norms


def _products(rows: npt.NDArray[np.float32], vector: Vector) -> Vector:
    """Not ``@``: BLAS wakes its threads for this, and where cores are busy waits for them up to 100 times as
    long as one thread takes (22 against 1.6 ms in the 99th percentile of 10,000 rows on two busy cores)."""
    products: Vector = np.einsum("ij,j->i", rows, vector)
    return products
