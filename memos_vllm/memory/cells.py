"""Candidates by vector for a user with very many memories: an inverted file (FAISS, IVF with 8-bit codes).

Vectors are put into about sqrt(n) cells around centroids, and a query looks into the nearest few. The
codes are for choosing candidates only; ``vectors`` computes their scores from the vectors themselves.
A graph (HNSW) answers faster still, but takes minutes to build for what this builds in seconds, and it
is built again whenever a user comes back.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memos_vllm.memory.postings import Slots

Rows = npt.NDArray[np.float32]

PROBED_CELLS = 32
"""Of at least 173 (sqrt of ``vectors.EXACT_UP_TO``): what ``benchmarks.vectors`` found to lose little."""

_TRAINED_PER_CELL = 40  # FAISS warns below 39
_ITERATIONS = 10
_OUTGROWN = 4
"""A file with so many times the vectors that it was made for is made anew."""


class Cells:
    """
    Args:
        rows: at least a few thousand. [n, num dims]
        slots: whose they are. [n]
    """

    def __init__(self, rows: Rows, slots: Slots):
        import faiss

        num_cells = int(len(rows) ** 0.5)
        quantizer = faiss.IndexFlatIP(rows.shape[1])
        self._file = faiss.IndexIVFScalarQuantizer(
            quantizer, rows.shape[1], num_cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        self._file.cp.niter = _ITERATIONS
        sample = np.linspace(0, len(rows) - 1, min(len(rows), _TRAINED_PER_CELL * num_cells)).astype(np.int64)
        self._file.train(rows[sample])
        self._file.nprobe = PROBED_CELLS
        self._made_for = len(rows)
        self._slots = np.empty(0, np.int64)  # by the ids that the file has
        self._num_ids = 0
        self._id_of: dict[int, int] = {}
        self._add(rows, slots)

    @property
    def is_outgrown(self) -> bool:
        return self._file.ntotal > _OUTGROWN * self._made_for

    def add(self, slot: int, row: Rows) -> None:
        self._add(row[None], np.array([slot]))

    def remove(self, slot: int) -> None:
        known = self._id_of.pop(slot, None)
        if known is not None:
            self._file.remove_ids(np.array([known], np.int64))

    def search(self, query: Rows, limit: int) -> Slots:
        """About the nearest, in no order."""
        _, (found,) = self._file.search(query[None], limit)
        return self._slots[found[found >= 0]]

    def renumber(self, new_slots: npt.NDArray[np.int64]) -> None:
        """The slots have other numbers; those that are out were removed before."""
        self._slots = new_slots[self._slots[: self._num_ids]]
        self._id_of = {int(new_slots[slot]): known for slot, known in self._id_of.items()}

    def _add(self, rows: Rows, slots: Slots) -> None:
        ids = np.arange(self._num_ids, self._num_ids + len(rows))
        if ids[-1] >= len(self._slots):
            self._slots = np.concatenate(
                [self._slots[: self._num_ids], np.zeros(2 * len(ids) + len(self._slots), np.int64)]
            )
        self._slots[ids] = slots
        self._num_ids += len(ids)
        self._id_of.update(zip(slots.tolist(), ids.tolist(), strict=True))
        self._file.add_with_ids(np.ascontiguousarray(rows), ids)
