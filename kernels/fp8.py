"""The fp8 form of KV: e4m3 codes under one power-of-two scale per layer, K or V, head and row of a chunk.

    scale = the smallest 2**n, n >= -126, with amax <= 448 * scale      448 is e4m3's largest value
    code  = e4m3(x / scale), rounded to nearest, ties to even
    x'    = code * scale, in the KV cache's dtype

``amax`` is taken over the finite values; infinities and NaNs become NaN. A scale is stored as E8M0, its
biased exponent in one byte (both formats: OCP Microscaling Formats 1.0, sections 5.3.1 and 5.4.1).

Error bound, with ``amax`` and ``scale`` of the head's row:

    |x' - x| <= max(|x| * 2**-4, scale * 2**-10) + floor,    scale < amax / 224 or scale = 2**-126

- ``x / scale`` and ``code * scale`` are exact in float32, since the scale is a power of two. (A quotient
  below 2**-126 may be rounded; its code is 0 either way.)
- e4m3 has 3 stored bits of mantissa: in [2**e, 2**(e+1)) its values lie 2**(e-3) apart, and the nearest is at most
  2**(e-4) <= 2**-4 * |x / scale| away. Below its smallest normal value 2**-6 they lie 2**-9 apart, so at
  most 2**-10 away. Nothing saturates, since |x / scale| <= 448.
- The result has 4 significant bits, and bfloat16, float16 and float32 hold at least 8. It is rounded only
  among their subnormal values: ``floor`` is half of the smallest, 2**-134 and 2**-25, and 0 for float32.
  Where rounding upwards leaves the dtype's range, the largest finite value stands instead; it is nearer to x.

Since a decoded value has a code without error under its own scale and under half of it, encoding what was decoded
gives the same values again: saving and loading many times loses no more than once.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CODE = 448.0
MIN_EXPONENT, MAX_EXPONENT = 1, 248  # biased by 127: 2**-126, and the scale of float32's largest value

FLOOR = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 0.0}


def scale_of(exponents: Tensor) -> Tensor:
    """E8M0 to float64; made of bits, since a GPU's ``exp2`` may be off by the last one."""
    return ((exponents.to(torch.int64) + (1023 - 127)) << 52).view(torch.float64)


def error_bound(values: Tensor, scale: Tensor) -> Tensor:
    """The bound above in float64, element by element, for finite values; ``scale`` broadcasts to them."""
    magnitude = values.to(torch.float64).abs()
    return torch.maximum(magnitude * 2**-4, scale * 2**-10) + FLOOR[values.dtype]
