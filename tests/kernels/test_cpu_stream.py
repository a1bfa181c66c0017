"""Copies past the caches move exactly the bytes that they are told to, wherever these begin and end."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import cpu_copy
from kernels.cpu_copy import CpuCopy
from kernels.cpu_jit import njit
from kernels.cpu_stream import LINE_BYTES, MIN_BYTES, STRIP_BYTES, TOGETHER, stream, stream_fence, stream_together

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


@njit
def copy_together(targets, sources, sizes):
    stream_together(targets, sources, sizes, len(targets))
    stream_fence()


PIECES = st.tuples(
    st.one_of(st.integers(0, 2 * LINE_BYTES), st.integers(MIN_BYTES - 1, 5 * STRIP_BYTES)),
    st.integers(0, LINE_BYTES),
    st.integers(0, LINE_BYTES),
)


@given(st.lists(PIECES, max_size=TOGETHER))
def test_pieces_of_any_sizes_go_together_and_no_other_byte_changes(pieces: list[tuple[int, int, int]]) -> None:
    source = np.random.default_rng(len(pieces)).integers(0, 256, sum(map(sum, pieces)) + 1, np.uint8)
    target = np.full(len(source) + LINE_BYTES, POISON, np.uint8)
    expected = target.copy()
    to, of, sizes = [], [], []
    begin = 0
    for size, gap, shift in pieces:
        to.append(begin + gap)
        of.append(begin + shift)
        sizes.append(size)
        expected[to[-1] :][:size] = source[of[-1] :][:size]
        begin += size + gap + shift
    numbers = [np.array(each, np.int64) for each in (to, of, sizes)]
    copy_together(numbers[0] + target.ctypes.data, numbers[1] + source.ctypes.data, numbers[2])
    assert (target == expected).all()


def test_what_stands_behind_the_count_is_not_copied() -> None:
    size = 2 * STRIP_BYTES
    source, memory = np.arange(2 * size).astype(np.uint8), np.full(2 * size + LINE_BYTES, POISON, np.uint8)
    target = memory[-memory.ctypes.data % LINE_BYTES :][: 2 * size]
    both = np.array([0, size])
    stream_together(both + target.ctypes.data, both + source.ctypes.data, np.full(2, size), 1)
    assert (target[:size] == source[:size]).all() and (target[size:] == POISON).all()


def test_lines_are_written_past_the_caches() -> None:
    """What makes it as fast as it is; a compiler that ignores the mark would pass all other tests."""
    stream_together(*np.zeros((3, 0), np.int64), 0)
    for loop in (copy, stream_together):
        for code in loop.inspect_llvm().values():
            assert "!nontemporal" in code


def test_the_loops_ask_for_pieces_before_they_copy_them() -> None:
    """As above: nothing else would fail without it."""
    planes = [torch.zeros(1, MIN_BYTES, dtype=torch.uint8)]
    CpuCopy(planes).warm_up()
    for loop in (cpu_copy._gather, cpu_copy._scatter):
        (code,) = loop.inspect_llvm().values()
        assert "call void @llvm.prefetch" in code
