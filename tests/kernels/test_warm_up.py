"""A GPU's kernels are compiled by ``warm_up``, not at the first request: launches up to the driver, for a GPU that need
not be there. The arguments are the real ones, so Triton's binder and compiler see what they will see."""

from __future__ import annotations

import os

import pytest
import torch

from memos_vllm.kernels.heads import heads_of
from memos_vllm.kernels.planes import block_bytes, planes_of
from memos_vllm.kernels.rows import fp8_rows
from tests.kernels.kernel_factories import BLOCKS, LAYOUTS, filled, shape_of

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from memos_vllm.kernels import gpu_copy, gpu_heads, head_kernels

KERNELS = [gpu_copy.copy_blocks, head_kernels.encode_slabs, head_kernels.scatter_slabs]


class Hopper:
    """What is asked of a driver before a kernel is loaded."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """How many kernels have been compiled."""
    launch = JITFunction.run
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, grid, warmup, **kw: launch(self, *args, grid=grid, warmup=True, **kw)
    )
    for kernel in KERNELS:
        kernel.device_caches.clear()
    monkeypatch.setattr(driver, "_active", Hopper())
    yield lambda: sum(len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values())
    for kernel in KERNELS:
        kernel.device_caches.clear()


@pytest.mark.parametrize("layout", ["kv_in_one_head_tokens_outside", "layers_interleaved"])
def test_no_kernel_is_compiled_after_the_warm_up(compiled, layout):
    # Small ones: counts of tiles and slabs that 16 divides, and others.
    caches = LAYOUTS[layout].caches(filled, 16, 1, 24)
    planes = planes_of(caches, BLOCKS)
    copy = gpu_copy.GpuCopy(planes)
    heads = heads_of(caches, BLOCKS, shape_of(LAYOUTS[layout], 1, 24))
    rows = fp8_rows(planes, heads)
    fp8 = gpu_heads.GpuHeads(heads, rows)
    copy.warm_up()
    fp8.warm_up()
    assert compiled() == 4
    exact, encoded = (torch.empty(64, size, dtype=torch.uint8) for size in (block_bytes(planes), rows.row_bytes))
    for count in (1, 2, 7, 64):
        ids = [number % BLOCKS for number in range(count)]
        for chunk in (exact, exact[:count]):
            copy.gather(ids, chunk, range(count), 8)
            copy.scatter(chunk, ids, range(count), 8)
        fp8.gather(ids, encoded, range(count), 8)
        fp8.scatter(encoded, ids, range(count), None, 8)
    assert compiled() == 4
