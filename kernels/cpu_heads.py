"""Gather with fp8 encoding, and scatter with fp8 decoding and rotary shifts, on CPU.

Compiled by Numba, which vLLM depends on: LLVM turns the loops into vector instructions, they run without
the GIL and on the calling thread alone. torch converts from e4m3 element by element: over pieces of 32 KiB
it decoded 0.26 GiB/s of bfloat16 where such a loop decoded 5.9 (one core of a Xeon with AVX-512).

Arrays are flat and contiguous, with strides beside them: of a strided array Numba makes slow loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cpu_copy import CpuCopy
from .cpu_floats import (
    F32,
    U8,
    U16,
    U32,
    as_bits,
    as_float,
    clamp,
    from_bfloat16,
    from_e4m3,
    from_float16,
    to_bfloat16,
    to_e4m3,
    to_float16,
)
from .cpu_jit import njit
from .heads import HeadView
from .rotary import RotaryShift
from .rows import RowLayout


class Slabs(NamedTuple):
    """Shape and strides of a head view, in elements: of blocks, kernel blocks, heads and tokens."""

    parts: int
    heads: int
    tokens: int
    head_size: int
    block_strides: tuple[int, int, int, int]
    row_start: int  # in an fp8 row, whose elements are bytes
    row_strides: tuple[int, int, int]  # of kernel blocks, heads and tokens there
    scale_start: int


class CpuHeads:
    """The arrays of one set of head views, made once."""

    def __init__(self, heads: Sequence[HeadView], layout: RowLayout, copy: CpuCopy) -> None:
        self._layout, self._copy = layout, copy
        self._fp8 = layout.scale_starts is not None
        self._views = [
            _View(head, _flat(head.view), _slabs(number, head, layout), _loops(head.view.dtype))
            for number, head in enumerate(heads)
        ]

    def warm_up(self) -> None:
        """Compiles the loops, by calls for no block: the GIL is held meanwhile, which no copy should do."""
        none = np.empty(0, np.int64)
        for view in {view.loops: view for view in self._views}.values():
            view.loops.turn(view.blocks, none, view.slabs, *_turn_of(RotaryShift(torch.ones(1), torch.zeros(1))))
            if self._fp8:
                view.loops.encode(view.blocks, none, np.empty(0, U8), none, view.slabs)
                view.loops.decode(np.empty(0, U8), none, view.blocks, none, view.slabs)

    def gather(self, block_ids: Sequence[int], out: Tensor, rows: Sequence[int], num_programs: int) -> None:
        """Encodes; only with an fp8 layout."""
        assert self._fp8
        ids, numbers = np.asarray(block_ids, np.int64), np.asarray(rows, np.int64)
        out.numpy()[numbers, self._layout.padding_start :] = 0
        flat, starts = _flat(out), numbers * out.stride(0)
        for view in self._views:
            view.loops.encode(view.blocks, ids, flat, starts, view.slabs)

    def scatter(
        self, chunk: Tensor, block_ids: Sequence[int], rows: Sequence[int], shift: RotaryShift | None, num_programs: int
    ) -> None:
        """K is turned in the blocks, where it lies in the cache's dtype: decoded fp8 fits it without rounding."""
        ids = np.asarray(block_ids, np.int64)
        if self._fp8:
            flat, starts = _flat(chunk), np.asarray(rows, np.int64) * chunk.stride(0)
            for view in self._views:
                view.loops.decode(flat, starts, view.blocks, ids, view.slabs)
        else:
            self._copy.scatter(chunk, block_ids, rows, num_programs)
        if shift is not None:
            for view in self._views:
                if view.head.is_key:
                    view.loops.turn(view.blocks, ids, view.slabs, *_turn_of(shift))


class _View(NamedTuple):
    head: HeadView
    blocks: np.ndarray
    slabs: Slabs
    loops: _Loops


def _slabs(number: int, head: HeadView, layout: RowLayout) -> Slabs:
    start = layout.plane_starts[head.plane] + head.row.storage_offset()
    scales = layout.scale_starts[number] if layout.scale_starts is not None else 0
    return Slabs(*head.view.shape[1:], head.view.stride()[:4], start, head.row.stride()[:3], scales)


def _turn_of(shift: RotaryShift) -> tuple[np.ndarray, np.ndarray, int, int, int]:
    """Cosines and sines; in a head, both elements of the first pair, and the step from pair to pair."""
    neox = shift.style == "neox"
    second = shift.first_dim + (len(shift.cos) if neox else 1)
    return shift.cos.numpy(), shift.sin.numpy(), shift.first_dim, second, 1 if neox else 2


def _flat(tensor: Tensor) -> np.ndarray:
    """All memory between a view's first and last element, as unsigned integers of the elements' width."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    flat = tensor.as_strided((extent,), (1,), tensor.storage_offset()).view(integers).numpy()
    return flat.view({1: U8, 2: U16, 4: U32}[tensor.element_size()])


class _Loops(NamedTuple):
    encode: Any
    decode: Any
    turn: Any


@cache
def _loops(dtype: torch.dtype) -> _Loops:
    """The loops for KV caches of one dtype."""
    to_float, from_float = {
        torch.bfloat16: (from_bfloat16, to_bfloat16),
        torch.float16: (from_float16, to_float16),
        torch.float32: (as_float, as_bits),
    }[dtype]
    largest = F32(torch.finfo(dtype).max)

    @njit(nogil=True)
    def encode(blocks, ids, rows, starts, slabs):
        size = slabs.head_size
        for i in range(len(ids)):
            for head in range(slabs.heads):
                amax = U32(0)
                for part in range(slabs.parts):
                    for token in range(slabs.tokens):
                        at = _block_at(slabs, ids[i], part, head, token)
                        line = blocks[at : at + size]
                        for d in range(size):
                            magnitude = U32(as_bits(to_float(line[d])) & U32(0x7FFFFFFF))
                            amax = max(amax, U32(0) if magnitude >= U32(0x7F800000) else magnitude)
                # 448 = 1.75 * 2**8: the exponent is one more where the mantissa is above 1.75.
                exponent = int(amax >> U32(23)) - 8 + int((amax & U32(0x7FFFFF)) > U32(0x600000))
                exponent = max(exponent, 1)
                rows[starts[i] + slabs.scale_start + head] = exponent
                inverse = as_float(U32(254 - exponent) << U32(23))
                for part in range(slabs.parts):
                    for token in range(slabs.tokens):
                        at = _block_at(slabs, ids[i], part, head, token)
                        line = blocks[at : at + size]
                        at = _row_at(slabs, starts[i], part, head, token)
                        codes = rows[at : at + size]
                        for d in range(size):
                            codes[d] = to_e4m3(to_float(line[d]) * inverse)

    @njit(nogil=True)
    def decode(rows, starts, blocks, ids, slabs):
        size = slabs.head_size
        for i in range(len(ids)):
            for head in range(slabs.heads):
                scale = as_float(U32(rows[starts[i] + slabs.scale_start + head]) << U32(23))
                for part in range(slabs.parts):
                    for token in range(slabs.tokens):
                        at = _row_at(slabs, starts[i], part, head, token)
                        codes = rows[at : at + size]
                        at = _block_at(slabs, ids[i], part, head, token)
                        line = blocks[at : at + size]
                        for d in range(size):
                            line[d] = from_float(clamp(from_e4m3(codes[d]) * scale, largest))

    @njit(nogil=True)
    def turn(blocks, ids, slabs, cos, sin, first, second, step):
        half = len(cos)
        for i in range(len(ids)):
            for head in range(slabs.heads):
                for part in range(slabs.parts):
                    for token in range(slabs.tokens):
                        at = _block_at(slabs, ids[i], part, head, token)
                        if step == 1:
                            ones, twos = blocks[at + first :][:half], blocks[at + second :][:half]
                            for pair in range(half):
                                a, b = to_float(ones[pair]), to_float(twos[pair])
                                ones[pair] = from_float(a * cos[pair] - b * sin[pair])
                                twos[pair] = from_float(b * cos[pair] + a * sin[pair])
                        else:
                            line = blocks[at + first :][: 2 * half]
                            for pair in range(half):
                                a, b = to_float(line[2 * pair]), to_float(line[2 * pair + 1])
                                line[2 * pair] = from_float(a * cos[pair] - b * sin[pair])
                                line[2 * pair + 1] = from_float(b * cos[pair] + a * sin[pair])

    return _Loops(encode, decode, turn)


_inlined = njit(inline="always")


@_inlined
def _block_at(slabs, block, part, head, token):
    strides = slabs.block_strides
    return block * strides[0] + part * strides[1] + head * strides[2] + token * strides[3]


@_inlined
def _row_at(slabs, start, part, head, token):
    strides = slabs.row_strides
    return start + slabs.row_start + part * strides[0] + head * strides[1] + token * strides[2]
