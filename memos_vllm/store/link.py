"""The way between paged blocks and host rows: in CPU memory one pass, on a device through its streams.

A call copies one piece, and says through ``landed`` when its bytes have arrived; whoever is told may
publish, free or reuse both sides, and nobody before.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.store.copy_planner import CopyPlan, Direction
from memos_vllm.store.cuda_device import CudaDevice
from memos_vllm.store.fragments import fragment_views
from memos_vllm.store.host_memory import RowGroup
from memos_vllm.store.kv_file import Row, items_per_piece
from memos_vllm.store.layer_groups import LayerGroup
from memos_vllm.store.pipeline import Device, Event, Landed, LoadPipeline, Method, SavePipeline

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
    layers: Sequence[LayerGroup] = ()
    """In which groups of layers a load may come; none: whole blocks only."""

    @abstractmethod
    def load(
        self,
        groups: Sequence[RowGroup],
        block_ids: Sequence[int],
        after: Any,
        landed: Landed,
        layers: int | None = None,
    ) -> Event | None:
        """Rows to blocks, in order. Starts after the event: nothing uses the blocks' old content then.

        Args:
            layers: which group of layers; None: all.

        Returns:
            The point at which the bytes are in the blocks, for streams that need them; None: they are there.

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

    def refuse(self) -> None:  # noqa: B027
        """No more pieces; a caller that waits in ``load`` or ``save`` is let go with an OSError."""

    def _of_layers(self, groups: Sequence[RowGroup], layers: int | None) -> Sequence[RowGroup]:
        """The columns of a group of layers."""
        if layers is None:
            return groups
        columns = self.layers[layers].columns
        return [replace(group, matrix=group.matrix[:, columns]) for group in groups]

    def close(self, timeout_s: float) -> bool:
        """Lets what is under way land. False if the device does not answer."""
        return True


class CpuLink(Link):
    """Blocks in CPU memory: one pass, row by row where rows lie apart."""

    in_place = True

    def __init__(
        self,
        copier: BlockCopier,
        planes: Sequence[Tensor],
        piece_blocks: int | None = None,
        layers: Sequence[LayerGroup] = (),
    ) -> None:
        self._copier, self.piece_blocks, self.layers = copier, piece_blocks, layers
        self._layer_copiers = [BlockCopier(planes[group.planes]) for group in layers]
        is_exact, is_long = copier.row_bytes == copier.block_bytes, copier.row_bytes >= IN_PLACE_BYTES * len(planes)
        fragments = fragment_views(planes) if is_exact and is_long else None
        self._fragments = None if fragments is None else [fragment.numpy() for fragment in fragments]
        self.row_bytes, self.device = copier.row_bytes, copier.device

    def load(
        self,
        groups: Sequence[RowGroup],
        block_ids: Sequence[int],
        after: Any,
        landed: Landed,
        layers: int | None = None,
    ) -> None:
        copier = self._copier if layers is None else self._layer_copiers[layers]
        begin = 0
        for group in self._of_layers(groups, layers):
            end = begin + len(group.rows)
            copier.scatter(group.matrix, block_ids[begin:end], group.rows)
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
        layers: as ``device`` knows them.
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
        layers: Sequence[LayerGroup] = (),
    ) -> None:
        self.layers = layers
        self.row_bytes, self.device, self.piece_blocks = row_bytes, torch_device, piece_blocks
        self._chosen: dict[tuple[Direction, int, bool, int | None], Method] = {}
        self._fragments, self._plan, self._methods = fragments, plan, device.methods
        self._loads = LoadPipeline(device, "memos-load-landing")
        if layers:  # once its request runs, a load may not fail
            self._loads.make_buffers()
        self._saves = SavePipeline(device, "memos-save-landing")

    def load(
        self,
        groups: Sequence[RowGroup],
        block_ids: Sequence[int],
        after: Any,
        landed: Landed,
        layers: int | None = None,
    ) -> Event:
        method = self._method(Direction.LOAD, groups, len(block_ids), layers)
        return self._loads.issue(self._of_layers(groups, layers), block_ids, after, method, landed, layers)

    def save(self, block_ids: Sequence[int], groups: Sequence[RowGroup], after: Any, landed: Landed) -> None:
        self._saves.issue(groups, block_ids, after, self._method(Direction.SAVE, groups, len(block_ids)), landed)

    def _method(
        self, direction: Direction, groups: Sequence[RowGroup], num_blocks: int, layers: int | None = None
    ) -> Method:
        pinned = all(group.pinned for group in groups)
        case = direction, num_blocks, pinned, layers
        if case not in self._chosen:  # looked up once: it takes as long as a kernel's launch
            allowed = self._methods if pinned else self._methods - {Method.DIRECT}
            size_bytes = self.row_bytes // self._fragments
            fragments = self._fragments if layers is None else self.layers[layers].num_planes
            self._chosen[case] = self._plan.choose(direction, size_bytes, fragments * num_blocks, allowed)
        return self._chosen[case]

    def refuse(self) -> None:
        for pipeline in (self._loads, self._saves):
            pipeline.refuse()

    def close(self, timeout_s: float) -> bool:
        ended = [pipeline.close(timeout_s / 2) for pipeline in (self._loads, self._saves)]
        return all(ended)


def device_piece_blocks(row_bytes: int) -> int:
    """Never fewer than a piece of a file has, since those go through the same buffers."""
    return max(items_per_piece(row_bytes), DEVICE_PIECE_BYTES // row_bytes)


def link_for(copier: BlockCopier, planes: Sequence[Tensor], plan: CopyPlan, layers: Sequence[LayerGroup] = ()) -> Link:
    """The link to ``planes``, which ``copier`` copies; with ``layers`` also group by group, unless it encodes."""
    assert not layers or copier.row_bytes == copier.block_bytes
    copier.warm_up()
    if copier.device.type != "cuda":
        piece_blocks = max(items_per_piece(copier.row_bytes), CPU_PIECE_BYTES // copier.row_bytes)
        return CpuLink(copier, planes, piece_blocks, layers)
    piece_blocks = device_piece_blocks(copier.row_bytes)
    fragment = (copier.row_bytes // len(planes), piece_blocks * len(planes))
    device = CudaDevice(copier, planes, piece_blocks, layers)
    methods = {each.value: plan.choose(each, *fragment, device.methods).value for each in Direction}
    logger.info("KV copies in pieces of %d x %d bytes: %s", fragment[1], fragment[0], methods)
    return DeviceLink(device, copier.device, copier.row_bytes, len(planes), plan, piece_blocks, layers)
