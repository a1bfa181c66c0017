"""KV on disk leaves room on the file system for what cannot be computed again."""

import errno
import logging
import os
from types import SimpleNamespace

import pytest

from memos_vllm.store import disk_room
from memos_vllm.store.disk_index import DiskIndex
from memos_vllm.store.ops import path_for_rank
from tests.store.store_factories import make_identity, make_key, make_keys, random_rows, write_chunk

IDENTITY = make_identity()
BLOCK = 64
GIB = 2**30


class FakeDisk:
    """A file system in blocks: those of others, and one for each KV file."""

    def __init__(self, root, blocks):
        self.root, self.blocks, self.others, self.now, self.looks = root, blocks, 0, 0.0, 0

    def statvfs(self, path):
        assert path.is_dir()
        self.looks += 1
        ours = sum(1 for _ in self.root.rglob("*.safetensors"))
        return SimpleNamespace(f_frsize=BLOCK, f_blocks=self.blocks, f_bavail=self.blocks - self.others - ours)

    def later(self):
        self.now += disk_room.LOOK_INTERVAL_S


@pytest.fixture
def disk(tmp_path):
    return FakeDisk(tmp_path / "kv", blocks=20)


@pytest.fixture
def open_index(disk):
    opened = []

    def open_index(budget_blocks=10, reserve_blocks=4):
        for index in opened:
            index.close()
        sizes = budget_blocks * BLOCK, 1, reserve_blocks * BLOCK
        opened.append(DiskIndex(disk.root, IDENTITY, *sizes, disk.statvfs, lambda: disk.now))
        return opened[-1]

    yield open_index
    for index in opened:
        index.check_integrity()
        index.close()


def plan(index, number):
    for each in list(index._removal._leaving.values()):  # files of what was evicted go in a thread
        each.removal.result()
    return index.plan_write(make_keys(number), BLOCK, b"")


def write(index, *numbers):
    for number in numbers:
        chunk = plan(index, number)
        write_chunk(path_for_rank(chunk.path, 0), random_rows(1, BLOCK), make_keys(number), IDENTITY, 0)
        assert index.commit(chunk.chunk)


def held(index):
    return [number for number in range(30) if index.lookup(make_key(number))]


def test_the_oldest_go_as_others_take_the_space_and_the_budget_comes_back(open_index, disk):
    index = open_index()
    write(index, *range(10))
    disk.others = 9
    disk.later()
    index.keep_reserve()
    assert held(index) == [3, 4, 5, 6, 7, 8, 9] and index.budget_bytes == 7 * BLOCK
    write(index, 10)
    assert held(index) == [4, 5, 6, 7, 8, 9, 10], "within the reserve a new one takes the place of the oldest"
    disk.others = 0
    disk.later()
    write(index, 11, 12, 13)
    assert held(index) == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13] and index.budget_bytes == 10 * BLOCK


def test_what_is_read_or_written_stays_and_the_rest_goes(open_index, disk):
    index = open_index()
    write(index, *range(4))
    first = index.lookup(make_key(0)).chunk
    index.pin(first)
    writing = plan(index, 9)
    disk.others = 20
    disk.later()
    index.keep_reserve()
    assert held(index) == [0] and index.budget_bytes == 0
    assert plan(index, 10) is None
    index.unpin(first)
    index.abort(writing.chunk)


def test_what_is_being_written_is_not_yet_on_the_disk(open_index, disk):
    index = open_index()
    disk.others = 14
    chunks = [plan(index, number) for number in range(3)]
    assert [chunk is not None for chunk in chunks] == [True, True, False], "two blocks above the reserve"
    for chunk in chunks[:2]:
        index.abort(chunk.chunk)


def test_a_look_costs_a_call_every_few_seconds_or_quarter_of_the_reserve(open_index, disk):
    index = open_index(reserve_blocks=16)
    looks = disk.looks
    for _ in range(100):
        index.keep_reserve()
    assert disk.looks == looks
    for number in range(3):
        index.abort(plan(index, number).chunk)
    assert disk.looks == looks
    index.abort(plan(index, 3).chunk)
    assert disk.looks == looks + 1
    disk.later()
    index.keep_reserve()
    assert disk.looks == looks + 2


def test_a_restart_on_a_fuller_disk_evicts_and_says_so_once(open_index, disk, caplog):
    write(open_index(), *range(10))
    disk.others = 10
    with caplog.at_level(logging.WARNING, "memos_vllm"):
        index = open_index()
        for _ in range(5):
            disk.later()
            index.keep_reserve()
    assert held(index) == [4, 5, 6, 7, 8, 9]
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"allows this engine {10 * BLOCK} bytes" in message and f"has room for {6 * BLOCK}" in message


def test_a_write_without_space_lowers_the_budget_once_for_all_that_were_under_way(open_index, disk):
    index = open_index()
    write(index, *range(6))
    failing = [plan(index, number) for number in (20, 21)]
    for chunk in failing:
        index.abort(chunk.chunk, no_space=True)
    assert held(index) == [5] and index.budget_bytes == 2 * BLOCK, "the reserve is free, with the second write's block"
    disk.later()
    write(index, 7, 8)
    assert held(index) == [7, 8], "a quota that statvfs does not show"
    index.abort(plan(index, 22).chunk, no_space=True)
    assert index.budget_bytes == 0, "a new write that fails is news"
    disk.now += disk_room.FULL_HOLD_S
    write(index, *range(10, 20))
    assert held(index) == list(range(10, 20)) and index.budget_bytes == 10 * BLOCK


def test_another_error_lowers_nothing(open_index):
    index = open_index()
    write(index, 1)
    index.abort(plan(index, 2).chunk)
    assert held(index) == [1] and index.budget_bytes == 10 * BLOCK


def test_a_file_system_that_does_not_answer_changes_nothing(open_index, disk):
    index = open_index()
    write(index, *range(10))

    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    index._room._statvfs = fails
    disk.later()
    index.keep_reserve()
    assert len(held(index)) == 10


@pytest.mark.parametrize(
    ("file_system_bytes", "reserve_bytes"), [(2 * GIB, GIB // 2), (100 * GIB, 5 * GIB), (10_000 * GIB, 16 * GIB)]
)
def test_the_default_reserve(file_system_bytes, reserve_bytes):
    assert disk_room.default_reserve(file_system_bytes) == reserve_bytes


def test_no_reserve_named_is_the_default(disk):
    room = disk_room.DiskRoom(disk.root.parent, 10 * GIB, None, lambda _: SimpleNamespace(
        f_frsize=GIB, f_blocks=100, f_bavail=8
    ))  # fmt: skip
    room.look(held_bytes=GIB)
    assert room.budget_bytes == 4 * GIB
