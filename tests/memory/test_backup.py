"""``memos backup``: what stands in it, and that it is whole however busy the server is."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import lmdb
import pytest

from memos_vllm import backup, cli, data_dir, doctor
from memos_vllm.adapters import backup as adapter_backup
from memos_vllm.memory import tables
from tests.adapters.adapter_factories import ALICE as SELLER
from tests.adapters.adapter_factories import adapter_folder, open_registry
from tests.memory import kill_load
from tests.memory.memory_factories import ALICE, make_service
from tests.memory.test_doctor import fill
from tests.memory.test_kill import Expected

WHOLE, PARTIAL, FAILED = backup.WHOLE, backup.PARTIAL, backup.FAILED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data directory with something of everything, which no process has open."""
    root = tmp_path / "data"
    fill(root)._store.close()
    data_dir.secret(root)
    registry = open_registry(root / "adapters")
    for seed, name in enumerate(("style", "tone")):
        registry.register(SELLER, name, adapter_folder(tmp_path / "sent" / name, seed))
    registry.close()
    (root / "adapters" / "distillations").mkdir()
    for name in ("predictor.json", "predictor-1.json", "forgotten_owners", "lock", "kv/dp0/chunk", "sources/data.mdb"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    os.utime(root / "predictor.json", (1e9, 1e9))
    return root


def contents(root: Path) -> tuple[Any, ...]:
    service = make_service(root / "memory")
    records = service.list(ALICE, include_superseded=True).records
    found = records, [service.history(ALICE, record.id) for record in records], service.kv_epoch(ALICE)
    service._store.close()
    registry = open_registry(root / "adapters")
    for name in ("style", "tone"):
        with registry.use(SELLER, name) as used:
            found += (used.reference, used.version)
    registry.close()
    return found


def test_a_backup_is_a_data_directory(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with data_dir.exclusive(root):  # as a server holds it
        assert cli.main(["backup", str(root), str(tmp_path / "copy")]) == WHOLE
    copy = tmp_path / "copy"
    assert {file.name for file in copy.iterdir()} == {
        "secret", "memory", "adapters", "predictor.json", "predictor-1.json", "forgotten_owners"
    }  # fmt: skip
    assert {file.name for file in (copy / "adapters").iterdir()} == {"index", "objects", "base.json"}
    assert data_dir.secret(copy) == data_dir.secret(root)
    assert (copy / "predictor.json").stat().st_mtime == 1e9, "its age says which deletions it knows"
    for file, mode in (("secret", 0o600), ("memory/data.mdb", 0o600), (".", 0o700), ("memory", 0o700)):
        assert stat.S_IMODE((copy / file).stat().st_mode) == mode, "as private as what it is a copy of"
    assert doctor.main([str(copy)]) == doctor.CLEAN
    assert contents(copy) == contents(root)
    assert {folder.name for folder in tmp_path.iterdir()} == {"data", "copy", "sent"}, "no leftovers"


def test_beside_a_server_that_writes(tmp_path: Path) -> None:
    """Each backup holds all that was acknowledged before it began, half of nothing, and agrees with itself."""
    root = tmp_path / "data"
    root.mkdir()
    data_dir.secret(root)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.memory.kill_load"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=kill_load.run, args=(root / "memory", 7, theirs))
    child.start()
    theirs.close()
    heard: list[Any] = []
    has_more = threading.Condition()

    def listen() -> None:
        try:
            while True:
                message = json.loads(ours.recv_bytes())
                with has_more:
                    heard.append(message)
                    has_more.notify()
        except EOFError:
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    began = []
    for number in range(4):
        with has_more:
            assert has_more.wait_for(lambda wanted=100 * (number + 1): len(heard) > wanted, timeout=60)
            began.append(len(heard))
        assert backup.main([str(root), str(tmp_path / str(number))]) == WHOLE
    child.kill()
    child.join()
    listener.join()
    for number, before in enumerate(began):
        assert doctor.main([str(tmp_path / str(number))]) == doctor.CLEAN
        service = make_service(tmp_path / str(number) / "memory")
        texts, problems = kill_load.found(service)
        service._store.close()
        assert problems == []
        expected = Expected()
        for message in heard[1:before]:
            expected.hear(*message)
        later = [*expected.under_way.values(), *(what for kind, _, what in heard[before:] if kind == "tries")]
        changed = {what["changes"] for what in later if "changes" in what}
        assert len(expected.texts) > 5 * (number + 1)
        for memory, text in expected.texts.items():
            assert memory in changed or texts.get(memory) == text
    assert len(heard) > began[-1]


def test_a_store_of_an_earlier_version_is_copied_as_it_is(root: Path, tmp_path: Path) -> None:
    with lmdb.open(str(root / "memory"), max_dbs=len(tables.NAMES)) as env, env.begin(write=True) as txn:
        txn.put(b"schema_version", b"1", db=env.open_db(b"meta", txn))
    assert backup.main([str(root), str(tmp_path / "copy")]) == WHOLE
    with lmdb.open(str(tmp_path / "copy" / "memory"), readonly=True, max_dbs=1) as env, env.begin() as txn:
        assert txn.get(b"schema_version", db=env.open_db(b"meta", txn, create=False)) == b"1"


def test_a_content_that_is_deleted_meanwhile(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_content = adapter_backup._copy_content
    deleted = []

    def delete_first(files: Any, digest: str, objects: Path) -> bool:
        if not deleted and list(objects.iterdir()):
            registry = open_registry(root / "adapters")
            (name,) = [each.name for each in registry.list(SELLER) if each.version().digest == digest]
            (gone,) = registry.delete(SELLER, name).contents
            assert registry.remove_files(gone)
            deleted.append(name)
            registry.close()
        return copy_content(files, digest, objects)

    monkeypatch.setattr(adapter_backup, "_copy_content", delete_first)
    assert backup.main([str(root), str(tmp_path / "copy")]) == WHOLE
    assert deleted and doctor.main([str(tmp_path / "copy")]) == doctor.CLEAN
    registry = open_registry(tmp_path / "copy" / "adapters")
    assert {adapter.name for adapter in registry.list(SELLER)} == {"style", "tone"} - set(deleted)
    registry.close()


def test_an_adapter_without_files_is_told(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(next((root / "adapters" / "objects").iterdir()))
    assert backup.main([str(root), str(tmp_path / "copy")]) == PARTIAL
    assert "@1 of shop/alice has no files" in capsys.readouterr().err


def test_memories_in_a_database_are_not_in_it(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "memory")
    assert backup.main([str(root), str(tmp_path / "copy")]) == FAILED
    assert "--config" in capsys.readouterr().err
    file = tmp_path / "memos.yaml"
    file.write_text("memory: {store: postgresql, dsn: 'postgresql://memos:hush@nowhere.invalid/memos'}")
    assert backup.main([str(root), str(tmp_path / "copy"), "--config", str(file)]) == PARTIAL
    said = capsys.readouterr()
    assert "pg_dump" in said.err and "hush" not in said.err + said.out
    assert data_dir.secret(tmp_path / "copy") == data_dir.secret(root)
    registry = open_registry(tmp_path / "copy" / "adapters")
    assert len(registry.list(SELLER)) == 2
    registry.close()


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("nowhere", "copy", "no data_dir"),
        ("sent", "copy", "no data_dir"),
        ("data", "sent", "is there already"),
        ("data", "data/copy", "lies in the directory"),
        ("data", "missing/copy", "missing"),
    ],
)
def test_what_cannot_be_backed_up_leaves_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, target: str, words: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert backup.main([str(tmp_path / source), str(tmp_path / target)]) == FAILED
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_room_nothing_is_left(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.memory.test_memory_store import RLIM_INFINITY, limit_file_size

    before = sorted(tmp_path.rglob("*"))
    limit_file_size(8192)
    try:
        assert backup.main([str(root), str(tmp_path / "copy")]) == FAILED
    finally:
        limit_file_size(RLIM_INFINITY)
    assert capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
