"""Gather with fp8 encoding, and scatter with fp8 decoding and rotary shifts, on CPU.

Compiled by Numba, which vLLM depends on: LLVM turns the loops into vector instructions, they run without
the GIL and on the calling thread alone. torch converts from e4m3 element by element: over pieces of 32 KiB
it decoded 0.26 GiB/s of bfloat16 where such a loop decoded 5.9 (one core of a Xeon with AVX-512).

Two things keep the loops fast: arrays are flat and contiguous, with strides beside them; and casts keep
integers at 32 bits, which Numba would widen to 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .cpu_copy import CpuCopy
from .heads import HeadView
from .rotary import RotaryShift
from .rows import RowLayout

F32, U8, U16, U32 = np.float32, np.uint8, np.uint16, np.uint32


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
    """The arrays of one set of head views, made once. The loops are compiled here too, not at the first copy."""

    def __init__(self, heads: Sequence[HeadView], layout: RowLayout, copy: CpuCopy) -> None:
        self._layout, self._copy = layout, copy
        self._fp8 = layout.scale_starts is not None
        self._views = [
            _View(head, _flat(head.view), _slabs(number, head, layout), _loops(head.view.dtype))
            for number, head in enumerate(heads)
        ]
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
        torch.bfloat16: (_from_bfloat16, _to_bfloat16),
        torch.float16: (_from_float16, _to_float16),
        torch.float32: (_as_float, _as_bits),
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
                            magnitude = U32(_as_bits(to_float(line[d])) & U32(0x7FFFFFFF))
                            amax = max(amax, U32(0) if magnitude >= U32(0x7F800000) else magnitude)
                # 448 = 1.75 * 2**8: the exponent is one more where the mantissa is above 1.75.
                exponent = int(amax >> U32(23)) - 8 + int((amax & U32(0x7FFFFF)) > U32(0x600000))
                exponent = max(exponent, 1)
                rows[starts[i] + slabs.scale_start + head] = exponent
                inverse = _as_float(U32(254 - exponent) << U32(23))
                for part in range(slabs.parts):
                    for token in range(slabs.tokens):
                        at = _block_at(slabs, ids[i], part, head, token)
                        line = blocks[at : at + size]
                        at = _row_at(slabs, starts[i], part, head, token)
                        codes = rows[at : at + size]
                        for d in range(size):
                            codes[d] = _to_e4m3(to_float(line[d]) * inverse)

    @njit(nogil=True)
    def decode(rows, starts, blocks, ids, slabs):
        size = slabs.head_size
        for i in range(len(ids)):
            for head in range(slabs.heads):
                scale = _as_float(U32(rows[starts[i] + slabs.scale_start + head]) << U32(23))
                for part in range(slabs.parts):
                    for token in range(slabs.tokens):
                        at = _row_at(slabs, starts[i], part, head, token)
                        codes = rows[at : at + size]
                        at = _block_at(slabs, ids[i], part, head, token)
                        line = blocks[at : at + size]
                        for d in range(size):
                            line[d] = from_float(_clamp(_from_e4m3(codes[d]) * scale, largest))

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


@_inlined
def _clamp(x, largest):
    """Comparisons with NaN are false, and it stays."""
    return largest if x > largest else (-largest if x < -largest else x)


@_inlined
def _as_float(bits):
    return U32(bits).view(F32)


@_inlined
def _as_bits(x):
    return F32(x).view(U32)


@_inlined
def _to_e4m3(x):
    """float32 of at most 448, or not finite; to nearest, ties to even. As in ``gpu_heads``."""
    bits = _as_bits(x)
    magnitude = U32(bits & U32(0x7FFFFFFF))
    subnormal = U32(_as_bits(_as_float(magnitude) + F32(16384.0)) - U32(0x46800000))
    odd = U32(U32(magnitude >> U32(20)) & U32(1))
    normal = U32(U32(U32(magnitude - U32((120 << 23) - 0x7FFFF)) + odd) >> U32(20))
    code = subnormal if magnitude < U32(121 << 23) else normal
    code = U32(0x7F) if magnitude >= U32(0x7F800000) else code
    return U8(U32(code | U32(U32(bits >> U32(24)) & U32(0x80))))


@_inlined
def _from_e4m3(code):
    magnitude = U32(U32(code) & U32(0x7F))
    normal = _as_float(U32(U32(magnitude << U32(20)) + U32(120 << 23)))
    value = F32(magnitude) * F32(2.0**-9) if magnitude < U32(8) else normal
    value = F32(np.nan) if magnitude == U32(0x7F) else value
    return -value if U32(code) >= U32(0x80) else value


@_inlined
def _from_bfloat16(bits):
    return _as_float(U32(bits) << U32(16))


@_inlined
def _to_bfloat16(x):
    bits = _as_bits(x)
    odd = U32(U32(bits >> U32(16)) & U32(1))
    rounded = U32(U32(U32(bits + U32(0x7FFF)) + odd) >> U32(16))
    return U16(U32(0x7FC0) if x != x else rounded)


@_inlined
def _from_float16(bits):
    magnitude = U32(U32(bits) & U32(0x7FFF))
    # float32 with the same fields has an exponent that is too small by 127 - 15; its subnormals become right too.
    value = _as_float(U32(magnitude << U32(13))) * F32(2.0**112)
    value = _as_float(U32(U32(magnitude << U32(13)) | U32(0x7F800000))) if magnitude >= U32(0x7C00) else value
    return _as_float(U32(_as_bits(value) | U32(U32(U32(bits) & U32(0x8000)) << U32(16))))


@_inlined
def _to_float16(x):
    bits = _as_bits(x)
    magnitude = U32(bits & U32(0x7FFFFFFF))
    # Adding 2**-1 leaves 2**-24, the distance of subnormal values, as the last bit of the mantissa.
    subnormal = U32(_as_bits(_as_float(magnitude) + F32(0.5)) - U32(0x3F000000))
    odd = U32(U32(magnitude >> U32(13)) & U32(1))
    normal = U32(U32(U32(magnitude - U32((112 << 23) - 0xFFF)) + odd) >> U32(13))
    half = subnormal if magnitude < U32(113 << 23) else normal
    half = U32(0x7C00) if magnitude >= U32(0x477FF000) else half
    half = U32(0x7E00) if magnitude > U32(0x7F800000) else half
    return U16(U32(half | U32(U32(bits >> U32(16)) & U32(0x8000))))
