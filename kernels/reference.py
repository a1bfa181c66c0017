"""What the kernels must equal, in plain torch: one block after another, and no care for speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fp8
from .heads import HeadView
from .planes import plane_bytes
from .rotary import RotaryShift
from .rows import RowLayout


def gather_reference(planes: Sequence[Tensor], block_ids: Sequence[int], out: Tensor) -> None:
    """What a gather must equal: ``out[i]`` is block ``block_ids[i]``, plane after plane."""
    for row, block in enumerate(block_ids):
        parts = [plane[block].contiguous().reshape(-1).view(torch.uint8) for plane in planes]
        out[row].copy_(torch.cat(parts))


def scatter_reference(chunk: Tensor, planes: Sequence[Tensor], block_ids: Sequence[int]) -> None:
    """What a scatter must equal."""
    for row, block in enumerate(block_ids):
        parts = chunk[row].split([plane_bytes(plane) for plane in planes])
        for plane, part in zip(planes, parts, strict=True):
            plane[block].copy_(part.clone().view(plane.dtype).view(plane.shape[1:]))


def gather_fp8_reference(heads: Sequence[HeadView], layout: RowLayout, block_ids: Sequence[int], out: Tensor) -> None:
    """What a gather with fp8 must equal, bit for bit."""
    for row, block in enumerate(block_ids):
        out[row, layout.padding_start :] = 0
        for number, head in enumerate(heads):
            codes, exponents = encode(head.view[block])
            layout.values(out[row], head).copy_(codes)
            layout.scales(out[row], number, head).copy_(exponents)


def scatter_heads_reference(
    chunk: Tensor,
    heads: Sequence[HeadView],
    layout: RowLayout,
    block_ids: Sequence[int],
    shift: RotaryShift | None = None,
) -> None:
    """What a scatter with an fp8 layout or a shift must equal; a shifted K within its bound, all else exactly."""
    for row, block in enumerate(block_ids):
        for number, head in enumerate(heads):
            values = layout.values(chunk[row], head)
            if layout.scale_starts is not None:
                values = decode(values, layout.scales(chunk[row], number, head), head.view.dtype)
            target = head.view[block]
            target.copy_(values)
            if shift is not None and head.is_key:
                exact = rotate(values.to(torch.float64), shift)
                for turned, result in zip(shift.pairs(target), shift.pairs(exact), strict=True):
                    turned.copy_(result.to(torch.float32))


def encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of values ``[k, num_heads, tokens, head_size]``: e4m3 codes as uint8, E8M0 exponents ``[num_heads]``."""
    values = values.to(torch.float64)
    finite = torch.where(values.isfinite(), values, 0.0)
    amax = finite.abs().amax(dim=(0, 2, 3))
    fraction, exponent = torch.frexp(amax / fp8.MAX_CODE)  # fraction in [0.5, 1): a power of two has 0.5
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    exponent = torch.where(amax == 0, -127, exponent)
    exponents = (exponent + 127).clamp(fp8.MIN_EXPONENT, fp8.MAX_EXPONENT)
    scaled = values / fp8.scale_of(exponents)[:, None, None]
    codes = scaled.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    nan = torch.where(values.signbit(), 0xFF, 0x7F).to(torch.uint8)
    return torch.where(values.isfinite(), codes, nan), exponents.to(torch.uint8)


def decode(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes uint8 ``[k, num_heads, tokens, head_size]`` to float32 values within ``dtype``'s finite range."""
    values = codes.contiguous().view(torch.float8_e4m3fn).to(torch.float64)
    largest = torch.finfo(dtype).max
    return (values * fp8.scale_of(exponents)[:, None, None]).clamp(-largest, largest).to(torch.float32)


def rotate(heads: Tensor, shift: RotaryShift) -> Tensor:
    """Heads ``[..., head_size]`` after the shift, in their dtype."""
    result = heads.clone()
    first, second = shift.pairs(heads)
    cos, sin = shift.cos.to(heads), shift.sin.to(heads)  # dtype and device
    turned = shift.pairs(result)
    turned[0].copy_(first * cos - second * sin)
    turned[1].copy_(second * cos + first * sin)
    return result
