"""A CUDA GPU as ``pipeline.Device``: which call does what, and nothing about order."""

from __future__ import annotations

import ctypes
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.store.copy_planner import CopyPlan, Direction, cached_plan, measure_plan
from memos_vllm.store.fragments import fragment_views
from memos_vllm.store.host_memory import HostMemory, RowGroup
from memos_vllm.store.layer_groups import LayerGroup
from memos_vllm.store.pipeline import Device, Event, Method

logger = logging.getLogger(__name__)

_LOWEST_PRIORITY = 0  # torch's range is -5 (first) to 0 (last); vLLM's own streams have 0 too, none is lower
_REPEATS = 3
_PIECES = 4
"""In a row: one at a time, a method whose copies and kernels overlap would look slower than it is."""


class CudaStream:
    def __init__(self, device: torch.device) -> None:
        self.torch = torch.cuda.Stream(device, priority=_LOWEST_PRIORITY)

    def wait(self, event: torch.cuda.Event) -> None:
        self.torch.wait_event(event)

    def record(self) -> Event:
        event = torch.cuda.Event(blocking=True)  # whoever waits sleeps, and leaves the core to vLLM
        event.record(self.torch)
        return event


class CudaDevice(Device):
    """One set of planes on one GPU.

    Args:
        copier: of the planes; an encoding one changes the bytes on their way.
        piece_blocks: the most blocks of one piece, hence rows of a buffer.
        layers: in which groups of layers a load may come.
    """

    def __init__(
        self, copier: BlockCopier, planes: Sequence[Tensor], piece_blocks: int, layers: Sequence[LayerGroup] = ()
    ) -> None:
        self._copier, self._piece_blocks = copier, piece_blocks
        self._layers = list(layers)
        self._layer_copiers = [BlockCopier(planes[group.planes]) for group in layers]
        for each in self._layer_copiers:
            each.warm_up()
        self._device = copier.device
        self._fragments = fragment_views(planes) if copier.row_bytes == copier.block_bytes else None
        self._allocation = _allocation_stream(self._device)

    @property
    def methods(self) -> frozenset[Method]:
        """Without DMA where a block is not contiguous in a plane, or the copier encodes."""
        return frozenset(Method) if self._fragments is not None else frozenset(Method) - {Method.DMA}

    def begin_thread(self) -> None:
        # A new thread's device is GPU 0: whatever it calls first would open a context there, half a gigabyte, for a
        # rank of another GPU.
        torch.cuda.set_device(self._device)

    def stream(self) -> CudaStream:
        return CudaStream(self._device)

    def buffer(self) -> Tensor:
        # From a stream's own part of the allocator: memory that the forward pass gave back may still be
        # in use by what it has queued, and only its own stream would wait for that.
        with self._on(self._allocation):
            return torch.empty(self._piece_blocks, self._copier.row_bytes, dtype=torch.uint8, device=self._device)

    def copy_in(self, stream: CudaStream, groups: Sequence[RowGroup], buffer: Tensor) -> None:
        with self._on(stream):
            for host, device in _spans(groups, buffer):
                device.copy_(host, non_blocking=True)

    def scatter(self, stream: CudaStream, buffer: Tensor, block_ids: Sequence[int], layers: int | None = None) -> None:
        copier = self._loading(layers)
        with self._on(stream):
            copier.scatter(_as_rows(buffer, len(block_ids), copier.row_bytes), block_ids)

    def gather(self, stream: CudaStream, block_ids: Sequence[int], buffer: Tensor) -> None:
        with self._on(stream):
            self._copier.gather(block_ids, buffer[: len(block_ids)])

    def copy_out(self, stream: CudaStream, buffer: Tensor, groups: Sequence[RowGroup]) -> None:
        with self._on(stream):
            for host, device in _spans(groups, buffer):
                host.copy_(device, non_blocking=True)

    def load_direct(
        self, stream: CudaStream, groups: Sequence[RowGroup], block_ids: Sequence[int], layers: int | None = None
    ) -> None:
        with self._on(stream):
            for group, ids in _by_group(groups, block_ids):
                self._loading(layers).scatter(group.matrix, ids, group.rows)

    def save_direct(self, stream: CudaStream, block_ids: Sequence[int], groups: Sequence[RowGroup]) -> None:
        with self._on(stream):
            for group, ids in _by_group(groups, block_ids):
                self._copier.gather(ids, group.matrix, group.rows)

    def load_fragments(
        self, stream: CudaStream, groups: Sequence[RowGroup], block_ids: Sequence[int], layers: int | None = None
    ) -> None:
        with self._on(stream):
            for host, device in self._fragment_pairs(groups, block_ids, layers):
                device.copy_(host, non_blocking=True)

    def save_fragments(self, stream: CudaStream, block_ids: Sequence[int], groups: Sequence[RowGroup]) -> None:
        with self._on(stream):
            for host, device in self._fragment_pairs(groups, block_ids):
                host.copy_(device, non_blocking=True)

    def _loading(self, layers: int | None) -> BlockCopier:
        return self._copier if layers is None else self._layer_copiers[layers]

    def _fragment_pairs(
        self, groups: Sequence[RowGroup], block_ids: Sequence[int], layers: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._fragments is not None
        fragments = self._fragments if layers is None else self._fragments[self._layers[layers].planes]
        for group, ids in _by_group(groups, block_ids):
            for row, block in zip(group.rows, ids, strict=True):
                begin = 0
                for plane in fragments:
                    end = begin + plane.shape[1]
                    yield group.matrix[row, begin:end], plane[block]
                    begin = end

    @contextmanager
    def _on(self, stream: CudaStream) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(stream.torch):
            yield


@cache
def _allocation_stream(device: torch.device) -> CudaStream:
    """One per GPU: torch has 32 streams of a priority for the whole process, and gives them out in turn. Who takes more
    shares them with vLLM."""
    return CudaStream(device)


def _by_group(groups: Sequence[RowGroup], block_ids: Sequence[int]) -> Iterator[tuple[RowGroup, Sequence[int]]]:
    begin = 0
    for group in groups:
        end = begin + len(group.rows)
        yield group, block_ids[begin:end]
        begin = end


def _as_rows(buffer: Tensor, num_rows: int, row_bytes: int) -> Tensor:
    """The beginning of a buffer as rows that may be narrower than its own, and then more."""
    return buffer.view(-1)[: num_rows * row_bytes].view(num_rows, row_bytes)


def _spans(groups: Sequence[RowGroup], buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Runs of adjacent host rows beside their place in the buffer: one DMA each.

    Rows of a group of layers are never adjacent: torch would copy what lies apart together first, and wait for it.
    """
    spans = []
    done = 0
    staged = _as_rows(buffer, sum(len(group.rows) for group in groups), groups[0].matrix.shape[1])
    for group in groups:
        begin, rows = 0, group.rows
        is_whole = group.matrix.is_contiguous()
        while begin < len(rows):
            end = begin + 1
            while is_whole and end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            count = end - begin
            spans.append((group.matrix[rows[begin] : rows[begin] + count], staged[done : done + count]))
            begin, done = end, done + count
    return spans


def machine_name(device: torch.device) -> str:
    """What the speed of copies depends on, and how it is measured."""
    properties = torch.cuda.get_device_properties(device)
    software = f"driver {driver_version()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    return f"{properties.name}, {software}, {_PIECES} pieces in a row"


def driver_version() -> int:
    """Which CUDA the driver supports, 13000 for 13.0; 0 where it does not say. torch 2.11 has no call for it."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def plan_of(device: torch.device, directory: Path) -> CopyPlan:
    """This machine's plan: from ``directory``, or measured now and kept there."""

    def measure(known: CopyPlan) -> CopyPlan:
        timer = CopyMeasure(device)
        try:
            return measure_plan(timer, known)
        except torch.OutOfMemoryError as error:
            logger.warning("no memory on the GPU to measure copies (%s); what was not is staged", error)
            return known
        finally:
            timer.close()

    return cached_plan(directory, machine_name(device), measure)


class CopyMeasure:
    """Times one method on planes of its own, several pieces in a row as a load has them; ``copy_planner.Measure``.

    Args:
        device: where it allocates, for as long as it lives, up to four times the bytes of a cell.
    """

    _PLANES = 8

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies, self._kernels = CudaStream(device), CudaStream(device)
        self._prepared: tuple[int, int] | None = None
        self._host: HostMemory | None = None

    def close(self) -> None:
        """Unlocks the host memory."""
        if self._host is not None:
            self._host.close()

    def __call__(self, direction: Direction, method: Method, fragment_bytes: int, fragments: int) -> float:
        if self._prepared != (fragment_bytes, fragments):
            self._prepare(fragment_bytes, fragments)
        if method is Method.DIRECT and not all(group.pinned for group in self._groups):
            return 0.0
        cuda, groups, blocks = self._cuda, self._groups, self._blocks
        run = {
            (Direction.LOAD, Method.STAGED): self._load_staged,
            (Direction.SAVE, Method.STAGED): self._save_staged,
            (Direction.LOAD, Method.DIRECT): lambda _: cuda.load_direct(self._kernels, groups, blocks),
            (Direction.SAVE, Method.DIRECT): lambda _: cuda.save_direct(self._kernels, blocks, groups),
            (Direction.LOAD, Method.DMA): lambda _: cuda.load_fragments(self._copies, groups, blocks),
            (Direction.SAVE, Method.DMA): lambda _: cuda.save_fragments(self._copies, blocks, groups),
        }[direction, method]
        seconds = []
        for _ in range(_REPEATS + 1):  # the first one also compiles
            begin = time.perf_counter()
            for piece in range(_PIECES):
                run(piece)
            for stream in (self._copies, self._kernels):
                stream.record().synchronize()
            seconds.append(time.perf_counter() - begin)
        return _PIECES * fragment_bytes * fragments / statistics.median(seconds[1:]) / 1e9

    def _prepare(self, fragment_bytes: int, fragments: int) -> None:
        num_blocks = fragments // self._PLANES
        planes = [
            torch.empty(2 * num_blocks, fragment_bytes, dtype=torch.uint8, device=self._device)
            for _ in range(self._PLANES)
        ]
        copier = BlockCopier(planes)
        self._cuda = CudaDevice(copier, planes, num_blocks)
        self._blocks = list(range(0, 2 * num_blocks, 2))  # apart, as blocks of a busy cache are
        if self._host is not None:
            self._host.close()
        self._host = HostMemory(num_blocks, copier.row_bytes, pin=True, device=self._device)
        self._groups = self._host.groups(range(num_blocks))
        self._buffers = [self._cuda.buffer(), self._cuda.buffer()]
        torch.cuda.current_stream(self._device).synchronize()
        self._prepared = (fragment_bytes, fragments)

    # One piece's copy runs while another's kernel does, as in ``pipeline``; each buffer is used every other time.

    def _load_staged(self, piece: int) -> None:
        buffer = self._buffers[piece % 2]
        if piece > 1:
            self._copies.wait(self._used[piece % 2])
        self._cuda.copy_in(self._copies, self._groups, buffer)
        self._kernels.wait(self._copies.record())
        self._cuda.scatter(self._kernels, buffer, self._blocks)
        self._note(piece, self._kernels.record())

    def _save_staged(self, piece: int) -> None:
        buffer = self._buffers[piece % 2]
        if piece > 1:
            self._kernels.wait(self._used[piece % 2])
        self._cuda.gather(self._kernels, self._blocks, buffer)
        self._copies.wait(self._kernels.record())
        self._cuda.copy_out(self._copies, buffer, self._groups)
        self._note(piece, self._copies.record())

    def _note(self, piece: int, event: Event) -> None:
        """When the piece's buffer is free again."""
        if piece == 0:
            self._used: list[Event] = []
        self._used[piece % 2 : piece % 2 + 1] = [event]
