"""The way between paged blocks and host rows: in CPU memory one pass, on a device through its streams.

A call copies one piece, and says through ``landed`` when its bytes have arrived; whoever is told may
publish, free or reuse both sides, and nobody before.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.store.copy_planner import CopyPlan, Direction
from memos_vllm.store.cuda_device import CudaDevice
from memos_vllm.store.fragments import fragment_views
from memos_vllm.store.host_memory import RowGroup
from memos_vllm.store.kv_file import Row, items_per_piece
from memos_vllm.store.pipeline import Device, Landed, LoadPipeline, Method, SavePipeline

logger = logging.getLogger(__name__)

DEVICE_PIECE_BYTES = 16 * 2**20
"""Issuing a piece takes some 0.2 ms of Python, whatever its size, and DMA of 16 MiB 0.3 ms at 50 GB/s; of half as much
it would wait for Python. Estimates: not measured yet."""

CPU_PIECE_BYTES = 16 * 2**20
"""Between two pieces Python takes 0.1 to 0.2 ms, for the copy has emptied its caches; an EPYC copies 16 MiB in 1.4 ms,
which is what a load may wait for a piece of a save.
"""

IN_PLACE_BYTES = 32 * 2**10
"""Of a fragment, on average: a file is read straight into longer ones. The system call is slow with shorter ones: on an
EPYC such a read took 1.75 times as long at 4 KiB as one by way of the core's cache, 1.2 times at 16 KiB, 0.9 times
from 64 KiB on.
"""


class Link(ABC):
    device: torch.device
    row_bytes: int
    """Of one block off the GPU."""
    piece_blocks: int | None = None
    """The most blocks of a call; None: as many as a piece of a file has (``kv_file.items_per_piece``)."""
    in_place: bool
    """Whether a call copies in the caller's thread, any thread, and returns when it has landed."""

    @abstractmethod
    def load(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, landed: Landed) -> None:
        """Rows to blocks, in order. Starts after the event: nothing uses the blocks' old content then.

        Raises:
            Exception: nothing is under way, and ``landed`` is not called.
        """

    @abstractmethod
    def save(self, block_ids: Sequence[int], groups: Sequence[RowGroup], after: Any, landed: Landed) -> None:
        """Blocks to rows, in order. Starts after the event: what writes the blocks is finished then.

        Raises:
            Exception: as ``load``.
        """

    def memory(self, block_ids: Sequence[int]) -> list[Row] | None:
        """The blocks' own bytes, to read a file into; None if that cannot be done, or takes longer."""
        return None

    def close(self, timeout_s: float) -> bool:
        """Lets what is under way land. False if the device does not answer."""
        return True


class CpuLink(Link):
    """Blocks in CPU memory: one pass, row by row where rows lie apart."""

    in_place = True

    def __init__(self, copier: BlockCopier, planes: Sequence[Tensor], piece_blocks: int | None = None) -> None:
        self._copier, self.piece_blocks = copier, piece_blocks
        is_exact, is_long = copier.row_bytes == copier.block_bytes, copier.row_bytes >= IN_PLACE_BYTES * len(planes)
        fragments = fragment_views(planes) if is_exact and is_long else None
        self._fragments = None if fragments is None else [fragment.numpy() for fragment in fragments]
        self.row_bytes, self.device = copier.row_bytes, copier.device

    def load(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, landed: Landed) -> None:
        begin = 0
        for group in groups:
            end = begin + len(group.rows)
            self._copier.scatter(group.matrix, block_ids[begin:end], group.rows)
            begin = end
        landed(None)

    def save(self, block_ids: Sequence[int], groups: Sequence[RowGroup], after: Any, landed: Landed) -> None:
        begin = 0
        for group in groups:
            end = begin + len(group.rows)
            self._copier.gather(block_ids[begin:end], group.matrix, group.rows)
            begin = end
        landed(None)

    def memory(self, block_ids: Sequence[int]) -> list[Row] | None:
        if self._fragments is None:
            return None
        return [[fragment[block] for fragment in self._fragments] for block in block_ids]


class DeviceLink(Link):
    """Blocks on a device: a pipeline per direction. One thread loads, one saves.

    Args:
        torch_device: where ``device`` is.
        row_bytes: of one block off the device.
        fragments: how many pieces of memory a block is on the device.
        plan: which method is the fastest for how many fragments.
        piece_blocks: that fit a buffer of the device.
    """

    in_place = False

    def __init__(
        self,
        device: Device,
        torch_device: torch.device,
        row_bytes: int,
        fragments: int,
        plan: CopyPlan,
        piece_blocks: int | None = None,
    ) -> None:
        self.row_bytes, self.device, self.piece_blocks = row_bytes, torch_device, piece_blocks
        self._chosen: dict[tuple[Direction, int, bool], Method] = {}
        self._fragments, self._plan, self._methods = fragments, plan, device.methods
        self._loads = LoadPipeline(device, "memos-load-landing")
        self._saves = SavePipeline(device, "memos-save-landing")

    def load(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, landed: Landed) -> None:
        self._loads.issue(groups, block_ids, after, self._method(Direction.LOAD, groups, len(block_ids)), landed)

    def save(self, block_ids: Sequence[int], groups: Sequence[RowGroup], after: Any, landed: Landed) -> None:
        self._saves.issue(groups, block_ids, after, self._method(Direction.SAVE, groups, len(block_ids)), landed)

    def _method(self, direction: Direction, groups: Sequence[RowGroup], num_blocks: int) -> Method:
        pinned = all(group.pinned for group in groups)
        case = direction, num_blocks, pinned
        if case not in self._chosen:  # looked up once: it takes as long as a kernel's launch
            allowed = self._methods if pinned else self._methods - {Method.DIRECT}
            size_bytes = self.row_bytes // self._fragments
            self._chosen[case] = self._plan.choose(direction, size_bytes, self._fragments * num_blocks, allowed)
        return self._chosen[case]

    def close(self, timeout_s: float) -> bool:
        ended = [pipeline.close(timeout_s / 2) for pipeline in (self._loads, self._saves)]
        return all(ended)


def device_piece_blocks(row_bytes: int) -> int:
    """Never fewer than a piece of a file has, since those go through the same buffers."""
    return max(items_per_piece(row_bytes), DEVICE_PIECE_BYTES // row_bytes)


def link_for(copier: BlockCopier, planes: Sequence[Tensor], plan: CopyPlan) -> Link:
    """The link to ``planes``, which ``copier`` copies."""
    copier.warm_up()
    if copier.device.type != "cuda":
        return CpuLink(copier, planes, max(items_per_piece(copier.row_bytes), CPU_PIECE_BYTES // copier.row_bytes))
    piece_blocks = device_piece_blocks(copier.row_bytes)
    fragment = (copier.row_bytes // len(planes), piece_blocks * len(planes))
    device = CudaDevice(copier, planes, piece_blocks)
    methods = {each.value: plan.choose(each, *fragment, device.methods).value for each in Direction}
    logger.info("KV copies in pieces of %d x %d bytes: %s", fragment[1], fragment[0], methods)
    return DeviceLink(device, copier.device, copier.row_bytes, len(planes), plan, piece_blocks)
