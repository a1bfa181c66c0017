import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memos_vllm.errors import DataDirError, DataDirInUse
from memos_vllm.store.disk_index import TOUCHES_PER_COMMIT, DiskIndex, DropReport, Location
from memos_vllm.store.ops import path_for_rank
from tests.store.store_factories import make_identity, make_key, make_keys, random_rows, write_chunk

IDENTITY = make_identity()
ROW_BYTES = 64


@pytest.fixture
def open_index(tmp_path):
    """Opens the index of ``tmp_path / "kv"``; what is open is closed at the end."""
    opened = []

    def open_index(identity=IDENTITY, budget_blocks=100, root=tmp_path / "kv", ranks=2):
        for index in opened:
            index.close()
        opened.append(DiskIndex(root, identity, budget_blocks * ROW_BYTES * ranks, ranks))
        return opened[-1]

    yield open_index
    for index in opened:
        index.check_integrity()
        index.close()


def plan(index, *numbers, tag=b"", ranks=2):
    return index.plan_write(make_keys(*numbers), len(numbers) * ROW_BYTES * ranks, tag)


def write(index, *numbers, tag=b"", identity=IDENTITY, ranks=2):
    """What the connector and its workers do for one chunk."""
    chunk = plan(index, *numbers, tag=tag, ranks=ranks)
    for rank in range(ranks):
        blocks = random_rows(len(numbers), ROW_BYTES)
        write_chunk(path_for_rank(chunk.path, rank), blocks, make_keys(*numbers), identity, rank)
    assert index.commit(chunk.chunk)
    return chunk


def found(index, *numbers):
    return [index.lookup(make_key(number)) is not None for number in numbers]


def removed(index):
    """Waits until the thread has removed what was evicted so far."""
    index._removal._thread.submit(lambda: None).result()


def files(root, suffix=".safetensors"):
    return sorted(path.name for path in root.rglob("*") if path.name.endswith(suffix))


def test_blocks_are_found_from_commit_on(open_index):
    index = open_index()
    chunk = plan(index, 1, 2)
    assert found(index, 1, 2) == [False, False] and make_key(1) in index and make_key(3) not in index
    index.commit(chunk.chunk)
    assert index.lookup(make_key(2)) == Location(chunk.chunk, 1)
    assert index.path_of(chunk.chunk) == chunk.path and "{rank}" in chunk.path
    assert len(index) == 2 and index.usage_bytes == 4 * ROW_BYTES


def test_everything_is_there_after_a_restart(open_index, tmp_path):
    index = open_index()
    chunk = write(index, 1, 2, tag=b"alice")
    again = open_index()
    assert again.lookup(make_key(2)) == Location(chunk.chunk, 1) and again.usage_bytes == index.usage_bytes
    assert again.drop_tag(b"alice") == DropReport(1, 2, 4 * ROW_BYTES, Future())


def test_an_aborted_write_leaves_no_key_and_no_file(open_index, tmp_path):
    index = open_index()
    chunk = plan(index, 1)
    write_chunk(path_for_rank(chunk.path, 0), random_rows(1, ROW_BYTES), make_keys(1), IDENTITY, 0)
    index.abort(chunk.chunk)
    assert make_key(1) not in index and index.usage_bytes == 0 and files(tmp_path) == []


def test_the_budget_evicts_least_recently_used_chunks_of_any_identity(open_index, tmp_path):
    other = make_identity(model="other")
    write(open_index(other, budget_blocks=4), 9, identity=other)
    index = open_index(budget_blocks=4)
    assert index.usage_bytes == 2 * ROW_BYTES and found(index, 9) == [False], "kept, but never found"
    first, _, third = write(index, 1), write(index, 2), write(index, 3)
    index.touch(first.chunk)
    write(index, 4, 5)
    assert found(index, 1, 2, 3, 4, 5) == [True, False, True, True, True]
    removed(index)
    assert len(files(tmp_path)) == 6
    index.pin(first.chunk)
    index.pin(third.chunk)
    assert plan(index, 6, 7, 8) is None
    assert found(index, 1, 3, 4, 5) == [True] * 4, "nothing is evicted for what cannot fit"
    index.unpin(third.chunk)
    assert plan(index, 6, 7, 8) is not None
    assert found(index, 1, 3, 4, 5) == [True, False, False, False]


def test_the_order_of_uses_is_written_with_new_chunks_some_at_a_time(open_index, monkeypatch):
    index = open_index()
    chunks = [write(index, number).chunk for number in range(TOUCHES_PER_COMMIT + 8)]
    written = []
    apply = index._records.apply
    monkeypatch.setattr(index._records, "apply", lambda put, delete: written.append(len(put)) or apply(put, delete))
    for chunk in reversed(chunks):
        index.touch(chunk)
    write(index, 99)
    index.close()
    assert written == [TOUCHES_PER_COMMIT + 1, 8]
    assert found(open_index(budget_blocks=3), 99, *range(len(chunks))) == [True] * 3 + [False] * (len(chunks) - 2)


def test_a_chunk_is_filed_by_the_use_of_its_keys(open_index):
    index = open_index(budget_blocks=3)
    older, newer = plan(index, 1), plan(index, 2)
    write(index, 3)
    uses = [index.clock.tick(), index.clock.tick()]
    index.touch(index.lookup(make_key(3)).chunk)
    index.commit(newer.chunk, uses[1])
    index.commit(older.chunk, uses[0])
    assert index.plan_write(make_keys(4), 2 * ROW_BYTES, b"", last_use=uses[0] - 1) is None
    assert found(index, 1, 2, 3) == [True] * 3, "nothing goes for what is older"
    for number in (4, 5):
        assert plan(index, number) is not None
        assert found(index, 1, 2, 3) == [False, number == 4, True]


def test_more_than_the_budget_is_refused(open_index):
    assert plan(open_index(budget_blocks=1), 1, 2) is None


def test_a_smaller_budget_after_a_restart_evicts_the_oldest(open_index, tmp_path):
    index = open_index()
    first, _ = write(index, 1), write(index, 2)
    index.touch(first.chunk)
    assert found(open_index(budget_blocks=1), 1, 2) == [True, False]
    assert len(files(tmp_path)) == 2


def test_dropping_a_tag_removes_files_and_records_of_every_identity(open_index, tmp_path):
    other = make_identity(model="other")
    write(open_index(other), 9, tag=b"alice", identity=other)
    index = open_index()
    write(index, 1, 2, tag=b"alice")
    write(index, 3, tag=b"bob")
    dropped = index.drop_tag(b"alice")
    assert dropped == DropReport(chunks=2, blocks=3, bytes=6 * ROW_BYTES, removal=Future())
    assert found(index, 1, 2, 3) == [False, False, True], "at once"
    assert dropped.removal.result() == [] and len(files(tmp_path)) == 2
    assert index.drop_tag(b"alice") == DropReport(0, 0, 0, Future())
    shutil.rmtree(tmp_path / "kv" / "index")
    assert found(open_index(), 1, 2, 3) == [False, False, True]


def test_a_tag_dropped_during_a_write_is_gone_when_the_write_ends(open_index, tmp_path):
    index = open_index()
    chunk = plan(index, 1, tag=b"alice")
    assert index.drop_tag(b"alice").blocks == 1
    for rank in range(2):
        write_chunk(path_for_rank(chunk.path, rank), random_rows(1, ROW_BYTES), make_keys(1), IDENTITY, rank)
    assert not index.commit(chunk.chunk)
    assert make_key(1) not in index and files(tmp_path) == [] and index.usage_bytes == 0


def test_a_crash_during_the_removal_of_a_tag_does_not_bring_it_back(open_index, tmp_path, monkeypatch):
    index = open_index()
    write(index, 1, tag=b"alice")
    copy = tmp_path / "crashed"
    index.drop_tag(b"alice").removal.result()
    shutil.copytree(tmp_path / "kv", copy)
    assert index._removal._removed, "the record is there still"
    assert found(open_index(root=copy), 1) == [False]


def test_a_file_that_cannot_be_removed_is_reported(open_index, monkeypatch):
    index = open_index()
    chunk = write(index, 1, tag=b"alice")

    def refuse(path):
        raise OSError(errno.EIO, "I/O error", path)

    monkeypatch.setattr(os, "unlink", refuse)
    assert index.drop_tag(b"alice").removal.result() == [path_for_rank(chunk.path, rank) for rank in range(2)]


def test_files_go_in_a_thread_and_an_index_that_closes_waits_for_it(open_index, tmp_path, monkeypatch):
    index = open_index()
    write(index, 1, tag=b"alice")
    may_go, unlink, threads = threading.Event(), os.unlink, set()

    def slow(path):
        threads.add(threading.get_ident())
        may_go.wait()
        unlink(path)

    monkeypatch.setattr(os, "unlink", slow)
    removal = index.drop_tag(b"alice").removal
    assert found(index, 1) == [False] and not removal.done(), "nobody waits for the file system"
    may_go.set()
    index.close()
    assert removal.done() and files(tmp_path) == [] and threading.get_ident() not in threads


class SlowDisk:
    """``os.unlink`` of a chunk's file waits; then it works, or raises ``error``."""

    def __init__(self, monkeypatch):
        self.may_go, self.error, self._unlink = threading.Event(), None, os.unlink
        monkeypatch.setattr(os, "unlink", self)

    def __call__(self, path):
        if not str(path).endswith(".safetensors"):
            return self._unlink(path)
        self.may_go.wait()
        if self.error is not None:
            raise self.error
        self._unlink(path)


@pytest.fixture
def slow_disk(monkeypatch):
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.may_go.set()


def test_an_evicted_chunk_is_not_written_again_before_its_files_are_gone(open_index, slow_disk, tmp_path):
    index = open_index(budget_blocks=2)
    write(index, 1)
    write(index, 2)
    write(index, 3)
    assert found(index, 1, 2, 3) == [False, True, True], "at once"
    assert plan(index, 1) is None and found(index, 2, 3) == [True, True], "and nothing was evicted for it"
    assert len(files(tmp_path)) == 6
    slow_disk.may_go.set()
    removed(index)
    again = write(index, 1)
    removed(index)
    assert found(index, 1, 2, 3) == [True, False, True]
    assert all(os.path.exists(path_for_rank(again.path, rank)) for rank in range(2))
    assert found(open_index(budget_blocks=2), 1, 2, 3) == [True, False, True]


def test_what_is_evicted_and_still_there_is_bounded(open_index, slow_disk, monkeypatch):
    monkeypatch.setattr("memos_vllm.store.disk_index.MAX_LEAVING_BYTES", 4 * ROW_BYTES)
    index = open_index(budget_blocks=1)
    for number in range(4):
        write(index, number)
    assert plan(index, 4) is None, "three are evicted, for which there would be room without the third"
    assert found(index, 3) == [True]
    index.drop_tag(b"")
    write(index, 4)
    slow_disk.may_go.set()
    removed(index)
    write(index, 5)


def test_a_deletion_removes_what_was_evicted_just_before(open_index, slow_disk):
    index = open_index(budget_blocks=1)
    chunk = write(index, 1, tag=b"alice")
    write(index, 2)
    slow_disk.error = OSError(errno.EIO, "I/O error")
    dropped = index.drop_tag(b"alice")
    assert dropped == DropReport(0, 0, 0, Future())
    slow_disk.may_go.set()
    assert dropped.removal.result() == [path_for_rank(chunk.path, rank) for rank in range(2)]


def test_a_damaged_chunk_is_dropped_while_it_is_read(open_index, tmp_path):
    index = open_index()
    chunk = write(index, 1)
    index.pin(chunk.chunk)
    index.drop(chunk.chunk)
    assert found(index, 1) == [False] and files(tmp_path) == []
    index.unpin(chunk.chunk)
    write(index, 1)


def test_records_without_files_are_dropped(open_index, tmp_path):
    index = open_index()
    chunk = write(index, 1)
    write(index, 2)
    index.close()
    os.unlink(path_for_rank(chunk.path, 1))
    assert found(open_index(), 1, 2) == [False, True]
    assert len(files(tmp_path)) == 2, "the other rank's file went too"


def test_a_lost_index_rebuilds_itself_from_the_files(open_index, tmp_path):
    index = open_index()
    chunk = write(index, 1, 2, tag=b"alice")
    index.close()
    shutil.rmtree(tmp_path / "kv" / "index")
    again = open_index()
    assert again.lookup(make_key(2)) == Location(chunk.chunk, 1) and again.usage_bytes == index.usage_bytes
    assert again.tag_of(chunk.chunk) == b"alice" and again.path_of(chunk.chunk) == chunk.path
    assert again.drop_tag(b"alice").blocks == 2, "the owner is not forgotten with the index"


@pytest.mark.parametrize("harm", ["rank missing", "truncated", "renamed", "other identity"])
def test_orphans_that_are_not_whole_are_removed(open_index, tmp_path, harm):
    index = open_index()
    chunk = write(index, 1)
    index.close()
    shutil.rmtree(tmp_path / "kv" / "index")
    victim = path_for_rank(chunk.path, 1)
    if harm == "rank missing":
        os.unlink(victim)
    elif harm == "truncated":
        os.truncate(victim, os.path.getsize(victim) - 1)
    elif harm == "renamed":
        for rank in range(2):
            path = path_for_rank(chunk.path, rank)
            os.rename(path, re.sub(r"[0-9a-f]{40}", chunk.chunk[:2] + "0" * 38, path))
    else:
        write_chunk(victim, random_rows(1, ROW_BYTES), make_keys(1), make_identity(dtype="float16"), 1)
    assert len(open_index()) == 0 and files(tmp_path) == []


def test_temporary_files_go_and_foreign_files_stay(open_index, tmp_path):
    index = open_index()
    chunk = write(index, 1)
    index.close()
    directory = os.path.dirname(chunk.path)
    for name in (".x.safetensors.0011.tmp", "notes.txt"):
        open(os.path.join(directory, name), "w").close()
    assert found(open_index(), 1) == [True]
    assert files(tmp_path, ".tmp") == [] and files(tmp_path, "notes.txt") == ["notes.txt"]


@pytest.mark.parametrize("harm", ["empty page", "garbage", "truncated", "tiny", "record", "ended the process"])
def test_a_damaged_index_is_moved_aside_and_rebuilt(open_index, tmp_path, harm, caplog):
    index = open_index()
    chunk = write(index, 1, 2)
    write(index, *range(10, 60))
    index.close()
    data = tmp_path / "kv" / "index" / "data.mdb"
    content = data.read_bytes()
    if harm == "ended the process":
        (tmp_path / "kv" / "index.opening").touch()
    elif harm == "record":
        with lmdb.open(str(data.parent), lock=False) as environment, environment.begin(write=True) as transaction:
            record = bytearray(transaction.get(chunk.chunk.encode()))
            record[len(record) // 2] ^= 1
            transaction.put(chunk.chunk.encode(), bytes(record))
    else:
        damaged = {"empty page": bytes(8192) + content[8192:], "garbage": b"x" * len(content)}
        data.write_bytes(damaged.get(harm) or content[: 100 if harm == "tiny" else -4096])
    index = open_index()
    assert found(index, 1, 2, 10, 59) == [True] * 4
    assert "is damaged" in caplog.text and (tmp_path / "kv" / "index.damaged-1").is_dir()


def test_the_map_grows(open_index, monkeypatch):
    monkeypatch.setattr("memos_vllm.store.chunk_records._MIN_MAP_BYTES", 32768)
    index = open_index(budget_blocks=10**6)
    for begin in range(0, 4000, 500):
        index.commit(plan(index, *range(begin, begin + 500)).chunk)
    assert len(index._records.load()) == 8


def test_an_index_that_cannot_be_written_costs_nothing_now(open_index, monkeypatch, caplog):
    index = open_index()

    def full(**_):
        raise lmdb.DiskError("No space left on device")

    monkeypatch.setattr(index._records, "apply", lambda *_: full())
    write(index, 1)
    assert found(index, 1) == [True] and "was not written" in caplog.text
    assert found(open_index(), 1) == [True], "adopted"


def test_a_root_that_is_a_file_is_refused(open_index, tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataDirError, match="is not a directory"):
            open_index(root=root)


def test_a_root_that_cannot_be_written_is_refused(open_index, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # root may write anywhere, so a mode would not do
    with pytest.raises(DataDirError, match="cannot be written: Permission denied"):
        open_index()


def test_two_servers_on_one_directory_are_refused(open_index, tmp_path):
    index = open_index()
    with pytest.raises(DataDirInUse, match="another server"):
        DiskIndex(tmp_path / "kv", IDENTITY, 1, 2)
    index.close()
    index.close()
    open_index()


def test_a_kill_during_writes_leaves_a_sound_directory(open_index, tmp_path):
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from tests.store.test_disk_index import *
index = DiskIndex({str(tmp_path / "kv")!r}, IDENTITY, 10**6, 2)
for number in range(10):
    write(index, number)
plan(index, 10)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert found(open_index(), *range(11)) == [True] * 10 + [False]


class Model(RuleBasedStateMachine):
    """Sizes, pins and look-ups against a plain model, over restarts."""

    def __init__(self):
        super().__init__()
        self.root = tempfile.mkdtemp()
        self.open()
        self.writing, self.pinned = {}, []

    def open(self):
        self.index = DiskIndex(self.root, IDENTITY, 8 * ROW_BYTES, 1)

    @rule(numbers=st.lists(st.integers(0, 15), unique=True, min_size=1, max_size=5), tag=st.sampled_from([b"a", b"b"]))
    def plan(self, numbers, tag):
        numbers = [number for number in numbers if make_key(number) not in self.index]
        if numbers and (chunk := plan(self.index, *numbers, tag=tag, ranks=1)):
            self.writing[chunk.chunk] = (chunk, numbers, tag)

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), commit=st.booleans())
    def end(self, data, commit):
        chunk, numbers, _ = self.writing.pop(data.draw(st.sampled_from(sorted(self.writing))))
        write_chunk(
            path_for_rank(chunk.path, 0), random_rows(len(numbers), ROW_BYTES), make_keys(*numbers), IDENTITY, 0
        )
        if commit:
            published = self.index.commit(chunk.chunk)
            assert found(self.index, *numbers) == [published] * len(numbers)
        else:
            self.index.abort(chunk.chunk)

    @rule(number=st.integers(0, 15), pin=st.booleans())
    def use(self, number, pin):
        if location := self.index.lookup(make_key(number)):
            self.index.touch(location.chunk)
            if pin:
                self.index.pin(location.chunk)
                self.pinned.append((location.chunk, number))

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self):
        self.index.unpin(self.pinned.pop()[0])

    @rule(tag=st.sampled_from([b"a", b"b"]))
    def drop_tag(self, tag):
        self.index.drop_tag(tag).removal.result()  # it may come back here
        self.pinned_dropped()

    def pinned_dropped(self):
        for chunk, number in list(self.pinned):
            if self.index.lookup(make_key(number)) is None:
                self.index.unpin(chunk)
                self.pinned.remove((chunk, number))

    @precondition(lambda self: not self.writing and not self.pinned)
    @rule(lose_index=st.booleans())
    def restart(self, lose_index):
        before = {number: self.index.lookup(make_key(number)) for number in range(16)}
        usage_bytes = self.index.usage_bytes
        self.index.close()
        if lose_index:
            shutil.rmtree(os.path.join(self.root, "index"))
        self.open()
        assert {number: self.index.lookup(make_key(number)) for number in range(16)} == before
        assert self.index.usage_bytes == usage_bytes

    @invariant()
    def sound(self):
        self.index.check_integrity()
        assert self.index.usage_bytes <= self.index.budget_bytes
        assert all(self.index.lookup(make_key(number)) for _, number in self.pinned), "pinned chunks stay"

    def teardown(self):
        self.index.close()
        shutil.rmtree(self.root)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=25, stateful_step_count=30)
