"""Gather and scatter of whole blocks on a GPU: one launch for all layers, one kernel for every layout.

A block of a plane is a number of contiguous *runs* (one, where the block is contiguous), and it is copied
in *tiles* of ``UNITS`` units of up to 16 bytes. All tiles of all planes stand in a table on the device; a
program takes ``TILES`` of them at a time, whatever planes and blocks they belong to, and goes on with the
next that are left. So the grid may be as small as one wants, and small planes fill it as well as large ones.

Where a chunk's rows lie is a table of addresses too: rows of a staging buffer, or rows of page-locked host
memory, which the kernel then reads or writes over the link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .planes import block_bytes, plane_bytes
from .uploads import Uploads

LAUNCH = {"num_warps": 16, "maxnreg": 128}
"""All the registers that 512 threads can have. Left to itself, ptxas saves some for a second program on the SM, which
is not there, and spills (``benchmarks.kernel_report``)."""
UNITS = tl.constexpr(128)
TILES = tl.constexpr(16)
"""16 warps with four units of 16 bytes per thread: 32 KiB are on their way per program, so that eight programs
cover 8 * 32 KiB / 0.7 us = 370 GB/s at a latency of 0.7 us, several times a PCIe 5 link's 55 GB/s. Arithmetic, not
a measurement."""

# Columns of the table of planes, int64; sizes and strides are in bytes.
BASE = tl.constexpr(0)
BLOCK_STRIDE = tl.constexpr(1)
BLOCK_BYTES = tl.constexpr(2)
ROW_START = tl.constexpr(3)
RUN_BYTES = tl.constexpr(4)
DIMS_BEGIN = tl.constexpr(5)  # then size and stride of each dimension outside a run, innermost first


@triton.jit(do_not_specialize=["num_tiles", "tiles_per_row"])
def copy_blocks(
    planes,
    columns: tl.constexpr,
    tiles,  # int32 [tiles_per_row, 2]: plane, first unit
    moves,  # int64 [rows, 2]: block id, address of the row
    num_tiles,  # rows * tiles_per_row
    tiles_per_row,
    VEC: tl.constexpr,  # bytes of a unit: 16, 8, 4, 2 or 1; everything is aligned to it
    DIMS: tl.constexpr,  # dimensions outside a run
    TO_ROWS: tl.constexpr,  # gather, else scatter
):
    LANES: tl.constexpr = VEC // 4 if VEC >= 4 else 1
    for first in range(tl.program_id(0) * TILES, num_tiles, tl.num_programs(0) * TILES):
        number = first + tl.arange(0, TILES)
        inside = number < num_tiles
        row = number // tiles_per_row
        tile = number - row * tiles_per_row
        plane = planes + tl.load(tiles + tile * 2, inside, 0).to(tl.int64) * columns
        unit = tl.load(tiles + tile * 2 + 1, inside, 0)[:, None] + tl.arange(0, UNITS)[None, :]
        units = tl.load(plane + BLOCK_BYTES, inside, 0) // VEC
        mask = inside[:, None] & (unit < units[:, None])

        row_address = tl.load(moves + row * 2 + 1, inside, 0) + tl.load(plane + ROW_START, inside, 0)
        at_row = row_address[:, None] + unit.to(tl.int64) * VEC

        block = tl.load(moves + row * 2, inside, 0)
        block_address = tl.load(plane + BASE, inside, 0) + block * tl.load(plane + BLOCK_STRIDE, inside, 0)
        if DIMS == 0:
            at_block = block_address[:, None] + unit.to(tl.int64) * VEC
        else:
            run = (tl.load(plane + RUN_BYTES, inside, VEC) // VEC).to(tl.int32)[:, None]
            outer = unit // run
            at_block = block_address[:, None] + (unit - outer * run).to(tl.int64) * VEC
            for dim in tl.static_range(DIMS):
                size = tl.load(plane + DIMS_BEGIN + 2 * dim, inside, 1).to(tl.int32)[:, None]
                stride = tl.load(plane + DIMS_BEGIN + 2 * dim + 1, inside, 0)[:, None]
                further = outer // size
                at_block += (outer - further * size).to(tl.int64) * stride
                outer = further

        source = at_block if TO_ROWS else at_row
        target = at_row if TO_ROWS else at_block
        lane = tl.arange(0, LANES)[None, None, :]
        values = tl.load(_units(source, VEC)[:, :, None] + lane, mask[:, :, None])
        tl.store(_units(target, VEC)[:, :, None] + lane, values, mask[:, :, None])


@triton.jit
def _units(address, VEC: tl.constexpr):
    """Addresses as pointers to the words of a unit. The hint is what makes one access of them."""
    if VEC >= 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    elif VEC == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    return tl.multiple_of(pointer, [VEC, VEC])


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. There are five widths, and DIMS is even: few in all, one or two per model."""

    vec: int
    dims: int
    to_rows: bool

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"columns": columns(self.dims), "VEC": self.vec, "DIMS": self.dims, "TO_ROWS": self.to_rows}


SIGNATURE = {
    "planes": "*i64",
    "tiles": "*i32",
    "moves": "*i64",
    "num_tiles": "i32",
    "tiles_per_row": "i32",
}


class GpuCopy:
    """The tables of one set of planes, made once; launches on torch's current stream."""

    def __init__(self, planes: Sequence[Tensor]) -> None:
        self._planes = list(planes)  # the tables hold their addresses
        self._device = planes[0].device
        self._row_bytes = block_bytes(planes)
        self._uploads = Uploads(self._device)
        self._shapes = [runs_of(plane) for plane in planes]
        self.dims = max(len(outer) for _, outer in self._shapes)
        self.dims += self.dims % 2
        table = self._table()
        self._alignment = _alignment(table)
        self._table_on_device = table.to(self._device)
        self._tiles: dict[int, Tensor] = {}

    def gather(self, block_ids: Sequence[int], out: Tensor, rows: Sequence[int], num_programs: int) -> None:
        self._launch(block_ids, out, rows, num_programs, True)

    def scatter(self, chunk: Tensor, block_ids: Sequence[int], rows: Sequence[int], num_programs: int) -> None:
        self._launch(block_ids, chunk, rows, num_programs, False)

    def warm_up(self) -> None:
        """Compiles what chunks of torch's own memory need, by launches that copy nothing."""
        row = torch.empty(1, self._row_bytes, dtype=torch.uint8, device=self._device)
        self._launch([], row, [], 1, True)
        self._launch([], row, [], 1, False)

    def variant(self, chunk: Tensor, to_rows: bool) -> Variant:
        vec = lowest_bit(self._alignment | chunk.data_ptr() | chunk.stride(0))
        return Variant(vec, self.dims, to_rows)

    def _launch(
        self, block_ids: Sequence[int], chunk: Tensor, rows: Sequence[int], num_programs: int, to_rows: bool
    ) -> None:
        variant = self.variant(chunk, to_rows)
        tiles = self._tiles_of(variant.vec)
        num_tiles = len(block_ids) * len(tiles)
        grid = (max(1, min(num_programs, triton.cdiv(num_tiles, TILES.value))),)
        copy_blocks[grid](
            self._table_on_device,
            tiles=tiles,
            moves=self._uploads.moves(block_ids, chunk, rows),
            num_tiles=num_tiles,
            tiles_per_row=len(tiles),
            **LAUNCH,
            **variant.constants,
        )

    def _table(self) -> Tensor:
        table = torch.zeros(len(self._planes), columns(self.dims), dtype=torch.int64)
        row_start = 0
        for line, plane, (run_bytes, outer) in zip(table, self._planes, self._shapes, strict=True):
            dims = [number for dim in outer for number in dim] + [1, 0] * (self.dims - len(outer))
            block_stride = plane.stride(0) * plane.element_size()
            head = [plane.data_ptr(), block_stride, plane_bytes(plane), row_start, run_bytes]
            line.copy_(torch.tensor(head + dims, dtype=torch.int64))
            row_start += plane_bytes(plane)
        return table

    def _tiles_of(self, vec: int) -> Tensor:
        if vec not in self._tiles:
            step = UNITS.value
            tiles = [
                (number, unit)
                for number, plane in enumerate(self._planes)
                for unit in range(0, plane_bytes(plane) // vec, step)
            ]
            self._tiles[vec] = torch.tensor(tiles, dtype=torch.int32).to(self._device)
        return self._tiles[vec]


def columns(dims: int) -> int:
    return DIMS_BEGIN.value + 2 * dims


def runs_of(plane: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of a contiguous run of a block, and size and stride in bytes of the dimensions outside it, innermost first.

    Dimensions that step evenly into each other count as one.
    """
    run_bytes = width = plane.element_size()
    outer: list[tuple[int, int]] = []
    for size, stride in reversed(list(zip(plane.shape[1:], plane.stride()[1:], strict=True))):
        stride_bytes = stride * width
        if size == 1:
            continue
        if not outer and stride_bytes == run_bytes:
            run_bytes *= size
        elif outer and stride_bytes == outer[-1][0] * outer[-1][1]:
            outer[-1] = (outer[-1][0] * size, outer[-1][1])
        else:
            outer.append((size, stride_bytes))
    return run_bytes, outer


def lowest_bit(number: int) -> int:
    """Of addresses, strides and sizes joined by ``|``, with 16 among them: the width that suits them all."""
    return number & -number


def _alignment(table: Tensor) -> int:
    """All addresses, strides and sizes of the table, and 16, joined by ``|``."""
    in_bytes = [BASE.value, BLOCK_STRIDE.value, BLOCK_BYTES.value, ROW_START.value, RUN_BYTES.value]
    strides = range(DIMS_BEGIN.value + 1, table.shape[1], 2)
    joined = 16
    for value in table[:, [*in_bytes, *strides]].flatten().tolist():
        joined |= value
    return joined
