"""The way between paged blocks and host rows; its two implementations and nothing else know the device.

One thread (the copy thread of the transfer worker) calls a link. A call copies one piece and returns
when the bytes have arrived, so whoever sees it return may publish, free or reuse both sides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.store.host_memory import RowGroup


class Link(ABC):
    block_bytes: int
    device: torch.device

    @abstractmethod
    def save(self, block_ids: Sequence[int], groups: Sequence[RowGroup], after: torch.cuda.Event | None) -> None:
        """Blocks to rows, in order. Starts after the event: what writes the blocks is finished then."""

    @abstractmethod
    def load(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: torch.cuda.Event | None) -> None:
        """Rows to blocks, in order. Starts after the event: nothing uses the blocks' old content then."""


class CpuLink(Link):
    """Blocks in CPU memory: one pass, row by row where rows lie apart."""

    def __init__(self, planes: Sequence[Tensor]) -> None:
        self._copier = BlockCopier(planes)
        self.block_bytes, self.device = self._copier.block_bytes, self._copier.device

    def save(self, block_ids: Sequence[int], groups: Sequence[RowGroup], after: torch.cuda.Event | None) -> None:
        begin = 0
        for group in groups:
            end = begin + len(group.rows)
            self._copier.gather(block_ids[begin:end], group.matrix, group.rows)
            begin = end

    def load(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: torch.cuda.Event | None) -> None:
        begin = 0
        for group in groups:
            end = begin + len(group.rows)
            self._copier.scatter(group.matrix, block_ids[begin:end], group.rows)
            begin = end


class CudaLink(Link):
    """Blocks on a GPU: DMA between rows and a staging buffer, scatter or gather behind it.

    Both run on one stream of the lowest priority, so the stream itself orders the reuse of the staging
    buffer, and the forward pass goes first. The event at the end is waited for on the host.

    Args:
        piece_blocks: rows of the staging buffer, the most that one call may copy.
    """

    def __init__(self, planes: Sequence[Tensor], piece_blocks: int) -> None:
        self._copier = BlockCopier(planes)
        self.block_bytes, self.device = self._copier.block_bytes, self._copier.device
        self._piece_blocks = piece_blocks
        self._stream = torch.cuda.Stream(self.device, priority=0)  # torch's range is -5 (first) to 0 (last)
        self._staging: Tensor | None = None  # uint8 [piece_blocks, block_bytes], at the first use
        self._done = torch.cuda.Event(blocking=True)

    def save(self, block_ids: Sequence[int], groups: Sequence[RowGroup], after: torch.cuda.Event | None) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            staged = self._begin(len(block_ids), after)
            self._copier.gather(block_ids, staged)
            for host, device in _spans(groups, staged):
                host.copy_(device, non_blocking=True)
            self._finish()

    def load(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: torch.cuda.Event | None) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            staged = self._begin(len(block_ids), after)
            for host, device in _spans(groups, staged):
                device.copy_(host, non_blocking=True)
            self._copier.scatter(staged, block_ids)
            self._finish()

    def _begin(self, num_blocks: int, after: torch.cuda.Event | None) -> Tensor:
        assert num_blocks <= self._piece_blocks
        if after is not None:
            self._stream.wait_event(after)
        if self._staging is None:
            self._staging = torch.empty(self._piece_blocks, self.block_bytes, dtype=torch.uint8, device=self.device)
        return self._staging[:num_blocks]

    def _finish(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()


def _spans(groups: Sequence[RowGroup], staged: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Runs of adjacent host rows beside their rows of ``staged``: one DMA each."""
    spans = []
    done = 0
    for group in groups:
        begin, rows = 0, group.rows
        while begin < len(rows):
            end = begin + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            count = end - begin
            spans.append((group.matrix[rows[begin] : rows[begin] + count], staged[done : done + count]))
            begin, done = end, done + count
    return spans


def link_for(planes: Sequence[Tensor], piece_blocks: int) -> Link:
    return CudaLink(planes, piece_blocks) if planes[0].device.type == "cuda" else CpuLink(planes)
