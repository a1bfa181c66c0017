"""The bytes of the host slots of one rank.

Memory comes in segments, each allocated when the first of its slots is used: a pool of 100 GB costs
nothing at start, and page-locking, which takes about a second per 4 GB, is spread out. Only who needs the
new segment waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of one matrix: ``matrix[rows]``, without copying them together."""

    matrix: Tensor  # uint8 [rows of the segment, block_bytes]
    rows: Sequence[int]
    pinned: bool = False
    """Page-locked: a kernel on the device may use it, and a copy runs beside others."""


class _Segment(NamedTuple):
    matrix: Tensor  # uint8 [rows of the segment, block_bytes]
    pinned: bool


class HostMemory:
    """Slots of ``block_bytes``; a slot's bytes belong to whoever the scheduler's table gave it to.

    Thread-safe.

    Args:
        pin: page-lock the segments for DMA; where that fails they stay pageable, with one warning.
        slots_per_segment: by default as many as fit ``SEGMENT_BYTES``.
    """

    def __init__(
        self, num_slots: int, block_bytes: int, pin: bool, device: torch.device, slots_per_segment: int | None = None
    ) -> None:
        self.num_slots, self.block_bytes = num_slots, block_bytes
        self._slots_per_segment = slots_per_segment or max(1, SEGMENT_BYTES // block_bytes)
        self._segments: dict[int, Future[_Segment]] = {}
        self._pin, self._device = pin and device.type == "cuda", device
        self._lock = threading.Lock()

    def groups(self, slots: Sequence[int]) -> list[RowGroup]:
        """The slots' rows in order, cut where the segment changes.

        Raises:
            OSError, MemoryError: no memory for a new segment.
        """
        groups: list[RowGroup] = []
        begin = 0
        while begin < len(slots):
            number = slots[begin] // self._slots_per_segment
            end = begin + 1
            while end < len(slots) and slots[end] // self._slots_per_segment == number:
                end += 1
            first = number * self._slots_per_segment
            segment = self._segment(number)
            groups.append(RowGroup(segment.matrix, [slot - first for slot in slots[begin:end]], segment.pinned))
            begin = end
        return groups

    def close(self) -> None:
        """Unlocks the pages. No copy may be running."""
        with self._lock:
            segments = [future.result() for future in self._segments.values()]
            self._segments.clear()
        for segment in segments:
            if segment.pinned:
                torch.cuda.cudart().cudaHostUnregister(segment.matrix.data_ptr())

    def _segment(self, number: int) -> _Segment:
        """Who asks first makes it, without the lock; who needs it meanwhile waits, and shares what goes wrong."""
        with self._lock:
            future = self._segments.get(number)
            mine = future is None
            if future is None:
                future = self._segments[number] = Future()
        if mine:
            try:
                future.set_result(self._make(number))
            except BaseException as error:
                with self._lock:
                    del self._segments[number]
                future.set_exception(error)
        return future.result()

    def _make(self, number: int) -> _Segment:
        first = number * self._slots_per_segment
        assert 0 <= first < self.num_slots, "no such slot"
        matrix = self._allocate(min(self._slots_per_segment, self.num_slots - first))
        return _Segment(matrix, self._pin and self._page_lock(matrix))

    def _allocate(self, num_rows: int) -> Tensor:
        pages = mmap.mmap(-1, num_rows * self.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer faults at first use
        return torch.frombuffer(pages, dtype=torch.uint8).view(num_rows, self.block_bytes)

    def _page_lock(self, segment: Tensor) -> bool:
        flags = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped: kernels read and write it too
        # The guard keeps an I/O thread from opening a context on GPU 0.
        with torch.cuda.device(self._device):
            error = torch.cuda.cudart().cudaHostRegister(segment.data_ptr(), segment.numel(), flags)
        if int(error) == 0:
            return True
        with self._lock:
            first, self._pin = self._pin, False
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)  # takes the error, which this thread's next kernel would raise
        if first:
            logger.warning(
                "cudaHostRegister failed (error %d) at segment %d of the host pool; the rest stays pageable and is "
                "copied more slowly. Raise the limit of locked memory (ulimit -l) or lower kv.host_bytes.",
                int(error),
                len(self._segments),
            )
        return False


def tensors(groups: Sequence[RowGroup]) -> list[Tensor]:
    """The rows one by one, each uint8 ``[block_bytes]``."""
    return [group.matrix[row] for group in groups for row in group.rows]


def arrays(groups: Sequence[RowGroup]) -> list[np.ndarray]:
    """As ``tensors``, and ten times as fast."""
    return [matrix[row] for matrix, rows in ((group.matrix.numpy(), group.rows) for group in groups) for row in rows]
