"""Copies of KV blocks between vLLM's paged cache and contiguous chunks.

A *plane* is a view of one KV cache tensor (or of its K or V half) whose dimension 0 is vLLM's block
id. A *chunk* is a uint8 matrix ``[n, block_bytes]``: row ``i`` holds one block, plane after plane,
each plane contiguous in its logical order. The row is therefore the same for every stride order
(NHD, HND, layers interleaved), so a chunk that was saved under one can be loaded under another.

On CPU the copies go through numpy views of the same memory: one pass, no temporary, the GIL is
released, and one thread only. torch's own ``copy_`` starts an OpenMP team per calling thread, which
fights the forward pass for its cores: on two cores that were shared with another process, a
strided 48 MiB copy took 60 ms with torch's two threads, 6.9 ms with one and 7.0 ms with numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def planes_of(kv_caches: Sequence[Tensor], num_blocks: int) -> list[Tensor]:
    """Views of the registered KV caches whose dimension 0 is vLLM's block id.

    Args:
        kv_caches: in the order in which rows of a chunk shall hold them. Understood shapes, under any
            strides: ``[num_blocks * k, ...]`` (``k`` kernel blocks per block of the manager; MLA's
            three dimensions too) and ``[2, num_blocks * k, ...]`` (K and V apart: two planes).
        num_blocks: of vLLM's KV cache manager.

    Returns:
        ``[num_blocks, ...]`` or ``[num_blocks, k, ...]`` per plane, sharing memory with the caches.
        A view that occurs twice (layers that share their KV) is returned once.

    Raises:
        ValueError: no dimension of a cache counts blocks, or two of them could.
    """
    planes: dict[tuple, Tensor] = {}
    for position, cache in enumerate(kv_caches):
        for half in _split_kv(cache, num_blocks, position):
            k = half.shape[0] // num_blocks
            plane = half if k == 1 else half.unflatten(0, (num_blocks, k))
            planes.setdefault((plane.data_ptr(), plane.shape, plane.stride(), plane.dtype), plane)
    return list(planes.values())


def _split_kv(cache: Tensor, num_blocks: int, position: int) -> Sequence[Tensor]:
    """The cache itself if its first dimension counts blocks; its K and V if the second does."""
    shape = tuple(cache.shape)

    def counts_blocks(dim: int) -> bool:
        return cache.dim() > dim and shape[dim] > 0 and shape[dim] % num_blocks == 0

    blocks_first = counts_blocks(0)
    kv_first = cache.dim() > 1 and shape[0] == 2 and counts_blocks(1)
    if num_blocks < 1 or blocks_first == kv_first:
        why = "both of the first two dimensions could" if blocks_first else "neither of the first two dimensions can"
        raise ValueError(
            f"KV cache {position} has the shape {shape}: {why} count {num_blocks} blocks; "
            "expected [num_blocks * k, ...] or [2, num_blocks * k, ...]"
        )
    return (cache,) if blocks_first else (cache[0], cache[1])


def plane_bytes(plane: Tensor) -> int:
    """Bytes of one block in ``plane``."""
    return math.prod(plane.shape[1:]) * plane.element_size()


def block_bytes(planes: Sequence[Tensor]) -> int:
    """Bytes of one block over all planes: the length of a chunk's row."""
    return sum(map(plane_bytes, planes))


def describe_planes(planes: Sequence[Tensor]) -> tuple[str, ...]:
    """Shape and dtype of one block per plane, such as ``bfloat16[8,16,128]``; for ``KVIdentity.layout``."""
    return tuple(f"{str(p.dtype).removeprefix('torch.')}[{','.join(map(str, p.shape[1:]))}]" for p in planes)


def gather_blocks(planes: Sequence[Tensor], block_ids: Sequence[int], out: Tensor) -> None:
    """Copies ``planes[:][block_ids[i]]`` to ``out[i]``; ids may repeat.

    Args:
        out: uint8 ``[n, block_bytes]`` on the planes' device; rows may lie apart.
    """
    BlockCopier(planes).gather(block_ids, out)


def scatter_blocks(chunk: Tensor, planes: Sequence[Tensor], block_ids: Sequence[int]) -> None:
    """Copies ``chunk[i]`` to ``planes[:][block_ids[i]]``; ids must differ. Other blocks keep their bytes."""
    BlockCopier(planes).scatter(chunk, block_ids)


class BlockCopier:
    """Gathers and scatters blocks of one set of planes; the views of the planes are made once.

    May be used by several threads at a time as long as they touch different blocks and rows.
    """

    def __init__(self, planes: Sequence[Tensor]) -> None:
        assert planes and len({plane.device for plane in planes}) == 1
        self.device = planes[0].device
        self.block_bytes = block_bytes(planes)
        self._views = [_byte_view(plane) for plane in planes]
        self._arrays = [_array(view) for view in self._views] if self.device.type == "cpu" else None

    def gather(self, block_ids: Sequence[int], out: Tensor, rows: Sequence[int] | None = None) -> None:
        """As ``gather_blocks``; block ``i`` goes to row ``rows[i]``, by default ``i``."""
        self._check(block_ids, out, rows)
        if self._arrays is None:
            self._gather_generic(block_ids, out if rows is None else out[list(rows)])
            return
        runs = _runs(range(len(block_ids)) if rows is None else rows, block_ids)
        for array, matrix in self._pairs(out):
            for row, block in runs:
                matrix[row] = array[block]

    def scatter(self, chunk: Tensor, block_ids: Sequence[int], rows: Sequence[int] | None = None) -> None:
        """As ``scatter_blocks``; block ``i`` comes from row ``rows[i]``, by default ``i``."""
        self._check(block_ids, chunk, rows)
        if self._arrays is None:
            self._scatter_generic(chunk if rows is None else chunk[list(rows)], block_ids)
            return
        runs = _runs(range(len(block_ids)) if rows is None else rows, block_ids)
        for array, matrix in self._pairs(chunk):
            for row, block in runs:
                array[block] = matrix[row]

    def _check(self, block_ids: Sequence[int], chunk: Tensor, rows: Sequence[int] | None) -> None:
        assert chunk.dtype == torch.uint8 and chunk.dim() == 2 and chunk.shape[1] == self.block_bytes
        assert chunk.device == self.device and (chunk.shape[1] < 2 or chunk.stride(1) == 1)
        assert len(block_ids) == (chunk.shape[0] if rows is None else len(rows))

    def _pairs(self, chunk: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each plane's bytes beside the part of the chunk that belongs to it, in the same shape."""
        begin = 0
        for view, array in zip(self._views, self._arrays, strict=True):
            end = begin + math.prod(view.shape[1:])
            part = chunk[:, begin:end]
            yield array, (part if array.ndim == 2 else part.unflatten(1, array.shape[1:])).numpy()
            begin = end

    def _gather_generic(self, block_ids: Sequence[int], out: Tensor) -> None:
        """Any device: one ``index_select`` per plane, into a temporary."""
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        begin = 0
        for view in self._views:
            end = begin + math.prod(view.shape[1:])
            out[:, begin:end].copy_(view.index_select(0, index).flatten(1))
            begin = end

    def _scatter_generic(self, chunk: Tensor, block_ids: Sequence[int]) -> None:
        """Any device: one ``index_copy_`` per plane."""
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        begin = 0
        for view in self._views:
            end = begin + math.prod(view.shape[1:])
            view.index_copy_(0, index, chunk[:, begin:end].unflatten(1, view.shape[1:]))
            begin = end


def gather_reference(planes: Sequence[Tensor], block_ids: Sequence[int], out: Tensor) -> None:
    """What ``gather_blocks`` must equal, one element type and block at a time."""
    for row, block in enumerate(block_ids):
        parts = [plane[block].contiguous().reshape(-1).view(torch.uint8) for plane in planes]
        out[row].copy_(torch.cat(parts))


def scatter_reference(chunk: Tensor, planes: Sequence[Tensor], block_ids: Sequence[int]) -> None:
    """What ``scatter_blocks`` must equal."""
    for row, block in enumerate(block_ids):
        parts = chunk[row].split([plane_bytes(plane) for plane in planes])
        for plane, part in zip(planes, parts, strict=True):
            plane[block].copy_(part.clone().view(plane.dtype).view(plane.shape[1:]))


def _byte_view(plane: Tensor) -> Tensor:
    """The plane as uint8, the element's bytes in the last dimension: ``[num_blocks, ..., bytes]``."""
    if plane.dim() > 1 and plane.stride(-1) == 1:
        return plane.view(torch.uint8)
    # A last dimension with a stride cannot be viewed as smaller elements; a new one of length 1 can.
    apart = plane.as_strided((*plane.shape, 1), (*plane.stride(), 1))
    return apart.view(torch.uint8)


def _array(view: Tensor) -> np.ndarray:
    """The view in numpy; two-dimensional where a block is contiguous, so that a run is one memmove."""
    if view[0].is_contiguous():
        view = view.flatten(1) if view.dim() > 2 else view
    return view.numpy()


def _runs(rows: Sequence[int], blocks: Sequence[int]) -> list[tuple[int | slice, int | slice]]:
    """Cuts two index lists of one length into pieces that step evenly in both; rows are distinct.

    vLLM hands out blocks in ascending or, once freed, in descending order; both become one copy.
    """
    runs: list[tuple[int | slice, int | slice]] = []
    begin, count = 0, len(rows)
    while begin < count:
        end = begin + 1
        if end < count and (block_step := blocks[end] - blocks[begin]) in (1, -1):
            row_step = rows[end] - rows[begin]
            while end < count and rows[end] - rows[end - 1] == row_step and blocks[end] - blocks[end - 1] == block_step:
                end += 1
            length = end - begin
            runs.append((_slice(rows[begin], row_step, length), _slice(blocks[begin], block_step, length)))
        else:
            runs.append((rows[begin], blocks[begin]))
        begin = end
    return runs


def _slice(first: int, step: int, count: int) -> slice:
    stop = first + step * count
    return slice(first, None if stop < 0 else stop, step)
