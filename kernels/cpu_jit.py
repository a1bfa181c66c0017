"""Numba's compiler, imported so that vLLM can still start an engine in this process.

Why: when a CPU worker starts, vLLM (seen in 0.32) goes over the names in all loaded modules and reads
``vars()`` of each value that has a ``__dict__``. llvmlite, which Numba brings, keeps its C library in an
object that takes every unknown name for a C function, ``__dict__`` too, and what it returns is no mapping.
So the second engine of a process failed with "'_lib_fn_wrapper' object has no attribute 'get'".
Goes when: llvmlite's wrapper or vLLM's search is careful. ``tests/kernels/test_cpu_jit.py`` fails then.
"""

from __future__ import annotations

from typing import Any

from llvmlite.binding import ffi
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["cgutils", "intrinsic", "njit", "types"]


def _only_functions(wrapper: type) -> None:
    """No name with leading underscores is a function of the C library. May be called twice."""
    original = wrapper.__getattr__  # type: ignore[attr-defined]
    if hasattr(original, "_memos_original"):
        return

    def __getattr__(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return original(self, name)

    __getattr__._memos_original = original  # type: ignore[attr-defined]
    wrapper.__getattr__ = __getattr__  # type: ignore[attr-defined]


_only_functions(type(ffi.lib))
