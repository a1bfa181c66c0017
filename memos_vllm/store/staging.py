"""Host buffers for Reads that go past the host slots. Their number is the back-pressure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch

from memos_vllm.store.host_memory import HostMemory, RowGroup


class StagedRows:
    """Rows on loan. ``free`` gives them back, once."""

    def __init__(self, groups: list[RowGroup], give_back: Callable[[], None]) -> None:
        self.groups, self.free = groups, give_back

    def first(self, num_rows: int) -> list[RowGroup]:
        (group,) = self.groups  # a buffer is one segment
        return [RowGroup(group.matrix, group.rows[:num_rows], group.pinned)]


class Staging:
    """``num_buffers`` matrices uint8 ``[piece_blocks, block_bytes]``, allocated when first used. Thread-safe."""

    def __init__(self, num_buffers: int, piece_blocks: int, block_bytes: int, pin: bool, device: torch.device) -> None:
        self._memory = HostMemory(num_buffers * piece_blocks, block_bytes, pin, device, slots_per_segment=piece_blocks)
        self._buffers = range(0, num_buffers * piece_blocks, piece_blocks)  # each named by its first row
        self._free = list(self._buffers)
        self._changed = threading.Condition()
        self._closed = False

    def take(self, num_rows: int) -> StagedRows:
        """Rows of one buffer; waits for one.

        Raises:
            OSError: no memory, or ``close`` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                raise OSError("the staging buffers are closed")
            buffer = self._free.pop()
        try:
            return StagedRows(self._memory.groups(range(buffer, buffer + num_rows)), partial(self._give_back, buffer))
        except BaseException:
            self._give_back(buffer)
            raise

    def close(self) -> None:
        """Makes everyone who waits for a buffer fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def unpin(self) -> None:
        """Unlocks the pages. No copy may be running."""
        self._memory.close()

    def check_idle(self) -> None:
        """Asserts that every buffer came back."""
        with self._changed:
            assert sorted(self._free) == list(self._buffers)

    def _give_back(self, buffer: int) -> None:
        with self._changed:
            assert buffer not in self._free
            self._free.append(buffer)
            self._changed.notify()
