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


class Link(ABC):
    device: torch.device
    row_bytes: int
    """Of one block off the GPU."""
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
        """The blocks' own bytes, to read a file into; None if that cannot be done."""
        return None

    def close(self, timeout_s: float) -> bool:
        """Lets what is under way land. False if the device does not answer."""
        return True


class CpuLink(Link):
    """Blocks in CPU memory: one pass, row by row where rows lie apart."""

    in_place = True

    def __init__(self, copier: BlockCopier, planes: Sequence[Tensor]) -> None:
        self._copier = copier
        fragments = fragment_views(planes) if copier.row_bytes == copier.block_bytes else None
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
    """

    in_place = False

    def __init__(
        self, device: Device, torch_device: torch.device, row_bytes: int, fragments: int, plan: CopyPlan
    ) -> None:
        self.row_bytes, self.device = row_bytes, torch_device
        self._fragments, self._plan, self._methods = fragments, plan, device.methods
        self._loads = LoadPipeline(device, "memos-load-landing")
        self._saves = SavePipeline(device, "memos-save-landing")

    def load(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, landed: Landed) -> None:
        self._loads.issue(groups, block_ids, after, self._method(Direction.LOAD, groups, len(block_ids)), landed)

    def save(self, block_ids: Sequence[int], groups: Sequence[RowGroup], after: Any, landed: Landed) -> None:
        self._saves.issue(groups, block_ids, after, self._method(Direction.SAVE, groups, len(block_ids)), landed)

    def _method(self, direction: Direction, groups: Sequence[RowGroup], num_blocks: int) -> Method:
        allowed = self._methods
        if not all(group.pinned for group in groups):
            allowed -= {Method.DIRECT}
        size_bytes = self.row_bytes // self._fragments
        return self._plan.choose(direction, size_bytes, self._fragments * num_blocks, allowed)

    def close(self, timeout_s: float) -> bool:
        ended = [pipeline.close(timeout_s / 2) for pipeline in (self._loads, self._saves)]
        return all(ended)


def link_for(copier: BlockCopier, planes: Sequence[Tensor], plan: CopyPlan) -> Link:
    """The link to ``planes``, which ``copier`` copies."""
    copier.warm_up()
    if copier.device.type != "cuda":
        return CpuLink(copier, planes)
    piece_blocks = items_per_piece(copier.row_bytes)
    fragment = (copier.row_bytes // len(planes), piece_blocks * len(planes))
    device = CudaDevice(copier, planes, piece_blocks)
    methods = {each.value: plan.choose(each, *fragment, device.methods).value for each in Direction}
    logger.info("KV copies in pieces of %d x %d bytes: %s", fragment[1], fragment[0], methods)
    return DeviceLink(device, copier.device, copier.row_bytes, len(planes), plan)
