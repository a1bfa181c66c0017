"""Conversions between float32 and the formats of KV, for loops that Numba compiles.

Numba widens integer arithmetic to 64 bits; the casts keep it at 32, which doubles what a vector instruction does.
"""

from __future__ import annotations

import numpy as np

from .cpu_jit import njit

F32, U8, U16, U32 = np.float32, np.uint8, np.uint16, np.uint32

_inlined = njit(inline="always")


@_inlined
def clamp(x, largest):
    """Comparisons with NaN are false, and it stays."""
    return largest if x > largest else (-largest if x < -largest else x)


@_inlined
def as_float(bits):
    return U32(bits).view(F32)


@_inlined
def as_bits(x):
    return F32(x).view(U32)


@_inlined
def to_e4m3(x):
    """float32 of at most 448, or not finite; to nearest, ties to even. As in ``gpu_heads``."""
    bits = as_bits(x)
    magnitude = U32(bits & U32(0x7FFFFFFF))
    subnormal = U32(as_bits(as_float(magnitude) + F32(16384.0)) - U32(0x46800000))
    odd = U32(U32(magnitude >> U32(20)) & U32(1))
    normal = U32(U32(U32(magnitude - U32((120 << 23) - 0x7FFFF)) + odd) >> U32(20))
    code = subnormal if magnitude < U32(121 << 23) else normal
    code = U32(0x7F) if magnitude >= U32(0x7F800000) else code
    return U8(U32(code | U32(U32(bits >> U32(24)) & U32(0x80))))


@_inlined
def from_e4m3(code):
    magnitude = U32(U32(code) & U32(0x7F))
    normal = as_float(U32(U32(magnitude << U32(20)) + U32(120 << 23)))
    value = F32(magnitude) * F32(2.0**-9) if magnitude < U32(8) else normal
    value = F32(np.nan) if magnitude == U32(0x7F) else value
    return -value if U32(code) >= U32(0x80) else value


@_inlined
def from_bfloat16(bits):
    return as_float(U32(bits) << U32(16))


@_inlined
def to_bfloat16(x):
    bits = as_bits(x)
    odd = U32(U32(bits >> U32(16)) & U32(1))
    rounded = U32(U32(U32(bits + U32(0x7FFF)) + odd) >> U32(16))
    return U16(U32(0x7FC0) if x != x else rounded)


@_inlined
def from_float16(bits):
    magnitude = U32(U32(bits) & U32(0x7FFF))
    # float32 with the same fields has an exponent that is too small by 127 - 15; its subnormals become right too.
    value = as_float(U32(magnitude << U32(13))) * F32(2.0**112)
    value = as_float(U32(U32(magnitude << U32(13)) | U32(0x7F800000))) if magnitude >= U32(0x7C00) else value
    return as_float(U32(as_bits(value) | U32(U32(U32(bits) & U32(0x8000)) << U32(16))))


@_inlined
def to_float16(x):
    bits = as_bits(x)
    magnitude = U32(bits & U32(0x7FFFFFFF))
    # Adding 2**-1 leaves 2**-24, the distance of subnormal values, as the last bit of the mantissa.
    subnormal = U32(as_bits(as_float(magnitude) + F32(0.5)) - U32(0x3F000000))
    odd = U32(U32(magnitude >> U32(13)) & U32(1))
    normal = U32(U32(U32(magnitude - U32((112 << 23) - 0xFFF)) + odd) >> U32(13))
    half = subnormal if magnitude < U32(113 << 23) else normal
    half = U32(0x7C00) if magnitude >= U32(0x477FF000) else half
    half = U32(0x7E00) if magnitude > U32(0x7F800000) else half
    return U16(U32(half | U32(U32(bits >> U32(16)) & U32(0x8000))))
