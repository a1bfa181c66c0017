"""Copies of bytes past the caches, for loops that Numba compiles.

What is copied here is larger than a cache and not read again soon. A plain store first fetches the line that
it overwrites; one that is marked non-temporal (LLVM's ``!nontemporal``) writes whole lines and fetches none,
a third less traffic. ``memcpy`` of glibc does the same, from some MiB on only. Such stores may be seen late by
other threads: ``stream_fence`` comes before anybody is told.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .cpu_jit import cgutils, intrinsic, njit, types

LINE_BYTES = 64
MIN_BYTES = 256
"""A shorter piece is hardly more than its ends, which no whole line holds."""

_LINE = ir.VectorType(ir.IntType(64), LINE_BYTES // 8)


@intrinsic
def _stream_line(typing: Any, target: Any, source: Any) -> Any:
    """Copies one line; ``target`` is at the start of one. Both are addresses."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, of = (builder.inttoptr(address, _LINE.as_pointer()) for address in arguments)
        store = builder.store(builder.load(of, align=1), to, align=LINE_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def _copy_bytes(typing: Any, target: Any, source: Any, size: Any) -> Any:
    """``memcpy``."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, of = (builder.inttoptr(address, cgutils.voidptr_t) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, of, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def stream_fence(typing: Any) -> Any:
    """What was streamed before is seen before what is written after."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


@njit(nogil=True, inline="always")
def stream(target, source, size):
    """Copies ``size`` bytes from one address to another; they do not overlap."""
    if size < MIN_BYTES:
        _copy_bytes(target, source, size)
        return
    head = -target & (LINE_BYTES - 1)
    lines = (size - head) // LINE_BYTES
    _copy_bytes(target, source, head)
    for line in range(lines):
        at = head + line * LINE_BYTES
        _stream_line(target + at, source + at)
    done = head + lines * LINE_BYTES
    _copy_bytes(target + done, source + done, size - done)
