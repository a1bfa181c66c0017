"""Copies of bytes past the caches, for loops that Numba compiles.

What is copied here is larger than a cache and not read again soon. A plain store first fetches the line that
it overwrites; one that is marked non-temporal (LLVM's ``!nontemporal``) writes whole lines and fetches none,
a third less traffic. ``memcpy`` of glibc does the same, from some MiB on only. Such stores may be seen late by
other threads: ``stream_fence`` comes before anybody is told.

Pieces are copied several at a time, a strip of each in turn. A piece of 4 KiB is a page, at whose end what the core
fetches ahead ends too: one after another, each begins with a wait for memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .cpu_jit import cgutils, intrinsic, njit, types

LINE_BYTES = 64
STRIP_LINES = 4
STRIP_BYTES = STRIP_LINES * LINE_BYTES
MIN_BYTES = STRIP_BYTES
"""A shorter piece is hardly more than its ends, which no whole line holds."""
TOGETHER = 8
"""Pieces copied in turns. Of 64 MiB in pieces of 4 KiB, one core of an EPYC with AVX-512 gathered 0.67 as fast as one
``memcpy`` one piece after another, 0.9 with 4 at a time, 1.0 to 1.2 with 8; with 16, pieces from 64 KiB on slow down.
"""

_LINE = ir.VectorType(ir.IntType(64), LINE_BYTES // 8)


def _lines(count: int) -> Any:
    """An intrinsic that copies ``count`` lines; ``target`` is at the start of one. Both are addresses."""

    def copy(typing: Any, target: Any, source: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            to, of = (builder.inttoptr(address, _LINE.as_pointer()) for address in arguments)
            numbers = [ir.Constant(ir.IntType(64), number) for number in range(count)]
            lines = [builder.load(builder.gep(of, [number]), align=1) for number in numbers]
            mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
            for number, line in zip(numbers, lines, strict=True):
                store = builder.store(line, builder.gep(to, [number]), align=LINE_BYTES)
                store.set_metadata("nontemporal", mark)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), code

    return intrinsic(copy)


_stream_line, _stream_strip = _lines(1), _lines(STRIP_LINES)


@intrinsic
def _copy_bytes(typing: Any, target: Any, source: Any, size: Any) -> Any:
    """``memcpy``."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, of = (builder.inttoptr(address, cgutils.voidptr_t) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, of, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def fetch_strip(typing: Any, source: Any) -> Any:
    """Asks for the first strip of what is copied soon; the wait for one piece's first line is then a wait for all."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        address = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        for line in range(STRIP_LINES):
            at = builder.gep(address, [ir.Constant(ir.IntType(64), line * LINE_BYTES)])
            builder.call(prefetch, [at, number(0), number(3), number(1)])  # to read, into every cache, data
        return context.get_dummy_value()

    return types.void(types.int64), code


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


@njit(nogil=True)
def stream_together(targets, sources, sizes, count):
    """Copies ``sizes[i]`` bytes from ``sources[i]`` to ``targets[i]`` for the first ``count``, and changes all three.

    No target overlaps another one, or a source.
    """
    if count == 0:
        return
    strips = sizes[0] // STRIP_BYTES
    for piece in range(count):
        head = min(-targets[piece] & (LINE_BYTES - 1), sizes[piece])
        if head:
            _copy_bytes(targets[piece], sources[piece], head)
            targets[piece] += head
            sources[piece] += head
            sizes[piece] -= head
        strips = min(strips, sizes[piece] // STRIP_BYTES)
    for strip in range(strips):
        at = strip * STRIP_BYTES
        for piece in range(count):
            _stream_strip(targets[piece] + at, sources[piece] + at)
    done = strips * STRIP_BYTES
    for piece in range(count):
        if sizes[piece] > done:
            stream(targets[piece] + done, sources[piece] + done, sizes[piece] - done)
