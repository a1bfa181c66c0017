"""The kernels of ``gpu_heads``: encode slabs to rows, scatter slabs from rows.

fp8 codes are made and read with integer arithmetic, since sm_80 has no instructions for e4m3; ``fp8``
says what they mean. All addresses are 64 bits wide and come from the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table of slabs, int64; offsets and strides are in bytes.
BASE = tl.constexpr(0)
BLOCK_STRIDE = tl.constexpr(1)
PART_STRIDE = tl.constexpr(2)  # from one kernel block of a block to the next
TOKEN_STRIDE = tl.constexpr(3)
ROW_START = tl.constexpr(4)
ROW_PART_STRIDE = tl.constexpr(5)
ROW_TOKEN_STRIDE = tl.constexpr(6)
SCALE_START = tl.constexpr(7)
IS_KEY = tl.constexpr(8)
COLUMNS = tl.constexpr(9)


@triton.jit(
    do_not_specialize=[
        "num_slabs",
        "slabs_per_row",
        "tokens",
        "tokens_per_part",
        "padding_start",
        "padding_bytes",
    ]
)
def encode_slabs(
    slabs,  # int64 [slabs_per_row, COLUMNS]
    moves,  # int64 [rows, 2]: block id, address of the row
    num_slabs,  # rows * slabs_per_row
    slabs_per_row,
    tokens,  # of a block
    tokens_per_part,  # of a kernel block
    padding_start,  # bytes from the start of a row
    padding_bytes,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes to which everything is aligned in the blocks
    ROW_ALIGN: tl.constexpr,  # and in the rows
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_SIZE, rounded up to a power of two
    TOKENS: tl.constexpr,
    SLABS: tl.constexpr,
):
    dim = tl.arange(0, DIMS)[None, None, :]
    for first in range(tl.program_id(0) * SLABS, num_slabs, tl.num_programs(0) * SLABS):
        index, slab, inside, block, row = _slabs(first, slabs, moves, num_slabs, slabs_per_row, SLABS)
        amax = tl.zeros([SLABS], tl.int32)
        for begin in range(0, tokens, TOKENS):
            token = begin + tl.arange(0, TOKENS)[None, :]
            mask = (inside[:, None] & (token < tokens))[:, :, None] & (dim < HEAD_SIZE)
            source = _pointers(slab, block, inside, token, tokens_per_part, PART_STRIDE, TOKEN_STRIDE, DTYPE, ALIGN)
            values = tl.load(source + dim, mask, 0.0)
            magnitude = values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            finite = tl.where(magnitude < 0x7F800000, magnitude, 0)
            amax = tl.maximum(amax, tl.max(tl.max(finite, 2), 1))

        # 448 = 1.75 * 2**8: the exponent is one more where the mantissa is above 1.75.
        exponent = tl.maximum((amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
        scale = row + tl.load(slab + SCALE_START, inside, 0)
        tl.store(scale.to(tl.pointer_type(tl.uint8)), exponent.to(tl.uint8), inside)
        # The first slab of a row clears its padding too: a row's bytes must say nothing of what was there before.
        byte = tl.arange(0, 16)[None, :]
        padding = (row + padding_start).to(tl.pointer_type(tl.uint8))[:, None] + byte
        tl.store(padding, 0, (inside & (index == 0))[:, None] & (byte < padding_bytes))

        start = row + tl.load(slab + ROW_START, inside, 0)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None, None]
        for begin in range(0, tokens, TOKENS):
            token = begin + tl.arange(0, TOKENS)[None, :]
            mask = (inside[:, None] & (token < tokens))[:, :, None] & (dim < HEAD_SIZE)
            source = _pointers(slab, block, inside, token, tokens_per_part, PART_STRIDE, TOKEN_STRIDE, DTYPE, ALIGN)
            # Read a second time, but from the cache: the slabs of one program take 16 or 32 KiB.
            values = tl.load(source + dim, mask, 0.0)
            target = _pointers(
                slab, start, inside, token, tokens_per_part, ROW_PART_STRIDE, ROW_TOKEN_STRIDE, tl.uint8, ROW_ALIGN
            )
            tl.store(target + dim, _to_e4m3(values.to(tl.float32) * inverse), mask)


@triton.jit(do_not_specialize=["num_slabs", "slabs_per_row", "tokens", "tokens_per_part"])
def scatter_slabs(
    slabs,
    moves,
    angles,  # float32 [2, HALF]: cosines, sines
    num_slabs,
    slabs_per_row,
    tokens,
    tokens_per_part,
    DTYPE: tl.constexpr,
    LARGEST: tl.constexpr,  # finite value of DTYPE
    ALIGN: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    FP8: tl.constexpr,  # rows hold codes, else values
    NEOX: tl.constexpr,  # style of the rotation
    FIRST: tl.constexpr,  # rotated element of a head
    HALF: tl.constexpr,  # of the rotated elements; 0: no rotation
    HALF_DIMS: tl.constexpr,  # HALF, rounded up to a power of two
    REST: tl.constexpr,  # elements that are not rotated
    REST_DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLABS: tl.constexpr,
):
    STORED: tl.constexpr = tl.uint8 if FP8 else DTYPE
    for first in range(tl.program_id(0) * SLABS, num_slabs, tl.num_programs(0) * SLABS):
        _, slab, inside, block, row = _slabs(first, slabs, moves, num_slabs, slabs_per_row, SLABS)
        start = row + tl.load(slab + ROW_START, inside, 0)
        scale = _scale(slab, row, inside, FP8)
        for begin in range(0, tokens, TOKENS):
            token = begin + tl.arange(0, TOKENS)[None, :]
            some = (inside[:, None] & (token < tokens))[:, :, None]
            source = _pointers(
                slab, start, inside, token, tokens_per_part, ROW_PART_STRIDE, ROW_TOKEN_STRIDE, STORED, ROW_ALIGN
            )
            target = _pointers(slab, block, inside, token, tokens_per_part, PART_STRIDE, TOKEN_STRIDE, DTYPE, ALIGN)
            if REST > 0:
                number = tl.arange(0, REST_DIMS)
                dim = tl.where(number < FIRST, number, number + 2 * HALF)[None, None, :]
                mask = some & (number < REST)[None, None, :]
                tl.store(target + dim, _values(source + dim, mask, scale, FP8, LARGEST).to(DTYPE), mask)
            if HALF > 0:
                pair = tl.arange(0, HALF_DIMS)
                c = tl.load(angles + pair, pair < HALF, 0.0)[None, None, :]
                s = tl.load(angles + HALF + pair, pair < HALF, 0.0)[None, None, :]
                turns = (tl.load(slab + IS_KEY, inside, 0) != 0)[:, None, None]
                if NEOX:
                    dim = FIRST + pair[None, None, :]
                    mask = some & (pair < HALF)[None, None, :]
                    x1 = _values(source + dim, mask, scale, FP8, LARGEST)
                    x2 = _values(source + (dim + HALF), mask, scale, FP8, LARGEST)
                    y1, y2 = _turn(x1, x2, c, s, turns, DTYPE)
                    tl.store(target + dim, y1, mask)
                    tl.store(target + (dim + HALF), y2, mask)
                else:
                    dim = tl.arange(0, 2 * HALF_DIMS)
                    mask = some & (dim < 2 * HALF)[None, None, :]
                    dim = FIRST + dim[None, None, :]
                    x = _values(source + dim, mask, scale, FP8, LARGEST)
                    x1, x2 = tl.split(tl.reshape(x, [SLABS, TOKENS, HALF_DIMS, 2]))
                    y1, y2 = _turn(x1, x2, c, s, turns, DTYPE)
                    y = tl.reshape(tl.join(y1, y2), [SLABS, TOKENS, 2 * HALF_DIMS])
                    tl.store(target + dim, y, mask)


@triton.jit
def _slabs(first, slabs, moves, num_slabs, slabs_per_row, SLABS: tl.constexpr):
    """A program's next slabs: number in the row, line of the table, existence, start of the block and of the row."""
    number = first + tl.arange(0, SLABS)
    inside = number < num_slabs
    row = number // slabs_per_row
    index = number - row * slabs_per_row
    slab = slabs + index.to(tl.int64) * COLUMNS
    block_id = tl.load(moves + row * 2, inside, 0)
    block = tl.load(slab + BASE, inside, 0) + block_id * tl.load(slab + BLOCK_STRIDE, inside, 0)
    return index, slab, inside, block, tl.load(moves + row * 2 + 1, inside, 0)


@triton.jit
def _pointers(
    slab,
    start,
    inside,
    token,
    tokens_per_part,
    PARTS: tl.constexpr,
    STRIDES: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """To the heads of tokens: [SLABS, TOKENS, 1]. The hint is what makes wide accesses of them."""
    part = token // tokens_per_part
    within = (token - part * tokens_per_part).to(tl.int64)
    part_stride = tl.load(slab + PARTS, inside, 0)[:, None]
    token_stride = tl.load(slab + STRIDES, inside, 0)[:, None]
    address = start[:, None] + part.to(tl.int64) * part_stride + within * token_stride
    return tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), [ALIGN, ALIGN])[:, :, None]


@triton.jit
def _scale(slab, row, inside, FP8: tl.constexpr):
    if FP8:
        at = row + tl.load(slab + SCALE_START, inside, 0)
        exponent = tl.load(at.to(tl.pointer_type(tl.uint8)), inside, 1)
        scale = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)[:, None, None]
    else:
        scale = 1.0
    return scale


@triton.jit
def _values(pointers, mask, scale, FP8: tl.constexpr, LARGEST: tl.constexpr):
    """From a row: decoded to float32, or as they are."""
    values = tl.load(pointers, mask, 0)
    if FP8:
        values = _from_e4m3(values) * scale
        # Comparisons with NaN are false, and it stays.
        values = tl.where(values > LARGEST, LARGEST, tl.where(values < -LARGEST, -LARGEST, values))
    return values


@triton.jit
def _turn(x1, x2, c, s, turns, DTYPE: tl.constexpr):
    """Rotated where ``turns``, else as it was."""
    a, b = x1.to(tl.float32), x2.to(tl.float32)
    y1 = tl.where(turns, (a * c - b * s).to(DTYPE), x1.to(DTYPE))
    y2 = tl.where(turns, (b * c + a * s).to(DTYPE), x2.to(DTYPE))
    return y1, y2


@triton.jit
def _to_e4m3(x):
    """float32 of at most 448, or not finite, to codes as uint8; to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Adding 2**14 leaves 2**-9, the distance of subnormal codes, as the last bit of the mantissa.
    subnormal = ((magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)) - 0x46800000
    # Other bias of the exponent (7 - 127), and half of the last bit that stays.
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    code = tl.where(magnitude < (121 << 23), subnormal, normal)
    code = tl.where(magnitude < 0x7F800000, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _from_e4m3(code):
    """Codes to float32."""
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)  # 2**-9
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    # Not -value: in Triton 3.6 that is 0 - value, which loses the sign of zero.
    return tl.where(code >= 0x80, -1.0, 1.0) * value


SIGNATURE = {
    "slabs": "*i64",
    "moves": "*i64",
    "num_slabs": "i32",
    "slabs_per_row": "i32",
    "tokens": "i32",
    "tokens_per_part": "i32",
}
ENCODE_SIGNATURE = SIGNATURE | {"padding_start": "i32", "padding_bytes": "i32"}
SCATTER_SIGNATURE = SIGNATURE | {"angles": "*fp32"}
