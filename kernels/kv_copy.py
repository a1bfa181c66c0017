"""Copies of KV blocks between vLLM's paged cache and contiguous chunks.

A *plane* is a view of one KV cache tensor (or of its K or V half) whose dimension 0 is vLLM's block
id (``planes``). A *chunk* is a uint8 matrix ``[n, row_bytes]``, and ``rows`` says how a block lies in a row. On
the way values may be encoded as fp8 (``fp8``) and K may be moved to other positions (``rotary``).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .heads import HeadView
from .planes import block_bytes, describe_planes, plane_bytes, plane_numbers, planes_of
from .rotary import RotaryShift
from .rows import RowLayout, check_coverage, exact_rows, fp8_rows
from .torch_copy import TorchCopy

if TYPE_CHECKING:
    from .cpu_copy import CpuCopy
    from .cpu_heads import CpuHeads
    from .gpu_copy import GpuCopy
    from .gpu_heads import GpuHeads

__all__ = [
    "DEFAULT_PROGRAMS",
    "BlockCopier",
    "block_bytes",
    "describe_planes",
    "gather_blocks",
    "plane_bytes",
    "plane_numbers",
    "planes_of",
    "scatter_blocks",
]

DEFAULT_PROGRAMS = 8
"""Programs of a kernel, and so the most SMs that it takes; ``gpu_copy`` says why these are enough."""


def gather_blocks(planes: Sequence[Tensor], block_ids: Sequence[int], out: Tensor) -> None:
    """Copies ``planes[:][block_ids[i]]`` to ``out[i]``; ids may repeat.

    Args:
        out: uint8 ``[n, block_bytes]`` on the planes' device; rows may lie apart.
    """
    BlockCopier(planes).gather(block_ids, out)


def scatter_blocks(chunk: Tensor, planes: Sequence[Tensor], block_ids: Sequence[int]) -> None:
    """Copies ``chunk[i]`` to ``planes[:][block_ids[i]]``; ids must differ. Other blocks keep their bytes."""
    BlockCopier(planes).scatter(chunk, block_ids)


class BlockCopier:
    """Gathers and scatters blocks of one set of planes; what can be computed once is computed here.

    With planes on a GPU everything is queued on torch's current stream, and nothing waits. Chunks lie in the
    memory of the GPU, or in page-locked host memory, which the kernel then reads or writes over the link.
    With planes on CPU one thread does the work, without the GIL. May be used by several threads at a time
    as long as they touch different blocks and rows.

    Args:
        planes: of ``planes_of``.
        heads: of ``heads_of`` for the same caches; needed for fp8 and for shifts.
        fp8: rows hold fp8 codes and scales: about half the bytes of 16-bit planes.

    Raises:
        ValueError: fp8 without heads, or heads that do not cover the planes.
    """

    def __init__(self, planes: Sequence[Tensor], heads: Sequence[HeadView] | None = None, fp8: bool = False) -> None:
        assert planes and len({plane.device for plane in planes}) == 1
        if fp8 and not heads:
            raise ValueError("an fp8 store needs head views: see kernels.heads.heads_of")
        self.device = planes[0].device
        self.block_bytes = block_bytes(planes)
        """Bytes of one block in the planes."""
        self.layout = fp8_rows(planes, heads) if heads and fp8 else exact_rows(planes)
        if heads:
            check_coverage(planes, heads)
        self.row_bytes = self.layout.row_bytes
        """Bytes of a chunk's row."""
        self._fp8 = fp8
        self._smallest_key = min((head.view.shape[-1] for head in heads or () if head.is_key), default=0)
        self._copy = _copy_for(planes)
        self._heads = _heads_for(heads, self.layout, self._copy) if heads else None

    def warm_up(self) -> None:
        """Compiles what there is to compile, a second or two unless Triton has it in its cache; touches no block.

        The kernel of a shift is compiled on a GPU when it is first used.
        """
        for part in (self._copy, self._heads):
            if part is not None:
                part.warm_up()

    def gather(
        self,
        block_ids: Sequence[int],
        out: Tensor,
        rows: Sequence[int] | None = None,
        *,
        num_programs: int = DEFAULT_PROGRAMS,
    ) -> None:
        """Block ``block_ids[i]`` to row ``rows[i]`` of ``out``, by default ``i``. Ids may repeat, rows may not.

        Args:
            out: uint8 ``[n, row_bytes]``; rows may lie apart.
            num_programs: on a GPU, at most so many SMs are used.
        """
        rows = self._check(block_ids, out, rows)
        if not rows:
            return
        if self._fp8:
            self._heads.gather(block_ids, out, rows, num_programs)
        else:
            self._copy.gather(block_ids, out, rows, num_programs)

    def scatter(
        self,
        chunk: Tensor,
        block_ids: Sequence[int],
        rows: Sequence[int] | None = None,
        *,
        shift: RotaryShift | None = None,
        num_programs: int = DEFAULT_PROGRAMS,
    ) -> None:
        """Row ``rows[i]`` of ``chunk``, by default ``i``, to block ``block_ids[i]``. Ids must differ.

        Args:
            shift: moves K to other positions, the same way in all blocks.

        Raises:
            ValueError: a shift without heads, or one that does not fit them.
        """
        rows = self._check(block_ids, chunk, rows)
        if shift is not None:
            if self._heads is None:
                raise ValueError("a rotary shift needs head views: see kernels.heads.heads_of")
            shift.check(self._smallest_key)
        if not rows:
            return
        if self._fp8 or shift is not None:
            self._heads.scatter(chunk, block_ids, rows, shift, num_programs)
        else:
            self._copy.scatter(chunk, block_ids, rows, num_programs)

    def _check(self, block_ids: Sequence[int], chunk: Tensor, rows: Sequence[int] | None) -> Sequence[int]:
        assert chunk.dtype == torch.uint8 and chunk.dim() == 2 and chunk.shape[1] == self.row_bytes
        assert chunk.shape[1] < 2 or chunk.stride(1) == 1
        # A GPU reaches page-locked host memory too.
        assert chunk.device == self.device or (self.device.type == "cuda" and chunk.device.type == "cpu")
        assert len(block_ids) == (chunk.shape[0] if rows is None else len(rows))
        return range(len(block_ids)) if rows is None else rows


def _copy_for(planes: Sequence[Tensor]) -> CpuCopy | TorchCopy | GpuCopy:
    device = planes[0].device.type
    if device == "cpu":
        from .cpu_copy import CpuCopy  # imports Numba

        return CpuCopy(planes)
    if device == "cuda" and find_spec("triton"):
        from .gpu_copy import GpuCopy  # imports Triton

        return GpuCopy(planes)
    return TorchCopy(planes)


def _heads_for(
    heads: Sequence[HeadView], layout: RowLayout, copy: CpuCopy | TorchCopy | GpuCopy
) -> CpuHeads | GpuHeads:
    device = heads[0].view.device.type
    if device == "cpu":
        from .cpu_heads import CpuHeads  # imports Numba

        return CpuHeads(heads, layout, copy)
    if device == "cuda" and find_spec("triton"):
        from .gpu_heads import GpuHeads

        return GpuHeads(heads, layout)
    raise ValueError(f"fp8 and rotary shifts need a CPU or a GPU with Triton, not {device}")
