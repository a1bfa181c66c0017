"""How one block lies in a row of a chunk.

    exact   plane after plane, each as it lies in memory where it is one piece, else in the order of its shape
    fp8     the same with one e4m3 byte per element, then one byte of scale per head, then padding

The strides between blocks and layers leave no trace in a row, the order within a block does: it is part of
``describe_planes``, and so of the identity under which KV is kept. Each row stands for itself, so rows can
be kept, dropped and loaded singly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .heads import HeadView
from .planes import plane_bytes

ROW_ALIGNMENT = 16  # bytes; the widest access of a GPU


@dataclass(frozen=True)
class RowLayout:
    row_bytes: int
    padding_start: int
    """Where the row's data end. Behind them are zeros."""
    plane_starts: tuple[int, ...]
    """Bytes from the row's start to each plane's part."""
    scale_starts: tuple[int, ...] | None
    """fp8: bytes from the row's start to each head view's scales, one byte per head."""

    def values(self, row: Tensor, head: HeadView) -> Tensor:
        """A head view's part of one row: e4m3 bytes or values, ``[k, num_heads, tokens, head_size]``, not copied.

        Args:
            row: uint8 ``[row_bytes]``.
        """
        part = row[self.plane_starts[head.plane] :]
        if self.scale_starts is None:
            size = head.view.element_size()
            part = part[: len(part) // size * size].view(head.view.dtype)
        offset = part.storage_offset() + head.row.storage_offset()
        return part.as_strided(head.row.shape, head.row.stride(), offset)

    def scales(self, row: Tensor, number: int, head: HeadView) -> Tensor:
        """Of head view ``number``: uint8 ``[num_heads]``."""
        assert self.scale_starts is not None
        return row[self.scale_starts[number] :][: head.view.shape[2]]


def exact_rows(planes: Sequence[Tensor]) -> RowLayout:
    starts = _starts([plane_bytes(plane) for plane in planes])
    return RowLayout(starts[-1], starts[-1], starts[:-1], None)


def fp8_rows(planes: Sequence[Tensor], heads: Sequence[HeadView]) -> RowLayout:
    """Raises ValueError where the head views do not cover the planes."""
    check_coverage(planes, heads)
    starts = _starts([math.prod(plane.shape[1:]) for plane in planes])
    scales = _starts([head.view.shape[2] for head in heads], starts[-1])
    padded = -(-scales[-1] // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return RowLayout(padded, scales[-1], starts[:-1], scales[:-1])


def check_coverage(planes: Sequence[Tensor], heads: Sequence[HeadView]) -> None:
    held = [0] * len(planes)
    for head in heads:
        held[head.plane] += head.row.numel()
    if held != [math.prod(plane.shape[1:]) for plane in planes]:
        raise ValueError("the head views do not cover the planes: both must come from the same KV caches")


def _starts(sizes: Sequence[int], begin: int = 0) -> tuple[int, ...]:
    starts = [begin]
    for size in sizes:
        starts.append(starts[-1] + size)
    return tuple(starts)
