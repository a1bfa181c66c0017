"""One user's memories inside one LMDB transaction.

Both classes are bound to a user when they are made, and build every key from that user's owner
number: nothing that they are asked for can reach another user's data.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import lmdb

from memos_vllm.memory import claims, records, sessions, tables
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.sessions import Session
from memos_vllm.memory.tables import Owner
from memos_vllm.types import MemoryId, Principal

Tables = Mapping[str, Any]
"""Name to handle of each named database."""


@dataclass(slots=True)
class Removed:
    """What a deletion took out of LMDB, in entries."""

    ids: list[MemoryId] = field(default_factory=list)
    versions: int = 0
    sessions: int = 0


class UserReader:
    """A consistent view. A user who never wrote anything has no owner row and no memories."""

    def __init__(self, txn: lmdb.Transaction, dbs: Tables, who: Principal):
        self.who = who
        self._txn = txn
        self._dbs = dbs
        raw = txn.get(tables.owner_key(who), db=dbs["owners"])
        self._owner = Owner.decode(raw) if raw else None

    @property
    def kv_epoch(self) -> int:
        return self._owner.kv_epoch if self._owner else 0

    @property
    def seq(self) -> int:
        """Of the user's last change; 0 before the first."""
        return self._owner.seq if self._owner else 0

    def get(self, memory_id: str) -> MemoryRecord | None:
        parsed = records.parse_id(memory_id)
        if parsed is None or self._owner is None:
            return None
        raw = self._txn.get(self._owner.prefix + parsed.bytes, db=self._dbs["records"])
        if raw is None:
            return None
        record = records.decode(raw)
        assert (record.tenant, record.user) == (self.who.tenant, self.who.user)
        return record

    def scan(self, after: uuid.UUID = records.NO_ID) -> Iterator[MemoryRecord]:
        """Records in the order of creation, from the first one after the id."""
        for _, raw in self._range("records", b"", start=after.bytes + b"\0"):
            yield records.decode(raw)

    def versions(self, memory_id: MemoryId) -> Iterator[MemoryRecord]:
        """Earlier versions, oldest first."""
        for _, raw in self._range("versions", uuid.UUID(memory_id).bytes):
            yield records.decode(raw)

    def holders(self, key: bytes) -> list[MemoryRecord]:
        """Current memories that say what the key stands for (``claims``), oldest first."""
        found = (self.get(_id_of(raw)) for _, raw in self._range("current", key))
        return [record for record in found if record is not None]

    def changes_after(self, seq: int) -> Iterator[tuple[bytes, MemoryId]]:
        """Operation and memory of each later change that is still in the log."""
        for _, raw in self._range("changes", b"", start=tables.number_key(seq + 1)):
            yield raw[:1], _id_of(raw[1:])

    def session(self, name: str) -> Session | None:
        if self._owner is None:
            return None
        raw = self._txn.get(self._owner.prefix + tables.session_key(name), db=self._dbs["sessions"])
        return sessions.decode(raw) if raw else None

    def _range(self, table: str, prefix: bytes, *, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Key and value of each of the user's entries under a prefix."""
        if self._owner is None:
            return
        prefix = self._owner.prefix + prefix
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            found = cursor.set_range(prefix + start)
            while found and cursor.key().startswith(prefix):
                yield cursor.item()
                found = cursor.next()


class UserWriter(UserReader):
    """Changes; ``finish`` is called once before the commit. Each change of a record goes to the log."""

    _owner: Owner

    def __init__(self, txn: lmdb.Transaction, dbs: Tables, who: Principal):
        super().__init__(txn, dbs, who)
        if self._owner is None:
            number = int(txn.get(b"next_owner", db=dbs["meta"]))
            txn.put(b"next_owner", str(number + 1).encode(), db=dbs["meta"])
            self._owner = Owner(number)

    def finish(self) -> None:
        self._txn.put(tables.owner_key(self.who), self._owner.encode(), db=self._dbs["owners"])

    def insert(self, now: datetime, **values: Any) -> MemoryRecord:
        """A new record, with the user's next id."""
        self._owner.last_id = records.next_id(self._owner.last_id, now)
        record = MemoryRecord(
            id=MemoryId(str(self._owner.last_id)),
            tenant=self.who.tenant,
            user=self.who.user,
            created_at=now,
            updated_at=now,
            **values,
        )
        self._put(record)
        return record

    def change(self, old: MemoryRecord, now: datetime, **values: Any) -> MemoryRecord:
        """A new version; the old one stays in the history."""
        new = replace(old, version=old.version + 1, updated_at=now, **values)
        key = self._key(old.id)
        self._txn.put(key + tables.version_key(old.version), records.encode(old), db=self._dbs["versions"])
        self._forget_claims(old)
        self._put(new)
        return new

    def touch(self, old: MemoryRecord, now: datetime) -> MemoryRecord:
        """Said again: counted, but no new version."""
        new = replace(old, uses=old.uses + 1, updated_at=now)
        self._txn.put(self._key(new.id), records.encode(new), db=self._dbs["records"])
        return new

    def supersede(self, old: MemoryRecord, new: MemoryRecord, now: datetime) -> None:
        """Takes an old record out of use. Its text did not change, so that is no new version."""
        self._forget_claims(old)
        self._put(replace(old, superseded_by=new.id, valid_to=now, updated_at=now))

    def remove(self, memory_id: str) -> Removed:
        """Takes out the record, its history and its place in sessions; nothing where there is none."""
        removed = Removed()
        record = self.get(memory_id)
        if record is None:
            return removed
        self._txn.delete(self._key(record.id), db=self._dbs["records"])
        self._forget_claims(record)
        removed.ids.append(record.id)
        removed.versions = self._clear("versions", uuid.UUID(record.id).bytes)
        for key, raw in list(self._range("sessions", b"")):
            session = sessions.decode(raw)
            if record.id in session.ids:
                self._txn.put(key, sessions.encode(session.without(record.id)), db=self._dbs["sessions"])
                removed.sessions += 1
        self._log(tables.REMOVE, record.id)
        self._owner.kv_epoch += 1
        return removed

    def remove_all(self) -> Removed:
        removed = Removed([_id_of(key[8:]) for key, _ in self._range("records", b"")])
        self._clear("records")
        self._clear("current")
        removed.versions = self._clear("versions")
        removed.sessions = self._clear("sessions")
        self._log(tables.CLEAR, MemoryId(str(records.NO_ID)))
        self._owner.kv_epoch += 1
        return removed

    def new_kv_epoch(self) -> None:
        self._owner.kv_epoch += 1

    def put_session(self, name: str, session: Session) -> None:
        key = self._owner.prefix + tables.session_key(name)
        self._txn.put(key, sessions.encode(session), db=self._dbs["sessions"])

    def drop_sessions(self, now: datetime, ttl_s: float) -> None:
        """Takes out the user's sessions that are over."""
        for key, raw in list(self._range("sessions", b"")):
            if sessions.decode(raw).is_over(now, ttl_s):
                self._txn.delete(key, db=self._dbs["sessions"])

    def _put(self, record: MemoryRecord) -> None:
        self._txn.put(self._key(record.id), records.encode(record), db=self._dbs["records"])
        if record.is_current:
            for key in claims.keys_of(record.text):
                self._txn.put(self._owner.prefix + key, uuid.UUID(record.id).bytes, db=self._dbs["current"])
        self._log(tables.PUT, record.id)

    def _forget_claims(self, record: MemoryRecord) -> None:
        for key in claims.keys_of(record.text):
            self._txn.delete(self._owner.prefix + key, uuid.UUID(record.id).bytes, db=self._dbs["current"])

    def _log(self, operation: bytes, memory_id: MemoryId) -> None:
        self._owner.seq += 1
        key, db = self._owner.prefix + tables.number_key(self._owner.seq), self._dbs["changes"]
        self._txn.put(key, operation + uuid.UUID(memory_id).bytes, db=db)
        if self._owner.seq > tables.CHANGES_KEPT:
            self._txn.delete(self._owner.prefix + tables.number_key(self._owner.seq - tables.CHANGES_KEPT), db=db)

    def _clear(self, table: str, prefix: bytes = b"") -> int:
        """Deletes the user's entries under a prefix; how many there were."""
        prefix = self._owner.prefix + prefix
        count = 0
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key().startswith(prefix):
                cursor.delete()  # moves to the next entry
                count += 1
                found = bool(cursor.key())
        return count

    def _key(self, memory_id: MemoryId) -> bytes:
        return self._owner.prefix + uuid.UUID(memory_id).bytes


def _id_of(raw: bytes) -> MemoryId:
    return MemoryId(str(uuid.UUID(bytes=raw)))
