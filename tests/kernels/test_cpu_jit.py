"""vLLM can start an engine in a process where the CPU kernels were compiled."""

from __future__ import annotations

import subprocess
import sys

import pytest
from vllm.platforms import current_platform

needs_search = pytest.mark.skipif(
    not hasattr(type(current_platform), "register_triton_kernel_overrides"), reason="this vLLM does not search"
)

SEARCH = """
{imported}
from vllm.platforms import current_platform
current_platform.register_triton_kernel_overrides()
"""


def search(imported: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SEARCH.format(imported=imported)], capture_output=True, text=True)


@needs_search
def test_vllm_still_finds_its_kernels() -> None:
    result = search("from memos_vllm.kernels import cpu_heads")
    assert result.returncode == 0, result.stderr[-3000:]


@needs_search
def test_the_shim_is_still_needed() -> None:
    """Once this fails, cpu_jit.py can go."""
    assert "'_lib_fn_wrapper' object has no attribute 'get'" in search("import numba").stderr


def test_the_library_is_still_found() -> None:
    from llvmlite.binding import ffi

    from memos_vllm.kernels import cpu_jit

    assert cpu_jit.njit(lambda x: x + 1)(1) == 2
    assert not hasattr(ffi.lib, "__dict__") and ffi.lib.LLVMPY_GetVersionInfo() > 0
