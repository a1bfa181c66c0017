"""``memos doctor``: finds what does not agree, mends it from the records, and leaves a sound store alone."""

from __future__ import annotations

import json
import os
import re
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from memos_vllm import cli, data_dir, doctor
from memos_vllm.errors import DataDirError
from memos_vllm.memory import environment, maintenance, tables
from memos_vllm.memory.service import MemoryService
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB, GIB, make_service, says, texts

CLEAN, PROBLEMS, FAILED = doctor.CLEAN, doctor.PROBLEMS, doctor.FAILED


def fill(root: Path) -> MemoryService:
    """A store with something in every table: versions, a correction, a session."""
    service = make_service(root / "memory")
    fill_service(service)
    return service


def fill_service(service: MemoryService) -> None:
    tea = service.add(ALICE, "I like tea.")
    for text in ("I like milk.", "I like water."):
        service.update(ALICE, tea.id, text=text)
    for job in ("baker", "pilot"):
        service.remember(ALICE, says(f"My job is {job}."))
    service.recall(ALICE, says("job"), session="s")
    service.add(BOB, "of bob")
    fill_life(service, tea.id)


def damage(root: Path, how: Callable[[Any, Any], Any]) -> None:
    service = fill(root)
    service._store.maintain(how)
    service._store.close()


def fill_life(service: MemoryService, memory_id: str) -> None:
    """Something in the tables of the life of memories, too."""
    other = service.add(ALICE, "Bread is good.")
    twin = service.add(ALICE, "Bread is very good.")
    service.life.merge(ALICE, other.id, [twin.id])
    service.life.link(ALICE, memory_id, other.id, "related_to")
    service.life.used(ALICE, {"late": [memory_id]}, session="s")
    service.life.take_snapshot(ALICE, "now")


def key(txn: Any, dbs: Any, table: str, place: int = 0) -> bytes:
    return [bytes(each) for each in txn.cursor(db=dbs[table]).iternext(values=False)][place]


def put(table: str, value: Callable[[bytes], bytes], place: int = 0) -> Callable[[Any, Any], Any]:
    def how(txn: Any, dbs: Any) -> None:
        where = key(txn, dbs, table, place)
        txn.put(where, value(txn.get(where, db=dbs[table])), db=dbs[table])

    return how


def delete(table: str, place: int = 0) -> Callable[[Any, Any], Any]:
    return lambda txn, dbs: txn.delete(key(txn, dbs, table, place), db=dbs[table])


def change_json(**values: Any) -> Callable[[bytes], bytes]:
    return lambda raw: json.dumps({**json.loads(raw), **values}).encode()


def orphan_version(txn: Any, dbs: Any) -> None:
    where = key(txn, dbs, "versions")
    txn.put(where[:8] + uuid.uuid4().bytes + where[24:], txn.get(where, db=dbs["versions"]), db=dbs["versions"])


def low_last_id(raw: bytes) -> bytes:
    number, kv_epoch, seq, _ = struct.unpack(">QQQ16s", raw)
    return struct.pack(">QQQ16s", number, kv_epoch, seq, bytes(16))


def put_owner(who: Principal, raw: bytes | None) -> Callable[[Any, Any], Any]:
    def how(txn: Any, dbs: Any) -> None:
        txn.delete(tables.owner_key(who), db=dbs["owners"])
        if raw is not None:
            txn.put(tables.owner_key(who), raw, db=dbs["owners"])

    return how


NOWHERE = str(uuid.UUID(int=7 << 76 | 2 << 62))
MENDABLE = {
    "a record that is no JSON": (put("records", lambda raw: raw[: len(raw) // 2]), "records 1/.*cannot be read"),
    "a record of another user": (put("records", change_json(user="bob")), "belongs to no user"),
    "a record under another key": (put("records", change_json(id=NOWHERE)), "says that it is"),
    "a record that supersedes nothing": (put("records", change_json(supersedes=NOWHERE)), "supersedes .* not there"),
    "a version of nothing": (orphan_version, "versions 1/.* is not there"),
    "a version that is no JSON": (put("versions", lambda raw: b"{"), "versions 1/.*cannot be read"),
    "no entry for what is said": (delete("current"), "current 1/.* is not found by"),
    "an entry for what is not said": (
        lambda txn, dbs: txn.put(key(txn, dbs, "current")[:8] + b"t" + bytes(16), key(txn, dbs, "records")[8:],
                                 db=dbs["current"]),
        "current 1/.* does not say",
    ),
    "a gap in the change log": (delete("changes", 1), "changes 1: the log has a gap"),
    "an end of the change log": (delete("changes", -1), "changes 2: the log has a gap"),
    "a change of no kind": (put("changes", lambda raw: b"X" + raw[1:]), "changes 1: the log has a gap"),
    "changes of no user": (
        lambda txn, dbs: txn.put(tables.number_key(9) * 2, tables.PUT + bytes(16), db=dbs["changes"]),
        "changes 9: belongs to no user",
    ),
    "a session of nothing": (put("sessions", change_json(ids=[NOWHERE])), "sessions .* not there"),
    "a session that is no JSON": (put("sessions", lambda raw: b"["), "sessions .*cannot be read"),
    "an owner number that comes again": (
        lambda txn, dbs: txn.put(b"next_owner", b"1", db=dbs["meta"]), "next_owner: 1 was given already",
    ),
    "a row of usage that is not there": (delete("usage"), "usage 1/.* time does not find it"),
    "a row of usage of nothing": (
        lambda txn, dbs: txn.put(bytes(24), bytes(32), db=dbs["usage"]), "usage 0/.* not there",
    ),
    "a moment that is not there": (delete("due"), "usage 1/.* time does not find it"),
    "a moment of nothing": (lambda txn, dbs: txn.put(bytes(32), b"", db=dbs["due"]), "due 0/.* too often"),
    "an event that is no JSON": (put("events", lambda raw: b"["), "events 1/.* cannot be read"),
    "an event of nothing": (
        lambda txn, dbs: txn.put(bytes(32), txn.get(key(txn, dbs, "events"), db=dbs["events"]), db=dbs["events"]),
        "events 0/.* of no memory",
    ),
    "a vector of nothing": (lambda txn, dbs: txn.put(bytes(24), b"v", db=dbs["vectors"]), "vectors 0/.* not there"),
    "a link that is no JSON": (put("links", lambda raw: b"["), "links 1/.* cannot be read"),
    "a link to nothing": (put("links", change_json(**{"to": NOWHERE}), -1), "links 1/.* not there"),
    "a link that an end does not know": (delete("link_ends"), "links 1/.* does not know the link"),
    "an end of no link": (delete("links", -1), "link_ends 1/.* not there"),
    "a correction without a link": (delete("links"), "records 1/.* has no link to"),
    "a link that tells of another end": (
        put("links", change_json(valid_to="2026-01-02T00:00:00+00:00")), "links .* something else",
    ),
    "a snapshot that is no JSON": (put("snapshots", lambda raw: b"["), "snapshots .*cannot be read"),
    "a snapshot of nothing": (delete("records"), "snapshot_entries 1/.* not there"),
    "KV of no past epoch": (
        lambda txn, dbs: txn.put(key(txn, dbs, "records")[:8] + bytes(8), b'["acme", "alice"]', db=dbs["kv_removals"])
        and [txn.put(k, v[:8] + bytes(8) + v[16:], db=dbs["owners"]) for k, v in list(txn.cursor(db=dbs["owners"]))],
        "kv_removals .* no past epoch",
    ),
    "an id that would come again": (
        lambda txn, dbs: [txn.put(k, low_last_id(v), db=dbs["owners"]) for k, v in list(txn.cursor(db=dbs["owners"]))],
        "a later memory exists",
    ),
}  # fmt: skip


BROKEN_OWNERS = {
    "a row of a user that cannot be read": (put_owner(ALICE, bytes(7)), "owners .* user 1 does not fit its records"),
    "a row of a user that is not there": (put_owner(ALICE, None), "owners .* user 1 is missing"),
    "a user with the number of another": (put_owner(ALICE, tables.Owner(2).encode()), "owners .* user 1 does not fit"),
    "a user with the number of nobody": (put_owner(ALICE, tables.Owner(77).encode()), "owners .* user 1 does not fit"),
}
MENDABLE |= BROKEN_OWNERS
LEAVES_A_GAP = {"a version that is no JSON"}


@pytest.mark.parametrize("case", MENDABLE)
def test_finds_and_mends(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    how, words = MENDABLE[case]
    damage(tmp_path, how)
    before = (tmp_path / "memory" / "data.mdb").read_bytes()
    assert doctor.main([str(tmp_path)]) == PROBLEMS
    assert re.search(words, capsys.readouterr().out)
    assert (tmp_path / "memory" / "data.mdb").read_bytes() == before, "an examination changes nothing"
    doctor.main([str(tmp_path), "--repair"])
    out = capsys.readouterr().out
    assert re.search("mended: .*" + words, out)
    assert doctor.main([str(tmp_path)]) == (PROBLEMS if case in LEAVES_A_GAP else CLEAN), capsys.readouterr().out
    service = make_service(tmp_path / "memory")
    assert texts(service.list(BOB).records) == ["of bob"]
    hits = {hit.record.id for hit in service.search(ALICE, "tea milk water job pilot bread")}
    assert hits == {record.id for record in service.list(ALICE).records} and len(hits) >= 1
    service.add(ALICE, "goes on")
    service._store.close()


@pytest.mark.parametrize("case", BROKEN_OWNERS)
def test_a_user_whose_row_is_broken_keeps_all(tmp_path: Path, case: str) -> None:
    service = fill(tmp_path)
    records = service.list(ALICE, include_superseded=True).records
    histories = [service.history(ALICE, record.id) for record in records]
    past = service.past_kv_epochs(ALICE)
    service._store.maintain(BROKEN_OWNERS[case][0])
    service._store.close()
    mended, left = maintenance.repair(tmp_path / "memory", GIB)
    assert [problem.table for problem in mended] == ["owners"] and not left.problems
    service = make_service(tmp_path / "memory")
    assert service.list(ALICE, include_superseded=True).records == records
    assert [service.history(ALICE, record.id) for record in records] == histories
    assert service.past_kv_epochs(ALICE) == past and service.kv_epoch(ALICE) > max(past)
    assert service.add(ALICE, "goes on").id > max(record.id for record in records)
    service.add(Principal("acme", "carol"), "of carol")
    assert texts(service.list(BOB).records) == ["of bob"]
    service._store.close()


def test_a_user_without_records_is_told_by_kv_that_is_to_be_removed(tmp_path: Path) -> None:
    service = fill(tmp_path)
    service.delete_all(ALICE)
    past = service.past_kv_epochs(ALICE)
    service._store.maintain(put_owner(ALICE, bytes(7)))
    service._store.close()
    assert not maintenance.repair(tmp_path / "memory", GIB)[1].problems
    service = make_service(tmp_path / "memory")
    assert service.past_kv_epochs(ALICE) == past and service.kv_epoch(ALICE) > max(past)
    service._store.close()


def test_what_is_taken_out_is_kept_aside(tmp_path: Path) -> None:
    damage(tmp_path, put("records", lambda raw: raw[:-5]))
    doctor.main([str(tmp_path), "--repair"])
    files = (tmp_path / "memory").glob("taken-out-*.jsonl")
    taken = [json.loads(line) for aside in files for line in aside.read_text().splitlines()]
    (record,) = [each["value"] for each in taken if each["table"] == "records"]
    assert "I like water." in record


def test_a_gap_in_a_history_is_told_and_cannot_be_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(tmp_path, delete("versions", 0))
    assert doctor.main([str(tmp_path), "--repair"]) == PROBLEMS
    assert "version 1 is missing (cannot be mended)" in capsys.readouterr().out


def test_an_index_follows_a_mended_log(tmp_path: Path) -> None:
    service = fill(tmp_path)
    assert len(service.search(ALICE, "job pilot")) == 1
    with service._store.read(ALICE) as user:
        seq = user.seq
    service._store.maintain(delete("changes", 1))
    service._store.close()
    maintenance.repair(tmp_path / "memory", GIB)
    service = make_service(tmp_path / "memory")
    with service._store.read(ALICE) as user:
        assert user.seq > seq + tables.CHANGES_KEPT
        assert [each for each, _ in user.changes_after(user.seq - 1)] == [tables.PUT]
    service._store.close()


class TestCommand:
    def test_a_sound_store(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fill(tmp_path)._store.close()
        assert cli.main(["doctor", str(tmp_path)]) == CLEAN
        assert capsys.readouterr().out.endswith("all is well\n")

    def test_beside_a_server(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fill(tmp_path)._store.close()
        with data_dir.exclusive(tmp_path):
            assert doctor.main([str(tmp_path)]) == CLEAN
            for option in ("--repair", "--compact"):
                assert doctor.main([str(tmp_path), option]) == FAILED
                assert "in use" in capsys.readouterr().err
        assert doctor.main([str(tmp_path), "--compact"]) == CLEAN

    @pytest.mark.parametrize("path", ["nowhere", "empty", "kv"])
    def test_of_no_store(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "kv" / "memory").mkdir(parents=True)
        lmdb.open(str(tmp_path / "kv" / "memory")).close()
        before = sorted(tmp_path.rglob("*"))
        for options in ([], ["--repair"], ["--compact"], ["--repair", "--compact"]):
            if path == "kv" and options:
                continue  # a repair makes a store of a file of LMDB without tables
            assert doctor.main([str(tmp_path / path), *options]) == FAILED
            assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(DataDirError, match="no memory store"):
            maintenance.repair(tmp_path / "empty" / "memory", GIB)
        assert sorted(tmp_path.rglob("*")) == before, "nothing is created"

    def test_of_a_server_with_a_database_names_the_configuration(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data_dir.secret(tmp_path)
        for options in ([], ["--repair"]):
            assert doctor.main([str(tmp_path), *options]) == FAILED
            message = capsys.readouterr().err
            assert "there is no memory store" in message and "--config" in message
        assert [file.name for file in tmp_path.iterdir()] == ["secret"]

    def test_of_a_torn_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fill(tmp_path)._store.close()
        data = tmp_path / "memory" / "data.mdb"
        os.truncate(data, data.stat().st_size // 2)
        for option in ([], ["--repair"], ["--compact"]):
            assert doctor.main([str(tmp_path), *option]) == FAILED
            assert data.name in capsys.readouterr().err

    def test_many_problems_are_counted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        service = fill(tmp_path)
        service.add_many(ALICE, [{"text": f"tea {i}"} for i in range(100)])
        service._store.maintain(lambda txn, dbs: txn.drop(dbs["current"], delete=False))
        service._store.close()
        assert doctor.main([str(tmp_path)]) == PROBLEMS
        assert "current: 191 more" in capsys.readouterr().out


class TestCompact:
    def test_gives_back_room_and_keeps_all(self, tmp_path: Path) -> None:
        service = fill(tmp_path)
        for _ in range(5):
            service.delete(BOB, service.add(BOB, "x" * 2**20).id)
        kept = service.list(ALICE, include_superseded=True).records
        service._store.close()
        before, after = maintenance.compact(tmp_path / "memory")
        assert after < before / 5 and after == (tmp_path / "memory" / "data.mdb").stat().st_size
        assert b"xxxxxxxx" not in (tmp_path / "memory" / "data.mdb").read_bytes()
        service = make_service(tmp_path / "memory")
        assert service.list(ALICE, include_superseded=True).records == kept
        service.add(ALICE, "goes on")
        service._store.close()

    def test_without_room_nothing_changes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from tests.memory.test_memory_store import RLIM_INFINITY, limit_file_size

        fill(tmp_path)._store.close()
        data = tmp_path / "memory" / environment.DATA_FILE
        before = data.read_bytes()
        limit_file_size(8192)
        try:
            assert doctor.main([str(tmp_path), "--compact"]) == FAILED
        finally:
            limit_file_size(RLIM_INFINITY)
        assert capsys.readouterr().err
        assert data.read_bytes() == before and not (tmp_path / "memory" / "compact.tmp").exists()
