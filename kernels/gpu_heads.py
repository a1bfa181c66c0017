"""Gather with fp8 encoding, and scatter with fp8 decoding and rotary shifts, on a GPU: one pass over the data.

The piece of work is a *slab*: one head of K or V of one block, ``[tokens, head_size]``. All slabs of all
layers stand in a table on the device; a program takes several at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_copy import LAUNCH, lowest_bit
from .head_kernels import (
    BASE,
    BLOCK_STRIDE,
    IS_KEY,
    PART_STRIDE,
    ROW_PART_STRIDE,
    ROW_START,
    ROW_TOKEN_STRIDE,
    TOKEN_STRIDE,
    encode_slabs,
    scatter_slabs,
)
from .heads import HeadView
from .rotary import RotaryShift
from .rows import RowLayout
from .uploads import Uploads

ENCODED_ELEMENTS = 8192
SCATTERED_BYTES = 32768
"""What a program takes at a time: 16 elements per thread, or 64 bytes. With twice as many, registers are spilled
(``benchmarks.kernel_report``)."""


@dataclass(frozen=True)
class SlabShape:
    """What slabs must have in common to share a launch."""

    dtype: torch.dtype
    parts: int
    tokens_per_part: int
    head_size: int

    def _tile(self, elements: int) -> dict[str, Any]:
        """TOKENS and SLABS: how many of both make so many elements."""
        dims = triton.next_power_of_2(self.head_size)
        tokens = min(triton.next_power_of_2(self.parts * self.tokens_per_part), max(1, elements // dims))
        return {
            "DTYPE": getattr(tl, str(self.dtype).removeprefix("torch.")),
            "TOKENS": tokens,
            "SLABS": max(1, elements // (dims * tokens)),
        }

    def encode_constants(self, align: int, row_align: int) -> dict[str, Any]:
        dims = triton.next_power_of_2(self.head_size)
        sizes = {"ALIGN": align, "ROW_ALIGN": row_align, "HEAD_SIZE": self.head_size, "DIMS": dims}
        return self._tile(ENCODED_ELEMENTS) | sizes

    def scatter_constants(self, align: int, row_align: int, fp8: bool, shift: RotaryShift | None) -> dict[str, Any]:
        half = len(shift.cos) if shift else 0
        rest = self.head_size - 2 * half
        return self._tile(SCATTERED_BYTES // self.dtype.itemsize) | {
            "LARGEST": torch.finfo(self.dtype).max,
            "ALIGN": align,
            "ROW_ALIGN": row_align,
            "FP8": fp8,
            "NEOX": shift is None or shift.style == "neox",
            "FIRST": shift.first_dim if shift else self.head_size,
            "HALF": half,
            "HALF_DIMS": triton.next_power_of_2(half) if half else 1,
            "REST": rest,
            "REST_DIMS": triton.next_power_of_2(rest) if rest else 1,
        }


class GpuHeads:
    """The tables of one set of head views, made once; launches on torch's current stream."""

    def __init__(self, heads: Sequence[HeadView], layout: RowLayout) -> None:
        self._heads = list(heads)  # the tables hold their addresses
        self._device = heads[0].view.device
        self._uploads = Uploads(self._device)
        self._layout, self._fp8 = layout, layout.scale_starts is not None
        self._no_angles = torch.zeros(2, 1).to(self._device)  # never read, and not to be sent with every load
        lines: dict[SlabShape, list[list[int]]] = {}
        for number, head in enumerate(heads):
            _, parts, _, tokens, head_size = head.view.shape
            shape = SlabShape(head.view.dtype, parts, tokens, head_size)
            lines.setdefault(shape, []).extend(_slab_lines(number, head, layout))
        self._with_keys = {shape for shape, table in lines.items() if any(line[IS_KEY.value] for line in table)}
        self._alignments = {shape: _alignment(table) for shape, table in lines.items()}
        self._tables = {
            shape: torch.tensor(table, dtype=torch.int64).to(self._device) for shape, table in lines.items()
        }

    def warm_up(self) -> None:
        """Compiles what chunks of torch's own memory need, shifts aside, by launches that copy nothing."""
        row = torch.empty(1, self._layout.row_bytes, dtype=torch.uint8, device=self._device)
        if self._fp8:
            self.gather([], row, [], 1)
            self.scatter(row, [], [], None, 1)

    def gather(self, block_ids: Sequence[int], out: Tensor, rows: Sequence[int], num_programs: int) -> None:
        """Encodes; only with an fp8 layout."""
        assert self._fp8
        for shape, arguments, aligned in self._launches(block_ids, out, rows):
            constants = shape.encode_constants(*aligned)
            encode_slabs[_grid(arguments, constants, num_programs)](
                **arguments,
                padding_start=self._layout.padding_start,
                padding_bytes=self._layout.row_bytes - self._layout.padding_start,
                **LAUNCH,
                **constants,
            )

    def scatter(
        self,
        chunk: Tensor,
        block_ids: Sequence[int],
        rows: Sequence[int],
        shift: RotaryShift | None,
        num_programs: int,
    ) -> None:
        angles = self._uploads.send(torch.stack([shift.cos, shift.sin])) if shift else self._no_angles
        for shape, arguments, aligned in self._launches(block_ids, chunk, rows):
            turned = shift if shape in self._with_keys else None  # heads of V may be smaller
            constants = shape.scatter_constants(*aligned, self._fp8, turned)
            grid = _grid(arguments, constants, num_programs)
            scatter_slabs[grid](**arguments, angles=angles, **LAUNCH, **constants)

    def _launches(
        self, block_ids: Sequence[int], chunk: Tensor, rows: Sequence[int]
    ) -> Iterator[tuple[SlabShape, dict[str, Any], tuple[int, int]]]:
        """One per shape of slabs, and most models have one: arguments, and alignment of blocks and of rows."""
        moves = self._uploads.moves(block_ids, chunk, rows)
        for shape, table in self._tables.items():
            arguments = {
                "slabs": table,
                "moves": moves,
                "num_slabs": len(block_ids) * len(table),
                "slabs_per_row": len(table),
                "tokens": shape.parts * shape.tokens_per_part,
                "tokens_per_part": shape.tokens_per_part,
            }
            align, row_align = self._alignments[shape]
            row_align = lowest_bit(row_align | chunk.data_ptr() | chunk.stride(0))
            needed = 1 if self._fp8 else shape.dtype.itemsize
            if row_align < needed:
                raise ValueError(f"the rows of the chunk must be aligned to {needed} bytes, not {row_align}")
            yield shape, arguments, (align, row_align)


def _grid(arguments: dict[str, Any], constants: dict[str, Any], num_programs: int) -> tuple[int]:
    return (max(1, min(num_programs, triton.cdiv(arguments["num_slabs"], constants["SLABS"]))),)


def _slab_lines(number: int, head: HeadView, layout: RowLayout) -> list[list[int]]:
    """A head view's lines of the table, one per head."""
    width = head.view.element_size()
    row_width = width if layout.scale_starts is None else 1
    scales = layout.scale_starts[number] if layout.scale_starts is not None else 0
    block_stride, part_stride, head_stride, token_stride, _ = (stride * width for stride in head.view.stride())
    row_part_stride, row_head_stride, row_token_stride, _ = (stride * row_width for stride in head.row.stride())
    row_start = layout.plane_starts[head.plane] + head.row.storage_offset() * row_width
    return [
        [
            head.view.data_ptr() + index * head_stride,
            block_stride,
            part_stride,
            token_stride,
            row_start + index * row_head_stride,
            row_part_stride,
            row_token_stride,
            scales + index,
            int(head.is_key),
        ]
        for index in range(head.view.shape[2])
    ]


def _alignment(table: list[list[int]]) -> tuple[int, int]:
    """To how many bytes everything in the blocks is aligned, and in a row."""
    blocks = rows = 16
    for line in table:
        for column in (BASE, BLOCK_STRIDE, PART_STRIDE, TOKEN_STRIDE):
            blocks |= line[column.value]
        for column in (ROW_START, ROW_PART_STRIDE, ROW_TOKEN_STRIDE):
            rows |= line[column.value]
    return lowest_bit(blocks), lowest_bit(rows)
