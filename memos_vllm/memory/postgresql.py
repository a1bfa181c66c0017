"""Plaintext memory in PostgreSQL: for several machines with one store, and for other programs that read it.

The promise is that of ``contract``. A writer holds an advisory lock until it has committed, and its statements
see what was committed before each of them (READ COMMITTED), so it sees all that other writers did and nobody
else writes: that is serializable. It commits with ``synchronous_commit = on``. A reader is REPEATABLE READ.

Where a connection breaks, the next one is made at once, for as long as ``RECONNECT_S``. A write that did not
come to its commit runs again. One whose commit was under way looks into ``writers`` whether it is there: its
number was written in the same transaction.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import psycopg

from memos_vllm.core.lifecycle import Aging
from memos_vllm.errors import DataDirError, StoreError, StoreFull, StoreUnavailable, StoreUncertain
from memos_vllm.memory import migrations, postgresql_schema, tables
from memos_vllm.memory.abstract_store import Store, StoreSize
from memos_vllm.memory.postgresql_transaction import Transaction

logger = logging.getLogger(__name__)
T = TypeVar("T")

RECONNECT_S = 5.0
"""For so long a transaction waits for a server that starts again."""

MAX_CONNECTIONS = 16
_RETRY_S = 0.1
_BEGIN_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_SESSION = """
    SET synchronous_commit = on; SET statement_timeout = 0; SET lock_timeout = 0;
    SET default_transaction_isolation = 'read committed'; SET idle_in_transaction_session_timeout = '60s';
    SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3
"""
"""A server that was cut off within a write must not hold the lock for ever."""

_CLIENT: dict[str, Any] = {
    **{"application_name": "memos", "connect_timeout": 5, "tcp_user_timeout": 20_000},
    **{"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3},
}


_SIZE = (
    "(SELECT sum(pg_total_relation_size(oid)) FROM pg_class "
    "WHERE relnamespace = 'memos'::regnamespace AND relkind = 'r')"
)


class PostgresStore(Store):
    """Opens or creates the schema ``memos`` of a database.

    Args:
        dsn: libpq's connection string or URI; what it leaves out comes from libpq's environment variables.
        pgvector: whether vectors are kept as pgvector's, too.
        create: False for a look that changes nothing.

    Raises:
        DataDirError: the server cannot be reached or is no good, or a newer Memos wrote the store.
    """

    engine_error = psycopg.Error

    def __init__(self, dsn: str, aging: Aging | None = None, *, pgvector: bool = True, create: bool = True):
        super().__init__(aging)
        try:
            self._given = psycopg.conninfo.conninfo_to_dict(dsn)
        except psycopg.Error:  # whose words have the string, and so perhaps a password
            raise DataDirError(
                "the database has no address: check memory.dsn, which is such as postgresql://memos@db.example/memos"
            ) from None
        self._dbs = {name: name for name in tables.NAMES}
        self._id = uuid.uuid4()
        self._attempts = itertools.count(1)
        self._writing = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._idle: list[psycopg.Connection[Any]] = []
        self._pid = os.getpid()
        self._vector_schema: str | None = None
        try:
            connection = self._connect()
        except (psycopg.Error, ValueError) as error:
            raise DataDirError(f"{_words(error)}; check memory.dsn, and that PostgreSQL runs") from error
        self._name = f"PostgreSQL database {connection.info.dbname!r}"
        try:
            postgresql_schema.check_server(connection)
            if create:
                self._create(connection, pgvector)
            elif not postgresql_schema.exists(connection):
                raise DataDirError(f"there is no memory store in the {self._name}; name one that a server has used")
            else:
                self._check_schema(Transaction(connection, writes=False))
            (fsync,) = connection.execute("SHOW fsync").fetchone() or ("",)
        except psycopg.Error as error:
            connection.close()
            if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                raise DataDirError(f"the {self._name} takes no writes; memory.dsn must name the primary") from error
            raise DataDirError(f"cannot use the {self._name}: {_words(error)}; check the role's rights") from error
        except DataDirError:
            connection.close()
            raise
        if fsync != "on":
            logger.warning("the PostgreSQL server runs with fsync off: acknowledged memories can be lost")
        self._idle.append(connection)

    def close(self) -> None:
        for _ in range(MAX_CONNECTIONS):
            self._slots.acquire()
        try:
            while self._idle:
                self._idle.pop().close()
        finally:
            self._slots.release(MAX_CONNECTIONS)

    def stamp(self) -> int:
        with self._reading_connection() as connection:
            (number,) = connection.execute("SELECT number FROM memos.commits").fetchone()
        return int(number)

    def stats(self) -> dict[str, int]:
        """Entries, and bytes of all tables with their indexes."""
        counted = {"users": "owners", "memories": "records"}
        counted |= {name: name for name in ("versions", "sessions", "links", "snapshots", "kv_removals")}
        columns = ", ".join(f"(SELECT count(*) FROM memos.{table})" for table in counted.values())
        with self._reading_connection() as connection:
            row = connection.execute(f"SELECT {columns}, {_SIZE}").fetchone()
        return dict(zip([*counted, "file_bytes"], map(int, row), strict=True))

    def size(self) -> StoreSize:
        with self._reading_connection() as connection:
            (used_bytes,) = connection.execute(f"SELECT {_SIZE}").fetchone()
        return StoreSize(int(used_bytes), None)

    def compact(self) -> tuple[int, int]:
        """Rewrites all tables without the rows that are gone; other servers wait meanwhile. Bytes before and after."""
        before = self.stats()["file_bytes"]
        with self._slots:
            connection = self._take(time.monotonic() + RECONNECT_S)
            try:
                for table in tables.NAMES:
                    connection.execute(f"VACUUM FULL memos.{table}")
            except psycopg.Error as error:
                raise self._failed(error) from error
            finally:
                self._give(connection)
        return before, self.stats()["file_bytes"]

    @contextmanager
    def _begin(self, *, write: bool = False) -> Iterator[Transaction]:
        assert os.getpid() == self._pid, "a connection does not survive a fork; open the store in the child"
        with self._writing if write else nullcontext(), self._slots:
            attempt = next(self._attempts)
            connection = self._begun(self._begin_write(attempt) if write else _BEGIN_READ)
            try:
                txn = Transaction(connection, writes=write, has_embeddings=self._vector_schema is not None)
                yield txn
                txn.flush()
                self._end(connection, attempt if write else None)
            except BaseException:
                with suppress(psycopg.Error):
                    connection.rollback()
                raise
            finally:
                self._give(connection)

    def _child(self, txn: Transaction) -> AbstractContextManager[Transaction]:  # type: ignore[override]
        return txn.child()

    def _attempt(self, limit_bytes: int, attempt: Callable[[], T]) -> T:
        """Again, as long as it is the connection that fails, and not the write."""
        until_s = time.monotonic() + RECONNECT_S
        while True:
            try:
                return attempt()
            except psycopg.Error as error:
                if not _is_lost(error) or time.monotonic() > until_s:
                    raise
                logger.warning("a write to the %s begins again: %s", self._name, _words(error))

    def _limit_bytes(self, frees: bool) -> int:
        return 0  # the size is the database's affair

    def _failed(self, error: Exception, reading: bool = False) -> StoreError:
        kind = StoreUnavailable if isinstance(error, psycopg.Error) and _is_lost(error) else StoreError
        if reading:
            return kind(f"the {self._name} cannot be read: {_words(error)}")
        nothing = "and nothing of this write was stored"
        if isinstance(error, (psycopg.errors.DiskFull, psycopg.errors.ConfigurationLimitExceeded)):
            return StoreFull(f"the disk of the {self._name} is full {nothing}; free some space there")
        if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
            return StoreError(f"the {self._name} takes no writes {nothing}; memory.dsn must name the primary")
        return kind(f"the {self._name} failed {nothing}: {_words(error)}")

    @contextmanager
    def _reading_connection(self) -> Iterator[psycopg.Connection[Any]]:
        try:
            with self._slots:
                connection = self._begun(_BEGIN_READ)
                try:
                    yield connection
                    connection.commit()
                finally:
                    self._give(connection)
        except psycopg.Error as error:
            raise self._failed(error, reading=True) from error

    def _begin_write(self, attempt: int) -> str:
        return (
            f"BEGIN; SELECT pg_advisory_xact_lock({postgresql_schema.LOCK}); "
            f"INSERT INTO memos.writers VALUES ('{self._id}', {attempt}, now()) "
            "ON CONFLICT (id) DO UPDATE SET attempt = excluded.attempt, at = excluded.at; "
            "UPDATE memos.commits SET number = number + 1"
        )

    def _begun(self, begin: str) -> psycopg.Connection[Any]:
        """A connection within a new transaction; those that broke meanwhile go."""
        until_s = time.monotonic() + RECONNECT_S
        while True:
            connection = self._take(until_s)
            try:
                connection.execute(begin)
                return connection
            except psycopg.Error as error:
                connection.close()
                if not _is_lost(error) or time.monotonic() > until_s:
                    raise

    def _end(self, connection: psycopg.Connection[Any], attempt: int | None) -> None:
        try:
            connection.execute("COMMIT")
        except psycopg.Error as error:
            if attempt is None or not _is_lost(error):
                raise
            if not self._is_committed(attempt):
                raise

    def _is_committed(self, attempt: int) -> bool:
        """Whether a write of this process is there. Whoever has the lock knows that nothing is under way."""
        question = (
            f"BEGIN; SELECT pg_advisory_xact_lock({postgresql_schema.LOCK}); "
            f"SELECT 1 FROM memos.writers WHERE id = '{self._id}' AND attempt = {attempt}"
        )
        try:
            connection = self._begun("SELECT 1")
            try:
                answer = connection.execute(question)
                while answer.nextset():
                    pass
                is_there = answer.fetchone() is not None
                connection.rollback()
                return is_there
            finally:
                self._give(connection)
        except psycopg.Error as error:
            raise StoreUncertain(
                f"the connection to the {self._name} broke while a write was committed; look whether it is there"
            ) from error

    def _take(self, until_s: float) -> psycopg.Connection[Any]:
        if self._idle:
            with suppress(IndexError):  # another thread was faster
                return self._idle.pop()
        while True:
            try:
                return self._connect()
            except psycopg.OperationalError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(_RETRY_S)

    def _give(self, connection: psycopg.Connection[Any]) -> None:
        if connection.closed or connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            connection.close()
        else:
            self._idle.append(connection)

    def _connect(self) -> psycopg.Connection[Any]:
        connection = psycopg.connect(**{**_CLIENT, **self._given}, autocommit=True)
        path = f", {self._vector_schema}" if self._vector_schema else ""
        connection.execute(f"{_SESSION}; SET search_path = memos{path}")
        return connection

    def _create(self, connection: psycopg.Connection[Any], pgvector: bool) -> None:
        """Creates what is missing, and brings a store of an earlier version up to this one's schema."""
        with connection.transaction():
            connection.execute(f"SELECT pg_advisory_xact_lock({postgresql_schema.LOCK})")
            if postgresql_schema.exists(connection):
                self._check_schema(Transaction(connection, writes=False), or_older=True)
            postgresql_schema.create_schema(connection)
            self._vector_schema = postgresql_schema.pgvector_schema(connection, pgvector)
            postgresql_schema.create(connection, self._vector_schema)
            txn = Transaction(connection, writes=True, has_embeddings=self._vector_schema is not None)
            migrations.migrate(txn, self._dbs, self._name, self.aging)
            txn.flush()
        if self._vector_schema:
            connection.execute(f"SET search_path = memos, {self._vector_schema}")

    def _check_schema(self, txn: Transaction, or_older: bool = False) -> None:
        schema = int(txn.get(b"schema_version", b"0", db="meta") or 0)
        if schema > tables.SCHEMA_VERSION or (schema < tables.SCHEMA_VERSION and not or_older):
            raise DataDirError(
                f"the {self._name} has schema {schema}, this Memos {tables.SCHEMA_VERSION}; "
                + ("upgrade Memos" if schema > tables.SCHEMA_VERSION else "start the server once, which migrates it")
            )


def _is_lost(error: psycopg.Error) -> bool:
    """Whether the connection is what failed: broken, refused, or ended by a server that stops or starts."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate[:2] == "08" or error.sqlstate in ("57P01", "57P02", "57P03", "40001", "40P01", "25P03")


def _words(error: Exception) -> str:
    """The first line: what follows is the place in a statement that the user did not write."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
