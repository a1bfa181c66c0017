"""One user's embeddings in memory, and their similarity to a query's.

Vectors of one user have a large part in common (what this person talks about at all, and the usual skew
of embeddings), which says nothing about any one of them. So the mean over the user's memories is taken
off both sides before the cosine: a form of common component removal (Arora, Liang and Ma, "A simple but
tough-to-beat baseline for sentence embeddings", ICLR 2017, section 3) that needs no decomposition when
a memory comes or goes. A similarity above 0 then means: nearer to the query than this user's average.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
_FIRST_ROWS = 16


class Vectors:
    """Rows are slots of the index; a slot without a vector scores 0."""

    def __init__(self, num_dims: int):
        self.num_dims = num_dims
        self._rows = np.zeros((_FIRST_ROWS, num_dims), np.float32)
        self._has = np.zeros(_FIRST_ROWS, bool)
        self._sum = np.zeros(num_dims, np.float64)
        self._count = 0
        self._inverse_norms: Vector | None = None

    def __len__(self) -> int:
        return self._count

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

    def remove(self, slot: int) -> None:
        if slot < len(self._has) and self._has[slot]:
            self._sum -= self._rows[slot]
            self._rows[slot] = 0
            self._has[slot] = False
            self._count -= 1
            self._inverse_norms = None

    def has(self, slot: int) -> bool:
        return slot < len(self._has) and bool(self._has[slot])

    def score(self, query: Vector, num_slots: int) -> Vector:
        """Cosine with the query, both less the mean. [num slots]"""
        scores = np.zeros(num_slots, np.float32)
        norm = float(np.linalg.norm(query))
        if not self._count or not norm > 0:
            return scores
        mean = (self._sum / self._count).astype(np.float32) if self._count > 1 else np.zeros_like(query)
        wanted = query / norm - mean
        wanted /= max(float(np.linalg.norm(wanted)), 1e-9)
        size = min(num_slots, len(self._rows))
        rows = self._rows[:size]
        products = rows @ wanted - float(mean @ wanted)
        scores[:size] = np.where(self._has[:size], products * self._centred(mean)[:size], 0)
        return scores

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
        return renewed

    def _centred(self, mean: Vector) -> Vector:
        """One over the length of each row less the mean. [capacity]"""
        if self._inverse_norms is None:
            squares = 1 - 2 * (self._rows @ mean) + float(mean @ mean)
            self._inverse_norms = 1 / np.sqrt(np.maximum(squares, 1e-9))
        return self._inverse_norms
