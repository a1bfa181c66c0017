"""Copies past the caches move exactly the bytes that they are told to, wherever these begin and end."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels.cpu_jit import njit
from kernels.cpu_stream import LINE_BYTES, MIN_BYTES, stream, stream_fence

POISON = 0xA5


@njit
def copy(target, source, size):
    stream(target, source, size)
    stream_fence()


@given(
    size=st.one_of(st.integers(0, 2 * LINE_BYTES), st.integers(MIN_BYTES - 1, MIN_BYTES + 3 * LINE_BYTES)),
    target_at=st.integers(0, LINE_BYTES),
    source_at=st.integers(0, LINE_BYTES),
)
def test_every_byte_arrives_and_no_other_changes(size: int, target_at: int, source_at: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, source_at + size, np.uint8)
    target = np.full(target_at + size + LINE_BYTES, POISON, np.uint8)
    copy(target.ctypes.data + target_at, source.ctypes.data + source_at, size)
    assert (target[target_at : target_at + size] == source[source_at:]).all()
    assert (target[:target_at] == POISON).all() and (target[target_at + size :] == POISON).all()


def test_lines_are_written_past_the_caches() -> None:
    """What makes it as fast as it is; a compiler that ignores the mark would pass all other tests."""
    (code,) = copy.inspect_llvm().values()
    assert "!nontemporal" in code
