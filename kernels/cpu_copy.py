"""Copies on CPU: one loop over blocks, planes and the contiguous pieces of a plane's block, compiled by Numba.

One pass, no temporary, past the caches (``cpu_stream``), the GIL is released, and one thread only. torch's own
``copy_`` starts an OpenMP team per calling thread, which fights the forward pass for its cores: on two cores
that were shared with another process, a strided 48 MiB copy took 60 ms with torch's two threads, 6.9 ms
with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .cpu_jit import njit
from .cpu_stream import stream, stream_fence
from .planes import byte_view


class Pieces(NamedTuple):
    """Where the bytes of blocks are. One entry per plane, but for ``offsets``."""

    bases: np.ndarray
    """Addresses."""
    block_strides: np.ndarray
    sizes: np.ndarray
    """Of each contiguous piece of a block, in bytes."""
    ends: np.ndarray
    """Where the plane's offsets end; they begin where those of the plane before end."""
    offsets: np.ndarray
    """Of each piece in its block, in the order in which a row holds them."""


class CpuCopy:
    """Planes in CPU memory."""

    def __init__(self, planes: Sequence[Tensor]) -> None:
        self._planes = list(planes)  # their memory stays as long as its addresses are known here
        self._num_blocks = min(len(plane) for plane in planes)
        views = [byte_view(plane) for plane in planes]
        sizes, offsets = zip(*map(_pieces, views), strict=True)
        self._pieces = Pieces(
            np.array([view.data_ptr() for view in views], np.int64),
            np.array([view.stride(0) for view in views], np.int64),
            np.array(sizes, np.int64),
            np.cumsum([len(each) for each in offsets], dtype=np.int64),
            np.concatenate(offsets),
        )

    def warm_up(self) -> None:
        """Compiles the loops, by calls for no block: the GIL is held meanwhile, which no copy should do."""
        none = np.empty(0, np.int64)
        _gather(self._pieces, none, 0, 0, none)
        _scatter(self._pieces, none, 0, 0, none)

    def gather(self, block_ids: Sequence[int], out: Tensor, rows: Sequence[int], num_programs: int) -> None:
        numbers = _numbers(block_ids, self._num_blocks), _numbers(rows, len(out))
        _gather(self._pieces, numbers[0], out.data_ptr(), out.stride(0), numbers[1])

    def scatter(self, chunk: Tensor, block_ids: Sequence[int], rows: Sequence[int], num_programs: int) -> None:
        numbers = _numbers(block_ids, self._num_blocks), _numbers(rows, len(chunk))
        _scatter(self._pieces, numbers[0], chunk.data_ptr(), chunk.stride(0), numbers[1])


def _pieces(view: Tensor) -> tuple[int, np.ndarray]:
    """Size of the contiguous pieces that a block of a byte view consists of, and the offset of each."""
    shape, strides = list(view.shape[1:]), list(view.stride()[1:])
    size = 1
    while shape and (strides[-1] == size or shape[-1] == 1):
        size *= shape.pop()
        strides.pop()
    offsets = np.zeros(1, np.int64)
    for length, stride in zip(shape, strides, strict=True):
        offsets = (offsets[:, None] + np.arange(length, dtype=np.int64) * stride).ravel()
    return size, offsets


def _numbers(numbers: Sequence[int], end: int) -> np.ndarray:
    """For the loops, which would read and write wherever a wrong number leads."""
    array = np.asarray(numbers, np.int64)
    if array.size and not (array.min() >= 0 and array.max() < end):
        raise IndexError(f"a block or row number is not below {end}, or negative: {array.min()} to {array.max()}")
    return array


@njit(nogil=True)
def _gather(pieces, block_ids, chunk, row_stride, rows):
    for i in range(len(block_ids)):
        at, piece = chunk + rows[i] * row_stride, 0
        for plane in range(len(pieces.bases)):
            block = pieces.bases[plane] + block_ids[i] * pieces.block_strides[plane]
            while piece < pieces.ends[plane]:
                stream(at, block + pieces.offsets[piece], pieces.sizes[plane])
                at += pieces.sizes[plane]
                piece += 1
    stream_fence()


@njit(nogil=True)
def _scatter(pieces, block_ids, chunk, row_stride, rows):
    for i in range(len(block_ids)):
        at, piece = chunk + rows[i] * row_stride, 0
        for plane in range(len(pieces.bases)):
            block = pieces.bases[plane] + block_ids[i] * pieces.block_strides[plane]
            while piece < pieces.ends[plane]:
                stream(block + pieces.offsets[piece], at, pieces.sizes[plane])
                at += pieces.sizes[plane]
                piece += 1
    stream_fence()
