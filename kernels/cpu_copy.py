"""Copies on CPU: one loop over blocks and the contiguous pieces of a block in all planes, compiled by Numba.

One pass, no temporary, past the caches (``cpu_stream``), the GIL is released, and one thread only. torch's own
``copy_`` starts an OpenMP team per calling thread, which fights the forward pass for its cores: on two cores
that were shared with another process, a strided 48 MiB copy took 60 ms with torch's two threads, 6.9 ms
with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .cpu_jit import njit
from .cpu_stream import MIN_BYTES, TOGETHER, fetch_strip, stream, stream_fence, stream_together
from .planes import byte_view


class Pieces(NamedTuple):
    """The contiguous pieces of a block, in the order in which a row holds them; one entry per piece."""

    starts: np.ndarray
    """Addresses in block 0."""
    block_strides: np.ndarray
    sizes: np.ndarray
    row_offsets: np.ndarray


class CpuCopy:
    """Planes in CPU memory."""

    def __init__(self, planes: Sequence[Tensor]) -> None:
        self._planes = list(planes)  # their memory stays as long as its addresses are known here
        self._num_blocks = min(len(plane) for plane in planes)
        views = [byte_view(plane) for plane in planes]
        sizes, offsets = zip(*map(_pieces, views), strict=True)
        counts = [len(each) for each in offsets]
        starts = [view.data_ptr() + each for view, each in zip(views, offsets, strict=True)]
        of_pieces = np.repeat(np.array(sizes, np.int64), counts)
        self._pieces = Pieces(
            np.concatenate(starts),
            np.repeat(np.array([view.stride(0) for view in views], np.int64), counts),
            of_pieces,
            np.cumsum(of_pieces) - of_pieces,
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


LONG_BYTES = 64 * 2**10
"""The core fetches ahead in so long a piece by itself, and one at a time disturbs a forward pass beside it less."""


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
    if array.size and array.view(np.uint64).max() >= end:  # a negative one is a large one there
        raise IndexError(f"a block or row number is not below {end}, or negative: {array.min()} to {array.max()}")
    return array


def _loop(copies_to_blocks: bool) -> Any:
    """Pieces shorter than a strip, and long ones, are copied at once; of the others ``TOGETHER`` at a time, over blocks
    too."""

    @njit(nogil=True)
    def loop(pieces, block_ids, chunk, row_stride, rows):
        group = np.empty((3, TOGETHER), np.int64)
        targets, sources, sizes, count = group[0], group[1], group[2], 0
        for i in range(len(block_ids)):
            row = chunk + rows[i] * row_stride
            for piece in range(len(pieces.sizes)):
                in_block = pieces.starts[piece] + block_ids[i] * pieces.block_strides[piece]
                in_row = row + pieces.row_offsets[piece]
                target, source = (in_block, in_row) if copies_to_blocks else (in_row, in_block)
                if pieces.sizes[piece] < MIN_BYTES or pieces.sizes[piece] >= LONG_BYTES:
                    stream(target, source, pieces.sizes[piece])
                    continue
                fetch_strip(source)
                targets[count], sources[count], sizes[count] = target, source, pieces.sizes[piece]
                count += 1
                if count == TOGETHER:
                    stream_together(targets, sources, sizes, count)
                    count = 0
        stream_together(targets, sources, sizes, count)
        stream_fence()

    return loop


_gather, _scatter = _loop(copies_to_blocks=False), _loop(copies_to_blocks=True)
