"""A store of an earlier schema is brought up to date when it is opened, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from memos_vllm.core.lifecycle import State
from memos_vllm.errors import DataDirError
from memos_vllm.memory import maintenance, migrations, tables
from memos_vllm.memory import store as store_module
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from tests.memory.memory_factories import ALICE, GIB, make_service, says, texts

V1_TABLES = ("meta", "owners", "records", "versions", "current", "changes", "sessions")
IDS = [str(uuid.UUID(int=0x019B7CA98C887000 << 64 | 0x8000000000000000 | place)) for place in range(4)]
BAKER, PILOT, TEA, LOST = IDS


def write_version_1(path: Path, padding: int = 0) -> None:
    """What version 1 of the store wrote for one user: a correction, an update, and one whose correction was deleted."""
    moment = "2026-01-02T03:04:05+00:00"

    def record(memory_id: str, text: str, **values: object) -> bytes:
        fields = {
            "id": memory_id, "tenant": "acme", "user": "alice", "type": "fact", "text": text, "pinned": False,
            "tags": [], "session": None, "created_at": moment, "updated_at": moment, "version": 1, "uses": 1,
            "supersedes": None, "superseded_by": None, "valid_to": None, "origin": {"source": "api"},
        }  # fmt: skip
        return json.dumps({**fields, **values}, ensure_ascii=False, separators=(",", ":")).encode()

    path.mkdir()
    with lmdb.open(str(path), max_dbs=7, map_size=2**24) as env, env.begin(write=True) as txn:
        dbs = {name: env.open_db(name.encode(), txn, dupsort=name == "current") for name in V1_TABLES}
        owner = (1).to_bytes(8, "big")
        keys = [owner + uuid.UUID(each).bytes for each in IDS]
        txn.put(b"schema_version", b"1", db=dbs["meta"])
        txn.put(b"next_owner", b"2", db=dbs["meta"])
        who = b"".join(len(part).to_bytes(4, "big") + part for part in (b"acme", b"alice"))
        row = struct.pack(">QQQ16s", 1, 1, 5, uuid.UUID(LOST).bytes)
        txn.put(hashlib.sha256(who).digest(), row, db=dbs["owners"])
        baker = record(BAKER, "My job is baker.", superseded_by=PILOT, valid_to=moment)
        txn.put(keys[0], baker, db=dbs["records"])
        txn.put(keys[1], record(PILOT, "My job is pilot.", supersedes=BAKER), db=dbs["records"])
        txn.put(keys[2], record(TEA, "I like green tea." + "x" * padding, version=2), db=dbs["records"])
        txn.put(keys[2] + (1).to_bytes(4, "big"), record(TEA, "I like tea."), db=dbs["versions"])
        gone = str(uuid.UUID(int=1))
        txn.put(keys[3], record(LOST, "My name is Ann.", superseded_by=gone, valid_to=moment), db=dbs["records"])
        for seq, key in enumerate([keys[0], keys[1], keys[2], keys[2], keys[3]], 1):
            txn.put(owner + seq.to_bytes(8, "big"), b"P" + key[8:], db=dbs["changes"])


def schema_of(path: Path) -> bytes:
    with lmdb.open(str(path), max_dbs=20) as env, env.begin() as txn:
        return bytes(txn.get(b"schema_version", db=env.open_db(b"meta", txn)))


def test_version_1_keeps_all_and_gets_what_is_new(tmp_path: Path) -> None:
    write_version_1(tmp_path / "memory")
    service = make_service(tmp_path / "memory")
    everything = service.list(ALICE, include_superseded=True).records
    assert texts(everything) == ["My job is baker.", "My job is pilot.", "I like green tea.", "My name is Ann."]
    assert {record.state for record in everything} == {State.GENERATED}
    assert texts(service.list(ALICE).records) == ["My job is pilot.", "I like green tea."]
    assert texts(service.history(ALICE, PILOT)) == ["My job is baker.", "My job is pilot."]
    assert texts(service.history(ALICE, TEA)) == ["I like tea.", "I like green tea."]
    assert [(link.source, link.target) for link in service.life.links(ALICE, BAKER)] == [(PILOT, BAKER)]
    lost = service.get(ALICE, LOST)
    assert lost.superseded_by is None and lost.valid_to is not None
    assert service.life.cube(ALICE, TEA)["header"]["governance"]["due_at"] is not None
    assert service.remember(ALICE, says("My job is pilot."))[0].id == PILOT
    assert service.remember(ALICE, says("I really like green tea."))[0].id == TEA
    assert service.kv_epoch(ALICE) == 1
    service._store.close()
    assert schema_of(tmp_path / "memory") == str(tables.SCHEMA_VERSION).encode()
    assert maintenance.examine(tmp_path / "memory").problems == []


def test_version_3_finds_what_became_a_claim(make: Callable[..., MemoryService]) -> None:
    service = make()
    paris = service.remember(ALICE, says("I live in Paris."))[0]

    def back_to_3(txn: Any, dbs: Any) -> None:
        for key in list(txn.cursor(db=dbs["current"]).iternext(values=False)):
            if key[8:9] == b"s":
                txn.delete(key, db=dbs["current"])
        txn.put(b"schema_version", b"3", db=dbs["meta"])

    service._store.maintain(back_to_3)
    service._store.close()
    renewed = make()
    assert maintenance.examine_open(renewed._store).problems == []
    berlin = renewed.remember(ALICE, says("I live in Berlin."))[0]
    assert berlin.supersedes == paris.id and texts(renewed.list(ALICE).records) == ["I live in Berlin."]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version_1(tmp_path / "memory")

    def fail(*arguments: object) -> None:
        migrations._to_2(*arguments)  # type: ignore[arg-type]
        raise lmdb.DiskError("no room")

    monkeypatch.setitem(migrations.STEPS, 1, fail)
    with pytest.raises(DataDirError):
        MemoryStore(tmp_path / "memory", GIB)
    assert schema_of(tmp_path / "memory") == b"1"
    monkeypatch.undo()
    service = make_service(tmp_path / "memory")
    assert len(service.list(ALICE, include_superseded=True).records) == 4
    service._store.close()


def test_the_map_grows_for_a_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version_1(tmp_path / "memory", padding=900_000)
    monkeypatch.setattr(store_module, "FIRST_MAP_BYTES", 2**20)
    service = make_service(tmp_path / "memory")
    assert service.stats()["memories"] == 4
    service._store.close()


def test_every_version_has_its_step() -> None:
    assert set(migrations.STEPS) == set(range(1, tables.SCHEMA_VERSION))


def test_the_doctor_does_not_touch_an_older_store(tmp_path: Path) -> None:
    write_version_1(tmp_path / "memory")
    with pytest.raises(DataDirError, match="schema 1, this Memos"):
        maintenance.examine(tmp_path / "memory")
    assert schema_of(tmp_path / "memory") == b"1"
