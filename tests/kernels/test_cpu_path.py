"""What makes the loops for CPU fast, which a test of their bytes cannot see: compiled, vectorised, without the GIL."""

import pytest
import torch

from memos_vllm.kernels import cpu_copy
from memos_vllm.kernels.heads import HeadShape, heads_of
from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.kernels.planes import planes_of
from memos_vllm.kernels.rotary import RotaryShift
from tests.kernels.kernel_factories import BLOCKS, VALUE_DTYPES, filled


def loops_of(copier, shift):
    """Those that a gather and a scatter have run."""
    rows = torch.zeros(2, copier.row_bytes, dtype=torch.uint8)
    copier.gather([3, 4], rows)
    copier.scatter(rows, [5, 6], shift=shift)
    assert isinstance(copier._copy, cpu_copy.CpuCopy)
    return [cpu_copy._gather, cpu_copy._scatter] if copier._heads is None else list(copier._heads._views[0].loops)


@pytest.mark.parametrize("dtype", [None, *VALUE_DTYPES], ids=str)
def test_the_loops_are_compiled_and_let_other_threads_run(dtype):
    caches = [filled(2, BLOCKS, 16, 2, 64, dtype=dtype or torch.uint8)]
    heads = heads_of(caches, BLOCKS, HeadShape(2, 64, "NHD")) if dtype else None
    copier = BlockCopier(planes_of(caches, BLOCKS), heads, fp8=dtype is not None)
    shift = RotaryShift.by(5, torch.ones(32)) if dtype else None
    for loop in loops_of(copier, shift):
        assert loop.nopython_signatures and loop.targetoptions["nogil"]
        if dtype is not None:
            assert all("x float>" in code for code in loop.inspect_llvm().values()), f"{loop} is not vectorised"
