"""A transaction in PostgreSQL that looks as LMDB's does; see ``contract``.

Every question costs a way to the server and back, so what is put waits here until something in its table is
looked for by order, it becomes much, or the transaction ends: a batch of a thousand memories is then a statement for
each table. A reader, whose view cannot change, fetches ahead where it is asked for one key after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from memos_vllm.memory import embedders, tables

_FIRST_PAGE, _LAST_PAGE = 32, 2048
"""Entries that are fetched at a time: a cursor that goes on fetches more and more."""

_MAX_WAITING_BYTES = 4 * 2**20
"""Of what is put and not sent yet; an import of memories may be as large as the disk allows."""

_END = b"\xff" * 64
"""Above every key."""

Entry = tuple[bytes, bytes]


@dataclass(slots=True)
class _Ahead:
    """What a reader knows of a table: every entry whose key lies between two keys."""

    rows: dict[bytes, bytes] = field(default_factory=dict)
    low: bytes = _END
    high: bytes = b""
    last_asked: bytes = _END
    size: int = 8


class Transaction:
    """
    Args:
        connection: within a transaction, which the caller ends.
        writes: whether it may change anything; a reader sees one moment (REPEATABLE READ).
        has_embeddings: whether vectors are written for pgvector, too.
    """

    def __init__(self, connection: psycopg.Connection[Any], *, writes: bool, has_embeddings: bool = False):
        self._connection = connection
        self._writes = writes
        self._has_embeddings = has_embeddings
        self._pending: dict[str, dict[bytes, bytes | None]] = {}
        """By table and key: a value that is put, or None for an entry that is taken out."""

        self._pending_several: dict[str, dict[Entry, bool]] = {}
        """The same of tables with several values under a key: whether the entry is put or taken out."""

        self._waiting_bytes = 0
        self._ahead: dict[str, _Ahead] = {}
        self.changes: dict[str, int] = {}
        """How often each table was changed; a cursor that has fetched entries fetches them again."""

    def get(self, key: bytes, default: bytes | None = None, *, db: str) -> bytes | None:
        pending = self._pending.get(db, {})
        if key in pending:
            value = pending[key]
            return default if value is None else value
        if db in tables.SEVERAL_VALUES:
            self.flush(db)
        elif not self._writes:
            return self._get_ahead(key, db, default)
        return self._get(key, db, default)

    def put(self, key: bytes, value: bytes, *, overwrite: bool = True, db: str) -> bool:
        assert self._writes
        if not overwrite and self.get(key, db=db) is not None:
            return False
        if db in tables.SEVERAL_VALUES:
            self._pending_several.setdefault(db, {})[bytes(key), bytes(value)] = True
        else:
            self._pending.setdefault(db, {})[bytes(key)] = bytes(value)
        self._changed(db)
        self._waiting_bytes += len(key) + len(value)
        if self._waiting_bytes > _MAX_WAITING_BYTES:
            self.flush()
        return True

    def delete(self, key: bytes, value: bytes = b"", *, db: str) -> bool:
        assert self._writes
        self._changed(db)
        if db in tables.SEVERAL_VALUES:
            self.flush(db)
            only = " AND value = %b" if value else ""
            deleted = self._execute(f"DELETE FROM memos.{db} WHERE key = %b{only}", [key, value][: 2 if value else 1])
            return deleted.rowcount > 0
        pending = self._pending.get(db, {})
        if key in pending:
            was_put = pending[key] is not None
            pending[key] = None
            return was_put
        return self._execute(f"DELETE FROM memos.{db} WHERE key = %b", [key]).rowcount > 0

    def cursor(self, db: str) -> Cursor:
        return Cursor(self, db)

    def take_out(self, db: str, key: bytes, value: bytes) -> None:
        """An entry that is known to be there."""
        if db in tables.SEVERAL_VALUES:
            self._pending_several.setdefault(db, {})[key, value] = False
        else:
            self._pending.setdefault(db, {})[key] = None
        self._changed(db)

    def page(self, db: str, key: bytes, value: bytes | None, limit: int) -> list[Entry]:
        """The first entries from a key on, or after an entry."""
        self.flush(db)
        if value is None:
            where, arguments = "key >= %b", [key]
        elif db in tables.SEVERAL_VALUES:
            where, arguments = "(key, value) > (%b, %b)", [key, value]
        else:
            where, arguments = "key > %b", [key]
        order = "key, value" if db in tables.SEVERAL_VALUES else "key"
        query = f"SELECT key, value FROM memos.{db} WHERE {where} ORDER BY {order} LIMIT {limit}"
        return self._execute(query, arguments).fetchall()

    @contextmanager
    def child(self) -> Iterator[Transaction]:
        """An error takes back what was written within."""
        self.flush()
        self._connection.execute("SAVEPOINT child")
        try:
            yield self
            self.flush()
        except BaseException:
            self._pending.clear()
            self._pending_several.clear()
            if not self._connection.broken:
                self._connection.execute("ROLLBACK TO child; RELEASE child")
            raise
        self._connection.execute("RELEASE child")

    def flush(self, db: str | None = None) -> None:
        """Sends what waits, of one table or of all, in one go."""
        names = [*self._pending, *self._pending_several] if db is None else [db]
        self._waiting_bytes = self._waiting_bytes if db else 0
        statements = [statement for name in names for statement in self._statements(name)]
        if len(statements) == 1:
            self._execute(*statements[0])
        elif statements:
            with self._connection.pipeline():
                for statement in statements:
                    self._execute(*statement)

    def _statements(self, db: str) -> Iterable[tuple[str, list[Any]]]:
        several = self._pending_several.pop(db, {})
        if put := [entry for entry, is_put in several.items() if is_put]:
            yield (
                f"INSERT INTO memos.{db} SELECT * FROM unnest(%b::bytea[], %b::bytea[]) ON CONFLICT DO NOTHING",
                [list(column) for column in zip(*put, strict=True)],
            )
        if out := [entry for entry, is_put in several.items() if not is_put]:
            yield (
                f"DELETE FROM memos.{db} t USING unnest(%b::bytea[], %b::bytea[]) AS o (key, value) "
                "WHERE t.key = o.key AND t.value = o.value",
                [list(column) for column in zip(*out, strict=True)],
            )
        pending = self._pending.pop(db, {})
        if values := {key: value for key, value in pending.items() if value is not None}:
            keys = list(values)
            if db == "vectors" and self._has_embeddings:
                yield _PUT_VECTORS, [keys, list(values.values()), *_embeddings(values.values())]
            else:
                yield (
                    f"INSERT INTO memos.{db} (key, value) SELECT * FROM unnest(%b::bytea[], %b::bytea[]) "
                    "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                    [keys, list(values.values())],
                )
        if gone := [key for key, value in pending.items() if value is None]:
            yield f"DELETE FROM memos.{db} WHERE key = ANY (%b::bytea[])", [gone]

    def _get(self, key: bytes, db: str, default: bytes | None) -> bytes | None:
        query = f"SELECT value FROM memos.{db} WHERE key = %b ORDER BY value LIMIT 1"
        row = self._execute(query, [key]).fetchone()
        return default if row is None else row[0]

    def _get_ahead(self, key: bytes, db: str, default: bytes | None) -> bytes | None:
        ahead = self._ahead.setdefault(db, _Ahead())
        if not ahead.low <= key <= ahead.high:
            goes_on = ahead.last_asked < key and ahead.last_asked[:8] == key[:8]
            ahead.last_asked = key
            if not goes_on:
                return self._get(key, db, default)
            rows = self.page(db, key, None, ahead.size)
            ahead.rows = dict(rows)
            ahead.low, ahead.high = key, rows[-1][0] if len(rows) == ahead.size else _END
            ahead.size = min(2 * ahead.size, _LAST_PAGE)
        ahead.last_asked = key
        return ahead.rows.get(key, default)

    def _changed(self, db: str) -> None:
        self.changes[db] = self.changes.get(db, 0) + 1

    def _execute(self, query: str, arguments: list[Any]) -> psycopg.Cursor[Any]:
        return self._connection.execute(query, arguments, binary=True)


class Cursor:
    def __init__(self, txn: Transaction, db: str):
        self._txn = txn
        self._db = db
        self._page: list[Entry] = []
        self._place = 0
        self._limit = _FIRST_PAGE
        self._is_last = True
        self._changes = 0

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        self._page = []

    def __iter__(self) -> Iterator[Any]:
        return self.iternext()

    def iternext(self, keys: bool = True, values: bool = True) -> Iterator[Any]:
        found = bool(self.key()) or self.set_range(b"")
        while found:
            yield self.item() if keys and values else self.key() if keys else self.value()
            found = self.next()

    def set_range(self, key: bytes) -> bool:
        self._limit = _FIRST_PAGE
        return self._fetch(key, None)

    def set_key_dup(self, key: bytes, value: bytes) -> bool:
        found = self.set_range(key)
        while found and self.key() == key and self.value() < value:
            found = self.next()
        if found and self.item() == (key, value):
            return True
        self._page = []
        return False

    def next(self) -> bool:
        if not self.key():
            return False
        if self._changes != self._txn.changes.get(self._db, 0):
            return self._fetch(*self.item())
        self._place += 1
        if self._place < len(self._page):
            return True
        return not self._is_last and self._fetch(*self._page[-1])

    def key(self) -> bytes:
        return self.item()[0]

    def value(self) -> bytes:
        return self.item()[1]

    def item(self) -> Entry:
        return self._page[self._place] if self._place < len(self._page) else (b"", b"")

    def delete(self) -> bool:
        if not self.key():
            return False
        is_alone = self._changes == self._txn.changes.get(self._db, 0)
        self._txn.take_out(self._db, *self.item())
        if is_alone:  # no other change of the table: what was fetched is still what comes next
            self._changes += 1
        self.next()
        return True

    def _fetch(self, key: bytes, value: bytes | None) -> bool:
        self._page = self._txn.page(self._db, key, value, self._limit)
        self._is_last = len(self._page) < self._limit
        self._limit = min(2 * self._limit, _LAST_PAGE)
        self._place = 0
        self._changes = self._txn.changes.get(self._db, 0)
        return bool(self._page)


_PUT_VECTORS = (
    "INSERT INTO memos.vectors (key, value, embedder, embedding) "
    "SELECT key, value, embedder, numbers::halfvec "
    "FROM unnest(%b::bytea[], %b::bytea[], %b::bytea[], %b::text[]) AS v (key, value, embedder, numbers) "
    "ON CONFLICT (key) DO UPDATE SET (value, embedder, embedding) = "
    "ROW (excluded.value, excluded.embedder, excluded.embedding)"
)


def _embeddings(stored: Iterable[bytes]) -> tuple[list[bytes], list[str | None]]:
    """Whose each vector is, and its numbers as pgvector writes them; None for what it does not take."""
    named, written = [], []
    for raw in stored:
        fingerprint, vector = embedders.parts_of(raw)
        named.append(fingerprint)
        written.append(str(vector.tolist()) if vector.size and bool((abs(vector) < 65504).all()) else None)
    return named, written
