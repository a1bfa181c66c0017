"""The store in PostgreSQL, where it is not as LMDB's: the server dies, the connection breaks, others read it."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")

from memos_vllm import cli, doctor  # noqa: E402
from memos_vllm.config import MemosConfig, load  # noqa: E402
from memos_vllm.errors import ConfigError, DataDirError, StoreError, StoreFull, StoreUncertain  # noqa: E402
from memos_vllm.memory import maintenance, postgresql, postgresql_schema  # noqa: E402
from memos_vllm.memory.opening import open_store  # noqa: E402
from memos_vllm.memory.postgresql import PostgresStore  # noqa: E402
from memos_vllm.memory.service import MemoryService  # noqa: E402
from tests.memory import kill_load, test_doctor, test_kill  # noqa: E402
from tests.memory.embedder_factories import TopicEmbedder  # noqa: E402
from tests.memory.memory_factories import ALICE, BOB, make_service, open_database, texts  # noqa: E402

KILLS = 3


@pytest.fixture
def service(dsn: str) -> Iterator[MemoryService]:
    made = make_service(dsn)
    yield made
    made._store.close()


def query(dsn: str, command: str, *arguments: Any) -> list[Any]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(command, arguments).fetchall()


def at_commit(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Any, Callable[[], Any]], None]) -> None:
    """The next COMMIT goes to ``breaks``, with the connection and what would commit."""
    execute, left = psycopg.Connection.execute, [1]

    def executed(self: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
        if command == "COMMIT" and left:
            left.clear()
            breaks(self, lambda: execute(self, command))
            self.close()
            raise psycopg.OperationalError("the connection is lost")
        return execute(self, command, *args, **kwargs)

    monkeypatch.setattr(psycopg.Connection, "execute", executed)


def test_a_connection_string_that_is_none_is_not_repeated() -> None:
    with pytest.raises(DataDirError, match=r"check memory\.dsn, which is such as") as caught:
        PostgresStore("postgresql//memos:hush@db/memos")
    assert "hush" not in str(caught.value) and caught.value.__cause__ is None


class TestLostConnections:
    def test_the_server_is_killed_within_a_load(self, postgres: Any, dsn: str) -> None:
        """The writers go on when it is there again; what was acknowledged is there once, and nothing by half."""
        open_database(dsn).close()
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        seed = random.SystemRandom().randrange(10**6)
        print(f"seed {seed}")
        child = context.Process(target=kill_load.run, args=(dsn, seed, theirs))
        child.start()
        theirs.close()
        expected, rng = test_kill.Expected(), random.Random(seed)
        assert json.loads(ours.recv_bytes()) == ["found", {}, []]
        for _ in range(KILLS):
            wanted = expected.acknowledged + rng.randrange(20, 60)
            while expected.acknowledged < wanted:
                expected.hear(*json.loads(ours.recv_bytes()))
            postgres.kill()
            postgres.start()
        wanted = expected.acknowledged + 20
        while expected.acknowledged < wanted:
            expected.hear(*json.loads(ours.recv_bytes()))
        assert child.is_alive()
        child.kill()
        try:
            while True:
                expected.hear(*json.loads(ours.recv_bytes()))
        except (EOFError, OSError):
            child.join()
        service = make_service(dsn)
        found, problems = kill_load.found(service)
        service._store.close()
        assert problems == []
        expected.meet(found)

    def test_broken_connections_are_replaced(self, postgres: Any, service: MemoryService) -> None:
        service.add(ALICE, "before")
        postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'memos'")
        assert texts(service.list(ALICE).records) == ["before"]
        postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'memos'")
        service.add(ALICE, "after")
        assert texts(service.list(ALICE).records) == ["before", "after"]

    def test_within_a_commit_that_arrived(self, service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
        at_commit(monkeypatch, lambda connection, commit: commit())
        record = service.add(ALICE, "once")
        assert service.list(ALICE).records == (record,)

    def test_within_a_commit_that_did_not(self, service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
        at_commit(monkeypatch, lambda connection, commit: None)
        record = service.add(ALICE, "once")
        assert service.list(ALICE).records == (record,)

    def test_within_a_commit_and_nobody_to_ask(self, service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
        def gone(*_: object) -> None:
            raise psycopg.OperationalError("no route")

        begun = service._store._begun  # type: ignore[attr-defined]
        at_commit(monkeypatch, lambda *_: monkeypatch.setattr(service._store, "_begun", gone))
        with pytest.raises(StoreUncertain, match="look whether it is there"):
            service.add(ALICE, "perhaps")
        monkeypatch.setattr(service._store, "_begun", begun)
        assert service.list(ALICE).records == ()

    def test_a_server_that_is_away(
        self, postgres: Any, service: MemoryService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(postgresql, "RECONNECT_S", 0.2)
        known = service.add(ALICE, "known")
        postgres.stop()
        try:
            with pytest.raises(StoreError, match="nothing of this write was stored"):
                service.add(ALICE, "lost")
            with pytest.raises(StoreError, match="cannot be read"):
                service.list(ALICE)
            with pytest.raises(DataDirError, match=r"check memory\.dsn, and that PostgreSQL runs"):
                open_database(postgres.dsn())
        finally:
            postgres.start()
        assert service.list(ALICE).records == (known,)

    def test_of_a_writer_that_was_cut_off(self, dsn: str, service: MemoryService) -> None:
        """Its lock goes with its session."""
        with psycopg.connect(dsn) as other:
            other.execute(f"SELECT pg_advisory_xact_lock({postgresql_schema.LOCK})")
            other.execute("UPDATE memos.commits SET number = 99")
        assert service.stamp() >= 99
        service.add(ALICE, "goes on")


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "kind", "words"),
        [
            (psycopg.errors.DiskFull, StoreFull, "the disk .* is full and nothing"),
            (psycopg.errors.ReadOnlySqlTransaction, StoreError, "must name the primary"),
            (psycopg.errors.InternalError_, StoreError, "failed and nothing of this write was stored"),
        ],
    )
    def test_of_a_write(
        self, service: MemoryService, monkeypatch: pytest.MonkeyPatch, error: Any, kind: Any, words: str
    ) -> None:
        def fails(user: Any) -> None:
            user.put_row("sessions", b"half", b"{}")
            raise error("told by the server")

        with pytest.raises(kind, match=words):
            service._store.write(ALICE, fails)
        assert service.stats()["sessions"] == 0

    def test_a_standby_is_refused(self, dsn: str) -> None:
        with pytest.raises(DataDirError, match="must name the primary"):
            open_database(psycopg.conninfo.make_conninfo(dsn, options="-c default_transaction_read_only=on"))


class TestOpening:
    def test_configured(self, tmp_path: Path, dsn: str) -> None:
        file = tmp_path / "memos.yaml"
        pgvector = str(open_database(dsn)._vector_schema is not None).lower()  # type: ignore[attr-defined]
        file.write_text(f"data_dir: {tmp_path}\nmemory: {{store: postgresql, dsn: '{dsn}', pgvector: {pgvector}}}\n")
        store = open_store(load(file))
        assert isinstance(store, PostgresStore)
        store.close()
        assert "postgresql://" not in repr(load(file)), "it may hold a password"

    def test_without_dsn(self) -> None:
        with pytest.raises(ValidationError, match="needs 'dsn'"):
            MemosConfig(memory={"store": "postgresql"})  # type: ignore[arg-type]

    def test_without_psycopg(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "memos_vllm.memory.postgresql")
        monkeypatch.setitem(sys.modules, "psycopg", None)
        config = MemosConfig(memory={"store": "postgresql", "dsn": "dbname=x"})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"pip install 'memos-vllm\[postgresql\]'"):
            open_store(config)

    @pytest.mark.parametrize("dsn", ["nonsense", "postgresql://nobody@/postgres?host=/nowhere"])
    def test_of_no_server(self, dsn: str) -> None:
        with pytest.raises(DataDirError, match=r"check memory\.dsn"):
            open_database(dsn)

    def test_of_an_old_server(self, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(postgresql_schema, "MIN_SERVER", 990000)
        with pytest.raises(DataDirError, match="use version 99 or later"):
            open_database(dsn)

    def test_of_another_encoding(self, postgres: Any) -> None:
        postgres.execute("CREATE DATABASE ascii ENCODING SQL_ASCII TEMPLATE template0")
        with pytest.raises(DataDirError, match="ENCODING 'UTF8'"):
            open_database(postgres.dsn("ascii"))

    def test_without_rights(self, postgres: Any, dsn: str) -> None:
        open_database(dsn).close()
        postgres.execute("CREATE ROLE guest LOGIN")
        with pytest.raises(DataDirError, match=r"permission denied.*check the role's rights"):
            PostgresStore(dsn.replace("memos@", "guest@"), pgvector=False)

    def test_of_a_newer_schema(self, dsn: str) -> None:
        store = open_database(dsn)
        store.maintain(lambda txn, dbs: txn.put(b"schema_version", b"99", db=dbs["meta"]))
        store.close()
        with pytest.raises(DataDirError, match="upgrade Memos"):
            open_database(dsn)
        assert query(dsn, "SELECT value FROM memos.meta WHERE key = 'schema_version'") == [(b"99",)]

    def test_without_pgvector(self) -> None:
        class Bare:
            def execute(self, *_: object) -> Any:
                return self

            def fetchone(self) -> None:
                return None

        with pytest.raises(DataDirError, match=r"has no pgvector.*or set memory\.pgvector: false"):
            postgresql_schema.pgvector_schema(Bare(), True)
        assert postgresql_schema.pgvector_schema(Bare(), False) is None

    def test_pgvector_comes_and_goes(self, postgres: Any, dsn: str) -> None:
        """Vectors are made again, for they are written with and without."""
        if not postgres.has_pgvector:
            pytest.skip("this PostgreSQL has no pgvector")
        for pgvector in (True, False, True):
            store = PostgresStore(dsn, pgvector=pgvector)
            service = MemoryService(store, MemosConfig().memory, embedder=TopicEmbedder())
            service.add(ALICE, "tea")
            assert service.search(ALICE, "tea")[0].record.text == "tea"
            store.close()
            columns = query(dsn, "SELECT attname FROM pg_attribute WHERE attrelid = 'memos.vectors'::regclass")
            assert (("embedding",) in columns) is pgvector
        ((count, filled),) = query(dsn, "SELECT count(*), count(embedding) FROM memos.vectors")
        assert count == filled == 3

    def test_two_at_once(self, postgres: Any) -> None:
        """Of stores that find no schema, one makes it."""
        postgres.execute("CREATE DATABASE several")
        with ThreadPoolExecutor() as threads:
            opened = list(threads.map(open_database, [postgres.dsn("several")] * 4))
        assert [store.stamp() for store in opened] == [0] * 4
        for store in opened:
            store.close()


class TestTransactions:
    """What the engine's classes promise in ``contract``, beyond what the tests of the service ask of both."""

    def test_a_cursor_sees_what_is_written_meanwhile(self, where: Path | str) -> None:
        store = make_service(where)._store

        def work(txn: Any, dbs: Any) -> tuple[list[bytes], list[bytes]]:
            for number in range(0, 200, 2):
                txn.put(b"%03d" % number, b"even", db=dbs["sessions"])
            seen = []
            for key in txn.cursor(db=dbs["sessions"]).iternext(values=False):
                seen.append(bytes(key))
                if key == b"050":
                    txn.put(b"051", b"odd", db=dbs["sessions"])
                    txn.delete(b"052", db=dbs["sessions"])
            with txn.cursor(db=dbs["sessions"]) as cursor:
                found = cursor.set_range(b"100")
                while found and cursor.key() < b"150":
                    found = cursor.delete()
            return seen, [bytes(key) for key, _ in txn.cursor(db=dbs["sessions"])]

        seen, left = store.maintain(work)
        store.close()
        evens = [b"%03d" % number for number in range(0, 200, 2)]
        assert seen[:101] == [*evens[:26], b"051", *evens[27:]]
        assert left[:76] == [*evens[:26], b"051", *evens[27:50], *evens[75:], *left[75:76]]

    def test_several_values_of_a_key(self, where: Path | str) -> None:
        store = make_service(where)._store

        def work(txn: Any, dbs: Any) -> list[Any]:
            db = dbs["current"]
            for value in (b"b", b"a", b"c", b"a"):
                txn.put(b"key", value, db=db)
            txn.put(b"other", b"x", db=db)
            cursor = txn.cursor(db=db)
            return [
                txn.get(b"key", db=db),
                list(txn.cursor(db=db)),
                cursor.set_key_dup(b"key", b"b") and cursor.item(),
                cursor.set_key_dup(b"key", b"bb"),
                txn.delete(b"key", b"b", db=db),
                txn.delete(b"key", b"b", db=db),
                list(txn.cursor(db=db)),
                txn.delete(b"key", db=db),
                list(txn.cursor(db=db)),
            ]

        found = store.maintain(work)
        store.close()
        a, b, c, other = (b"key", b"a"), (b"key", b"b"), (b"key", b"c"), (b"other", b"x")
        assert found == [b"a", [a, b, c, other], b, False, True, False, [a, c, other], True, [other]]

    def test_a_reader_that_fetches_ahead_misses_nothing(self, service: MemoryService) -> None:
        store = service._store
        keys = [b"owner---" + bytes([number // 7, number % 7]) for number in range(0, 700, 3)]
        store.maintain(lambda txn, dbs: [txn.put(key, key[8:], db="vectors") for key in keys])
        asked = [b"owner---" + bytes([number // 7, number % 7]) for number in range(700)]

        def work(txn: Any, dbs: Any) -> list[bytes | None]:
            return [txn.get(key, db="vectors") for key in asked]

        assert store.examine(work) == [key[8:] if key in set(keys) else None for key in asked]

    def test_writers_come_one_after_the_other(self, dsn: str, service: MemoryService) -> None:
        """Of two processes, too: each store has its connections, and what it read is still so when it writes."""
        other = make_service(dsn)

        def count(user: Any) -> None:
            number = int(user.row("sessions", b"count") or b"0")
            user.put_row("sessions", b"count", b"%d" % (number + 1))

        with ThreadPoolExecutor(8) as threads:
            stores = [service._store, other._store] * 20
            assert list(threads.map(lambda store: store.write(ALICE, count), stores)) == [None] * 40
        with other._store.read(ALICE) as user:
            assert user.row("sessions", b"count") == b"40"
        other._store.close()

    def test_a_reader_sees_one_moment(self, service: MemoryService, dsn: str) -> None:
        service.add(ALICE, "before")
        other = make_service(dsn)
        with service._store.read(ALICE) as user:
            assert user.seq == 1
            other.add(ALICE, "meanwhile")
            assert texts(user.scan()) == ["before"]
        assert len(service.list(ALICE).records) == 2
        other._store.close()


@pytest.mark.parametrize("case", test_doctor.MENDABLE)
def test_the_doctor_finds_and_mends(tmp_path: Path, dsn: str, case: str) -> None:
    how, words = test_doctor.MENDABLE[case]
    service = make_service(dsn)
    test_doctor.fill_service(service)
    store = service._store
    store.maintain(how)
    found = maintenance.examine_open(store).problems
    assert any(re.search(words, f"{each.table} {each.where}: {each.text}") for each in found)
    mended, left = maintenance.repair_open(store, tmp_path)
    assert mended
    assert bool(left.problems) is (case in test_doctor.LEAVES_A_GAP)
    assert texts(service.list(BOB).records) == ["of bob"]
    store.close()


def test_the_doctors_command(tmp_path: Path, postgres: Any, dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "memos.yaml"
    pgvector = str(postgres.has_pgvector).lower()
    file.write_text(f"memory: {{store: postgresql, dsn: '{dsn}', pgvector: {pgvector}}}\n")
    command = ["doctor", str(tmp_path), "--config", str(file)]
    postgres.execute("DROP SCHEMA memos CASCADE")
    assert cli.main(command) == doctor.FAILED
    assert "there is no memory store" in capsys.readouterr().err
    service = make_service(dsn)
    test_doctor.fill_service(service)
    assert cli.main(command) == doctor.CLEAN
    service._store.maintain(test_doctor.delete("current"))
    service._store.close()
    assert cli.main(command) == doctor.PROBLEMS
    assert cli.main([*command, "--repair", "--compact"]) == doctor.CLEAN
    out = capsys.readouterr().out
    assert "mended: current" in out and "compacted: " in out


class TestSQL:
    """What other programs can ask."""

    def test_memories(self, service: MemoryService, dsn: str) -> None:
        record = service.add(ALICE, "nul \0 and \\u0000, quote ' 茶", tags=["a"], priority=2)
        newer = service.update(ALICE, record.id, pinned=True)
        columns = 'tenant, "user", id::text, text, type, tags, pinned, state, priority, version, updated_at'
        (row,) = query(dsn, f"SELECT {columns} FROM memos.memories")
        text = record.text.replace("\0", "\ufffd")
        assert row == ("acme", "alice", record.id, text, "fact", ["a"], True, "generated", 2, 2, newer.updated_at)

    def test_linked(self, service: MemoryService, dsn: str) -> None:
        a, b, c, d = (service.add(ALICE, text).id for text in "abcd")
        service.life.link(ALICE, a, b, "causes")
        service.life.link(ALICE, c, b, "needs")
        service.life.link(ALICE, c, a, "near")
        ended = service.life.link(ALICE, c, d, "over", valid_to="2026-01-03T00:00:00+00:00")
        ask = "SELECT id::text, steps, types FROM memos.linked('acme', %s, %s, %s, %s) ORDER BY steps, id"
        before, after = "2026-01-02T12:00:00+00:00", ended.valid_to
        assert query(dsn, ask, "alice", a, 1, before) == [(b, 1, ["causes"]), (c, 1, ["near"])]
        assert query(dsn, ask, "alice", a, 5, before)[2:] == [(d, 2, ["near", "over"])]
        assert len(query(dsn, ask, "alice", a, 5, after)) == 2
        assert query(dsn, ask, "bob", a, 5, before) == []

    def test_nearest(self, postgres: Any, dsn: str) -> None:
        if not postgres.has_pgvector:
            pytest.skip("this PostgreSQL has no pgvector")
        embedder = TopicEmbedder()
        service = make_service(dsn, embedder=embedder)
        ids = {text: service.add(ALICE, text).id for text in ("green tea", "tea of a cat", "a car")}
        service.add(BOB, "green tea")
        service.search(BOB, "tea")
        service.search(ALICE, "tea")  # embeds what is new
        asked = embedder.embed_query("green tea")
        found = query(dsn, "SELECT id::text, distance FROM memos.nearest('acme', 'alice', %s, 2)", str(asked.tolist()))
        assert [each for each, _ in found] == [ids["green tea"], ids["tea of a cat"]]
        cosine = float(np.dot(asked, embedder.embed_query("tea of a cat")))
        cosine /= float(np.linalg.norm(asked) * np.linalg.norm(embedder.embed_query("tea of a cat")))
        assert [distance for _, distance in found] == pytest.approx([0, 1 - cosine], abs=1e-3)
        service.delete(ALICE, ids["green tea"])
        assert query(dsn, "SELECT count(*) FROM memos.vectors") == [(3,)]
        service._store.close()
