"""The store on disk: durable, shared by processes, growing by itself, clear when it cannot be used."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import lmdb
import pytest

from memos_vllm.errors import DataDirError, StoreError, StoreFull
from memos_vllm.memory import sessions
from memos_vllm.memory import store as store_module
from memos_vllm.memory.store import MemoryStore
from tests.memory.memory_factories import ALICE, BOB, make_service, texts

HERE = Path(__file__).parent
MIB = 2**20


class Child:
    """Another process with a service on the same store; runs one line after the other."""

    def __init__(self, where: Path | str, max_map_bytes: int = 2**30):
        program = (
            "import sys\nfrom pathlib import Path, PosixPath\nfrom tests.memory.memory_factories import *\n"
            f"service = make_service({where!r}, max_map_bytes={max_map_bytes})\n"
            "print('ready', flush=True)\n"
            "for line in sys.stdin:\n"
            "    try: print(repr(eval(line)), flush=True)\n"
            "    except Exception as error: print(type(error).__name__, error, flush=True)\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])},
        )
        assert self.process.stdout and self.process.stdin
        assert self.process.stdout.readline() == "ready\n"

    def run(self, line: str) -> str:
        assert self.process.stdout and self.process.stdin
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def test_an_acknowledged_write_survives_a_kill(where: Path | str) -> None:
    for number in range(3):
        with Child(where) as child:
            child.run(f"service.add(ALICE, 'tea {number}')")
    service = make_service(where)
    assert texts(service.list(ALICE).records) == ["tea 0", "tea 1", "tea 2"]
    service._store.close()


def test_a_kill_within_a_write_leaves_nothing_of_it(where: Path | str) -> None:
    service = make_service(where)
    with Child(where) as child:
        child.run("service.add(ALICE, 'tea')")
        child.process.stdin.write(  # type: ignore[union-attr]
            "service._store.write(ALICE, lambda user: (user.insert(Clock()(), text='half', type='fact', pinned=False, "
            "tags=(), session=None), print('inside', flush=True), __import__('time').sleep(60)))\n"
        )
        child.process.stdin.flush()  # type: ignore[union-attr]
        assert child.process.stdout.readline() == "inside\n"  # type: ignore[union-attr]
    service.add(ALICE, "after")  # the dead process's lock is taken over
    assert texts(service.list(ALICE).records) == ["tea", "after"]
    service._store.close()


def test_two_processes_see_each_others_writes(where: Path | str) -> None:
    service = make_service(where)
    assert service.search(ALICE, "tea") == []
    with Child(where) as child:
        assert child.run("service.search(ALICE, 'tea')") == "[]"
        record = service.add(ALICE, "green tea")
        assert child.run("texts(service.search(ALICE, 'tea'))") == "['green tea']"
        child.run("service.add(ALICE, 'black tea')")
        assert texts(service.search(ALICE, "black")) == ["black tea"]
        child.run(f"service.delete(ALICE, {record.id!r})")
        assert service.search(ALICE, "green") == []
        assert service.kv_epoch(ALICE) == 1
        service.update(ALICE, service.list(ALICE).records[0].id, text="white tea")
        assert child.run("texts(service.search(ALICE, 'black white'))") == "['white tea']"
        ids = sorted(record.id for record in (service.add(ALICE, "x"), *service.list(ALICE).records))
        assert eval(child.run("service.add(ALICE, 'y').id")) > ids[-1]
    service._store.close()


def test_two_processes_agree_on_a_session(where: Path | str) -> None:
    service = make_service(where)
    service.add(ALICE, "first")
    recall = "texts(service.recall(ALICE, says('x'), session='s').long_lived)"
    with Child(where) as child:
        assert child.run(recall) == "['first']"
        service.add(ALICE, "second")
        assert texts(service.recall(ALICE, [], session="s").long_lived) == ["first"]
    service._store.close()


def test_the_map_grows_in_both_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FIRST_MAP_BYTES", MIB)
    service = make_service(tmp_path)
    with Child(tmp_path) as child:  # its map is larger from the start
        service.add(ALICE, "small")
        child.run("[service.add(ALICE, 'x' * 2**20).id for _ in range(5)]")
        assert len(service.list(ALICE).records) == 6
        service.add(ALICE, "y" * MIB)
        assert child.run("len(service.list(ALICE).records)") == "7"
    assert service.stats()["map_bytes"] > 5 * MIB
    service._store.close()


def test_the_map_doubles_until_the_write_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FIRST_MAP_BYTES", MIB)
    service = make_service(tmp_path)
    calls = 0

    def work(user: object) -> None:
        nonlocal calls
        calls += 1
        user.insert(service._now(), text="x" * 5 * MIB, type="fact", pinned=False, tags=(), session=None)  # type: ignore[attr-defined]

    service._store.write(ALICE, work)
    assert calls == 4  # 1, 2, 4, 8 MiB
    assert service.stats()["map_bytes"] == 8 * MIB
    service._store.close()


def test_growing_waits_for_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FIRST_MAP_BYTES", MIB)
    service = make_service(tmp_path)
    service.add(ALICE, "first")
    writer = threading.Thread(target=service.add, args=(ALICE, "x" * MIB))
    with service._store.read(ALICE) as user:
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        assert [record.text for record in user.scan()] == ["first"]
    writer.join()
    assert len(service.list(ALICE).records) == 2
    service._store.close()


@pytest.mark.parametrize("size_bytes", [10, 3000, 200_000])
def test_a_full_map_refuses_writes_keeps_all_and_can_delete(tmp_path: Path, size_bytes: int) -> None:
    service = make_service(tmp_path, max_map_bytes=MIB)
    stored = []
    with pytest.raises(StoreFull, match=r"raise memory\.max_map_bytes"):
        while True:
            stored.append(service._store.write(ALICE, lambda user: [
                user.insert(service._now(), text="x" * size_bytes, type="fact", pinned=False, tags=(), session=None).id
                for _ in range(min(100_000 // size_bytes, 100) + 1)
            ]))  # fmt: skip
    ids = [memory_id for batch in stored for memory_id in batch]
    assert ids
    assert [record.id for record in service._store.write(ALICE, lambda user: list(user.scan()), frees=True)] == ids
    for memory_id in ids[: len(ids) // 2 + 1][:20]:
        service.delete(ALICE, memory_id)
    assert service.stats()["map_bytes"] <= MIB + store_module.DELETE_RESERVE_BYTES
    service.delete_all(ALICE)
    service.add(ALICE, "room again")
    assert texts(service.list(ALICE).records) == ["room again"]
    service._store.close()


def test_a_deletion_may_need_more_room_than_there_is(tmp_path: Path) -> None:
    service = make_service(tmp_path, max_map_bytes=MIB)
    record = service.add(ALICE, "in many sessions")
    session = sessions.freeze([record.id] * 20, service._now())
    service._store.write(ALICE, lambda user: [user.put_session(str(i), session) for i in range(400)])
    for size_bytes in (3000, 10):
        with pytest.raises(StoreFull):
            while True:
                service.add(BOB, "x" * size_bytes)
    assert service.delete(ALICE, record.id).sessions == 400
    stats = service.stats()
    assert stats["map_bytes"] == max(MIB, stats["file_bytes"])  # the reserve is taken back
    service._store.close()


def test_remember_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(tmp_path)
    moments = iter([service._now()])
    monkeypatch.setattr(service, "_now", lambda: next(moments))
    with pytest.raises(StopIteration):
        service.remember(ALICE, [{"role": "user", "content": "I like tea. I like milk."}])
    assert service.list(ALICE).records == ()
    service._store.close()


RLIM_INFINITY = resource.RLIM_INFINITY


def limit_file_size(size_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(tmp_path)
    service.add(ALICE, "before")
    limit_file_size((tmp_path / "data.mdb").stat().st_size + 65536)
    try:
        with pytest.raises(StoreError, match="nothing of this write was stored"):
            service.add(ALICE, "x" * MIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
        with pytest.raises(StoreFull, match=r"disk .* is full"):
            service.add(ALICE, "x" * MIB)
    finally:
        limit_file_size(RLIM_INFINITY)
    assert texts(service.list(ALICE).records) == ["before"]
    service.add(ALICE, "x" * MIB)
    assert len(service.list(ALICE).records) == 2
    service._store.close()


class TestOpening:
    def test_twice_in_one_process_is_refused(self, tmp_path: Path) -> None:
        store = MemoryStore(tmp_path, MIB)
        with pytest.raises(DataDirError, match="open already"):
            MemoryStore(tmp_path, MIB)
        store.close()
        MemoryStore(tmp_path, MIB).close()

    def test_in_a_forked_child_is_an_error(self, tmp_path: Path) -> None:
        store = MemoryStore(tmp_path, MIB)
        store._pid = -1
        with pytest.raises(AssertionError, match="fork"):
            store.stats()
        store._pid = os.getpid()
        store.close()

    @pytest.mark.parametrize("parent", ["file", "file/below"])
    def test_no_directory(self, tmp_path: Path, parent: str) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(DataDirError, match="check data_dir"):
            MemoryStore(tmp_path / parent, MIB)

    def test_no_permission(self) -> None:
        with pytest.raises(DataDirError, match="check data_dir"):
            MemoryStore(Path("/proc/memos"), MIB)

    @pytest.mark.parametrize("content", [b"x" * 10_000, b"\0" * 4096, b"short"])
    def test_no_lmdb_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "data.mdb").write_bytes(content)
        with pytest.raises(DataDirError, match="damaged or no LMDB file"):
            MemoryStore(tmp_path, MIB)
        assert (tmp_path / "data.mdb").read_bytes() == content

    def test_a_newer_schema(self, tmp_path: Path) -> None:
        store = MemoryStore(tmp_path, MIB)
        with store._begin(write=True) as txn:
            txn.put(b"schema_version", b"99", db=store._dbs["meta"])
        store.close()
        with pytest.raises(DataDirError, match="upgrade Memos"):
            MemoryStore(tmp_path, MIB)
        with lmdb.open(str(tmp_path), max_dbs=16) as env, env.begin() as txn:
            assert txn.get(b"schema_version", db=env.open_db(b"meta", txn)) == b"99"

    @pytest.mark.parametrize("pages_kept", [2, 3, 5, 10, 20, 40])
    def test_a_truncated_file(self, tmp_path: Path, pages_kept: int) -> None:
        service = make_service(tmp_path)
        for _ in range(20):
            service.add(ALICE, "tea " * 3000)
        service._store.close()
        os.truncate(tmp_path / "data.mdb", pages_kept * 4096)
        with pytest.raises(DataDirError, match="damaged"):
            MemoryStore(tmp_path, MIB)
        assert (tmp_path / "data.mdb").stat().st_size == pages_kept * 4096

    def test_a_file_that_is_short_of_free_pages_only(self, tmp_path: Path) -> None:
        service = make_service(tmp_path)
        service.add(ALICE, "tea")
        for _ in range(5):
            big = service.add(BOB, "x" * MIB)
            service.delete(BOB, big.id)
        service.add(BOB, "y")
        size = (tmp_path / "data.mdb").stat().st_size
        service._store.close()
        os.truncate(tmp_path / "data.mdb", size - 4096)
        service = make_service(tmp_path)
        assert texts(service.list(ALICE).records) == ["tea"]
        service._store.close()
