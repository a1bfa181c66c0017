"""What the examination of a store is made of: problems, a report, and looking at rows."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from memos_vllm.core.lifecycle import Aging
from memos_vllm.memory import links, records, sessions
from memos_vllm.memory.contract import Transaction
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.tables import Owner
from memos_vllm.memory.transactions import UserWriter
from memos_vllm.types import Principal

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
Repair = Callable[[Transaction], None]
_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "owners": Owner.encode,
    "records": records.encode,
    "sessions": sessions.encode,
    "links": links.encode,
}
KeepAside = Callable[[str, bytes, bytes], None]
"""Is given table, key and value of what a repair takes out and nothing else tells."""


@dataclass(frozen=True, slots=True)
class Problem:
    table: str
    where: str
    """The key: owner and memory id where it has them."""

    text: str
    repair: Repair | None = None
    """None where nothing can be done."""


@dataclass(slots=True)
class Report:
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Entries looked at, by table."""


class Checks:
    """One look at a whole store, as of one transaction.

    Args:
        dbs: the tables' handles.
    """

    def __init__(self, txn: Transaction, dbs: Mapping[str, Any], keep_aside: KeepAside, aging: Aging) -> None:
        self._txn = txn
        self._dbs = dbs
        self._keep_aside = keep_aside
        self._aging = aging
        self._owners: dict[bytes, tuple[bytes, Owner]] = {}
        """By prefix of all their keys: the key in ``owners``, and the row."""

        self._report = Report()

    def _rows(self, table: str, *, counted: bool = True) -> Iterator[tuple[bytes, bytes]]:
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            for item in cursor:
                self._report.counts[table] += counted
                yield item

    def _record(self, key: bytes) -> MemoryRecord | None:
        raw = self._txn.get(key, db=self._dbs["records"])
        return None if raw is None else self._decode(raw)

    def _has(self, table: str, prefix: bytes) -> bool:
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            return bool(cursor.set_range(prefix)) and cursor.key().startswith(prefix)

    @staticmethod
    def _decode(raw: bytes) -> MemoryRecord | None:
        try:
            return records.decode(raw)
        except UNREADABLE:
            return None

    def _put(self, table: str, key: bytes, value: Any) -> Callable[[Transaction], None]:
        encode = _ENCODERS.get(table, bytes)

        def put(txn: Transaction) -> None:
            txn.put(key, encode(value), db=self._dbs[table])

        return put

    def _delete(self, table: str, key: bytes, value: bytes = b"") -> Callable[[Transaction], None]:
        def delete(txn: Transaction) -> None:
            txn.delete(key, value, db=self._dbs[table])

        return delete

    def _unreadable(self, table: str, key: bytes, raw: bytes, text: str = "cannot be read") -> Problem:
        def take_out(txn: Transaction) -> None:
            self._keep_aside(table, key, raw)
            txn.delete(key, db=self._dbs[table])

        return Problem(table, name_of(key), text, take_out)

    def _as_user(self, record: MemoryRecord, change: Callable[[UserWriter], Any]) -> Repair:
        """A repair by the means that writes have."""

        def repair(txn: Transaction) -> None:
            user = UserWriter(txn, self._dbs, Principal(record.tenant, record.user), self._aging)
            change(user)
            user.finish()

        return repair


def entries_under(txn: Transaction, db: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    with txn.cursor(db=db) as cursor:
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            yield cursor.item()
            found = cursor.next()


def name_of(key: bytes) -> str:
    """A key as people can look it up."""
    owner = str(int.from_bytes(key[:8], "big"))
    if len(key) >= 24:
        return f"{owner}/{uuid.UUID(bytes=key[8:24])}"
    return owner if len(key) == 8 else key.hex()
