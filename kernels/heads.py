"""Where the heads of K and V stand in the registered KV caches.

A plain copy needs no such knowledge. What looks at values does: the fp8 store has a scale per head, a
rotary shift concerns K alone. A *head view* has every layout in one form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .planes import halves, memory_of, memory_order

Order = Literal["NHD", "HND"]


@dataclass(frozen=True)
class HeadShape:
    """What vLLM's KV cache spec says of a layer.

    ``order`` is the order of the dimensions *as the tensor is registered*: tokens before heads (NHD) or
    after them (HND). Strides are another matter, and the tensor knows them. MLA: one head, whose size
    is the latent's plus the rotary part's.
    """

    num_heads: int
    head_size: int
    order: Order = "HND"
    head_size_v: int | None = None
    """Where V's heads differ in size from K's."""


@dataclass(frozen=True)
class HeadView:
    """K or V of one layer."""

    view: Tensor  # [num_blocks, k, num_heads, tokens, head_size], shares memory with the plane
    is_key: bool
    plane: int
    """Which of ``planes_of``."""
    row: Tensor
    """A tensor without memory (device ``meta``), ``[k, num_heads, tokens, head_size]``: its strides and its
    storage offset, in elements, say where the same values stand in the plane's part of a chunk's row."""


def heads_of(kv_caches: Sequence[Tensor], num_blocks: int, shapes: HeadShape | Sequence[HeadShape]) -> list[HeadView]:
    """Head views of the caches that ``planes_of`` makes planes of.

    Args:
        kv_caches, num_blocks: as in ``planes_of``. One block of a cache, or of its K or V half, must be, with
            tokens N and heads H in the order that the shape says: ``[N, H, D]`` (K and V apart),
            ``[2, N, H, D]``, ``[N, H, D + D_v]``, or ``[N, D]`` (MLA).
        shapes: one for all caches, or one per cache.

    Raises:
        ValueError: a cache has another shape, no floating-point elements of 16 or 32 bits, or elements of a
            head that lie apart.
    """
    per_cache = [shapes] * len(kv_caches) if isinstance(shapes, HeadShape) else list(shapes)
    views: list[HeadView] = []
    planes: dict[tuple, None] = {}
    for position, (cache, shape) in enumerate(zip(kv_caches, per_cache, strict=True)):
        for plane, part in halves(cache, num_blocks, position):
            if (key := memory_of(plane)) in planes:
                continue
            row = _row_of(plane)
            parts = zip(_split(plane, part, shape, position), _split(row, part, shape, position), strict=True)
            views += [HeadView(view, is_key, len(planes), row[0]) for (view, is_key), (row, _) in parts]
            planes[key] = None
    return views


def _row_of(plane: Tensor) -> Tensor:
    """One block as a row holds it, ``[1, *plane.shape[1:]]``: without memory, and with the row's strides."""
    order = memory_order(plane)
    row = torch.empty((1, *(plane.shape[dim] for dim in order)), dtype=plane.dtype, device="meta")
    return row.permute(0, *(1 + order.index(dim) for dim in range(1, plane.dim())))


def _split(tensor: Tensor, part: int | None, shape: HeadShape, position: int) -> Iterator[tuple[Tensor, bool]]:
    """K, V or both as ``[num_blocks, k, num_heads, tokens, size]``, and whether it is K."""
    sizes = (shape.head_size, shape.head_size if shape.head_size_v is None else shape.head_size_v)
    rest = tuple(tensor.shape[2:])
    if part is not None:
        pieces = [(tensor, part == 0, sizes[part])]
    elif len(rest) == 2 and shape.num_heads == 1 and rest[-1] == shape.head_size:
        pieces = [(tensor.unsqueeze(2 if shape.order == "HND" else 3), True, shape.head_size)]
    elif len(rest) == 4 and rest[0] == 2:
        pieces = [(tensor[:, :, 0], True, sizes[0]), (tensor[:, :, 1], False, sizes[1])]
    elif len(rest) == 3 and rest[-1] == sum(sizes):
        key, value = tensor.split(sizes, dim=-1)
        pieces = [(key, True, sizes[0]), (value, False, sizes[1])]
    else:
        pieces = []
    ordered = [(piece if shape.order == "HND" else piece.transpose(2, 3), is_key) for piece, is_key, _ in pieces]
    fits = [
        view.dim() == 5 and view.shape[2] == shape.num_heads and view.shape[4] == size
        for (view, _), (_, _, size) in zip(ordered, pieces, strict=True)
    ]
    if not fits or not all(fits):
        raise ValueError(
            f"KV cache {position}: one kernel block has the shape {list(rest)}, which does not hold "
            f"{shape.num_heads} heads of {' and '.join(map(str, dict.fromkeys(sizes)))} in the order {shape.order}"
        )
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"KV cache {position} holds {tensor.dtype}; only bfloat16, float16 and float32 can be encoded or rotated"
        )
    if tensor.stride(-1) != 1:
        raise ValueError(f"KV cache {position}: the elements of a head do not lie side by side")
    yield from ordered
