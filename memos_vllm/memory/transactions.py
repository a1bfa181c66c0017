"""One user's memories inside one transaction.

Both classes are bound to a user when they are made, and build every key from that user's owner
number: nothing that they are asked for can reach another user's data.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from memos_vllm.core import lifecycle
from memos_vllm.core.lifecycle import Aging, Due, Life, Move
from memos_vllm.errors import Conflict
from memos_vllm.memory import claims, holdings, records, sessions, tables, usage
from memos_vllm.memory.contract import Tables, Transaction
from memos_vllm.memory.holdings import Holdings
from memos_vllm.memory.records import LASTING_TYPES, MemoryRecord
from memos_vllm.memory.sessions import Session
from memos_vllm.memory.tables import Owner
from memos_vllm.memory.usage import Event, Usage
from memos_vllm.types import MemoryId, Principal


class UserReader:
    """A consistent view. A user who never wrote anything has no owner row and no memories."""

    def __init__(self, txn: Transaction, dbs: Tables, who: Principal):
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

    @property
    def last_id(self) -> str:
        """Above all ids that the user's memories, links and snapshots have."""
        return str(self._owner.last_id if self._owner else records.NO_ID)

    @property
    def holdings(self) -> Holdings:
        """What the user has now."""
        if self._owner is None:
            return Holdings()
        raw = self._txn.get(holdings.key_of(self.who, self._owner.prefix), db=self._dbs["users"])
        try:
            return holdings.decode(raw)[1] if raw else Holdings()
        except ValueError:  # ``memos doctor`` counts anew; a wrong count must not stop the user's writes
            return Holdings()

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
        for _, raw in self.rows("records", start=after.bytes + b"\0"):
            yield records.decode(raw)

    def versions(self, memory_id: MemoryId) -> Iterator[MemoryRecord]:
        """Earlier versions, oldest first."""
        for _, raw in self.rows("versions", uuid.UUID(memory_id).bytes):
            yield records.decode(raw)

    def holders(self, key: bytes) -> list[MemoryRecord]:
        """Current memories that say what the key stands for (``claims``), oldest first."""
        found = (self.get(_id_of(raw)) for _, raw in self.rows("current", key))
        return [record for record in found if record is not None]

    def pieces(self, document: str) -> Iterator[MemoryRecord]:
        """What a document has or had, in the order of creation; superseded pieces too."""
        for key, _ in self.rows("pieces", tables.document_key(document)):
            record = self.get(_id_of(key[tables.DOCUMENT_KEY_BYTES :]))
            assert record is not None
            yield record

    def changes_after(self, seq: int) -> Iterator[tuple[bytes, MemoryId]]:
        """Operation and memory of each later change that is still in the log."""
        for _, raw in self.rows("changes", start=tables.number_key(seq + 1)):
            yield raw[:1], _id_of(raw[1:])

    def was_cleared_since(self, seq: int, kv_epoch: int) -> bool:
        """Whether all memories of the user were removed after that moment; also where so much was changed since that
        the log does not tell."""
        if kv_epoch == self.kv_epoch:  # a removal of all begins another
            return False
        return self.seq - seq > tables.CHANGES_KEPT or any(
            operation == tables.CLEAR for operation, _ in self.changes_after(seq)
        )

    def session(self, name: str) -> Session | None:
        raw = self.row("sessions", tables.session_key(name))
        return sessions.decode(raw) if raw else None

    def usage(self, memory_id: MemoryId) -> Usage:
        raw = self.row("usage", uuid.UUID(memory_id).bytes)
        return usage.decode(raw) if raw else Usage()

    def events(self, memory_id: MemoryId) -> Iterator[Event]:
        """What happened to it, oldest first; of very many the last."""
        for _, raw in self.rows("events", uuid.UUID(memory_id).bytes):
            yield usage.decode_event(raw)

    def row(self, table: str, key: bytes) -> bytes | None:
        """A value of the user's, by the key without the owner."""
        if self._owner is None:
            return None
        value: bytes | None = self._txn.get(self._owner.prefix + key, db=self._dbs[table])
        return value

    def rows(self, table: str, prefix: bytes = b"", *, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Key, without the owner, and value of each of the user's entries under a prefix, from ``start`` after it."""
        if self._owner is None:
            return
        prefix = self._owner.prefix + prefix
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            found = cursor.set_range(prefix + start)
            while found and cursor.key().startswith(prefix):
                yield cursor.key()[8:], cursor.value()
                found = cursor.next()


class UserWriter(UserReader):
    """Changes; ``finish`` is called once before the commit. Each change of a record goes to the log.

    Whatever changes a record also decides anew when time moves it next (``core.lifecycle.next_due``).
    """

    _owner: Owner

    def __init__(self, txn: Transaction, dbs: Tables, who: Principal, aging: Aging):
        super().__init__(txn, dbs, who)
        self._aging = aging
        self._held_before: Holdings | None = None
        self._growth = Holdings()
        """By this write; negative where it removes."""
        self.has_added = False
        """Whether this write made an entry that counts; what changes in its place is not more than before."""

        if self._owner is None:
            number = int(txn.get(b"next_owner", db=dbs["meta"]))
            txn.put(b"next_owner", str(number + 1).encode(), db=dbs["meta"])
            self._owner = Owner(number)

    def finish(self) -> None:
        self._txn.put(tables.owner_key(self.who), self._owner.encode(), db=self._dbs["owners"])
        if self._growth != Holdings():
            self._put_holdings()

    @property
    def held_before(self) -> Holdings:
        """What the user had before this write."""
        if self._held_before is None:
            self._held_before = super().holdings
        return self._held_before

    @property
    def holdings(self) -> Holdings:
        held = self.held_before.plus(self._growth.memories, self._growth.size_bytes)
        # A count that was wrong (``memos doctor`` finds it) is not to become less than nothing.
        held = replace(held, memories=max(0, held.memories), size_bytes=max(0, held.size_bytes))
        return replace(held, last_used_at=self._growth.last_used_at or held.last_used_at)

    def was_used(self, now: datetime) -> None:
        """This write is of the user's doing, and not of time's or the server's."""
        self._growth = replace(self._growth, last_used_at=now)

    def _put_holdings(self) -> None:
        """Who has nothing has no entry, so that a deleted user's name stays nowhere."""
        key, held = holdings.key_of(self.who, self._owner.prefix), self.holdings
        if held:
            self._txn.put(key, holdings.encode(self.who, held), db=self._dbs["users"])
        else:
            self._txn.delete(key, db=self._dbs["users"])

    def insert(self, now: datetime, **values: Any) -> MemoryRecord:
        """A new record, with the user's next id."""
        record = MemoryRecord(
            id=MemoryId(str(self.new_id(now))),
            tenant=self.who.tenant,
            user=self.who.user,
            created_at=now,
            updated_at=now,
            **values,
        )
        self.put(record)
        return record

    def change(self, old: MemoryRecord, now: datetime, **values: Any) -> MemoryRecord:
        """A new version; the old one stays in the history."""
        new = replace(old, version=old.version + 1, updated_at=now, **values)
        key = uuid.UUID(old.id).bytes
        self.put_row("versions", key + tables.version_key(old.version), records.encode(old), is_new=True)
        if new.text != old.text:
            self.delete_row("vectors", key)
        self.put(new, old)
        return new

    def restore(self, record: MemoryRecord, used: Usage) -> None:
        """A record of another store, with the id that it had there and how it was used; nothing here has this id."""
        self._keep_below(uuid.UUID(record.id))
        self.put(record, used=used)

    def restore_link(self, link_id: uuid.UUID, raw: bytes) -> None:
        self._keep_below(link_id)
        self.put_row("links", link_id.bytes, raw, is_new=True)

    def _keep_below(self, identifier: uuid.UUID) -> None:
        self._owner.last_id = max(self._owner.last_id, identifier)

    def put(self, record: MemoryRecord, old: MemoryRecord | None = None, used: Usage | None = None) -> None:
        """Stores a record in the place of ``old``; without a new version, since its content is the same.

        Args:
            used: how a new one was used elsewhere.
        """
        self.put_row("records", uuid.UUID(record.id).bytes, records.encode(record), is_new=old is None)
        if old is not None:
            self.forget_claims(old)
        if record.is_current:
            for key in claims.keys_of(record.text):
                self.put_row("current", key, uuid.UUID(record.id).bytes)
        if record.document is not None:
            self.put_row("pieces", _piece_key(record, record.document), b"")
        self.schedule(record, self.usage(record.id) if old is not None else used or Usage())
        self._log(tables.PUT, record.id)

    def move(self, old: MemoryRecord, move: Move, now: datetime, **values: Any) -> MemoryRecord:
        """To another state, which is an event of its life and no new version.

        Raises:
            Conflict: its state does not allow it.
        """
        try:
            state = lifecycle.after(old.state, move)
        except lifecycle.IllegalMove as error:
            raise Conflict(str(error)) from error
        new = replace(old, state=state, **values)
        if new == old:  # a use counts in ``usage``; the record, what follows it and its place in the log stay
            return old
        new = replace(new, updated_at=now)
        self.put(new, old)
        return new

    def happened(self, record: MemoryRecord, kind: str, now: datetime, *, is_use: bool = False, **detail: Any) -> None:
        """Notes an event of a memory's life; a use makes it last longer."""
        key, known = uuid.UUID(record.id).bytes, self.usage(record.id)
        raw = self.row("events", key + tables.number_key(known.events)) if known.events else None
        last = usage.decode_event(raw) if raw else None
        if last and (last.kind, last.detail) == (kind, detail):
            event, number = replace(last, last_at=now, times=last.times + 1), known.events
        else:
            event, number = Event(kind, now, now, 1, detail), known.events + 1
        self.put_row("events", key + tables.number_key(number), event.encode())
        if number > tables.EVENTS_KEPT:
            self.delete_row("events", key + tables.number_key(number - tables.EVENTS_KEPT))
        new = replace(known, events=number)
        if is_use:
            new = replace(new, uses=known.uses + 1, last_used_at=now)
        self.schedule(record, new, known)

    def use(self, record: MemoryRecord, kind: str, now: datetime, **detail: Any) -> MemoryRecord:
        """It was used: activated, back from the archive if it was there, and noted."""
        self.happened(record, kind, now, is_use=True, **detail)
        return self.move(record, Move.USE, now)

    def schedule(self, record: MemoryRecord, new: Usage, known: Usage | None = None) -> None:
        """Puts a memory where time finds it, and its usage with that."""
        known = new if known is None else known
        due = lifecycle.next_due(self._aging, self.life(record, new))
        new = replace(new, due_at=due.at if due else None)
        identifier = uuid.UUID(record.id).bytes
        place = self._owner.prefix + identifier
        if known.due_at is not None:
            self._txn.delete(tables.moment_key(known.due_at) + place, db=self._dbs["due"])
        if new.due_at is not None:
            self._txn.put(tables.moment_key(new.due_at) + place, b"", db=self._dbs["due"])
        self.put_row("usage", identifier, new.encode())

    def life(self, record: MemoryRecord, used: Usage) -> Life:
        return Life(
            record.state,
            record.priority,
            record.expires_at,
            used.uses,
            used.last_used_at or record.created_at,
            keeps=record.pinned or record.valid_to is not None or record.type in LASTING_TYPES,
        )

    def due(self, record: MemoryRecord) -> Due | None:
        """What time does to it next."""
        return lifecycle.next_due(self._aging, self.life(record, self.usage(record.id)))

    def drop(self, record: MemoryRecord) -> int:
        """Takes a record out with all that is only about it; how many versions there were."""
        key = uuid.UUID(record.id).bytes
        if (due_at := self.usage(record.id).due_at) is not None:
            self._txn.delete(tables.moment_key(due_at) + self._owner.prefix + key, db=self._dbs["due"])
        self.delete_row("records", key)
        if record.document is not None:
            self.delete_row("pieces", _piece_key(record, record.document))
        self.forget_claims(record)
        removed = {table: self.clear(table, key) for table in tables.OF_A_MEMORY}
        self._log(tables.REMOVE, record.id)
        return removed["versions"]

    def drop_all(self) -> dict[str, int]:
        """Takes out all that the user has; how many entries there were, by table."""
        for key, raw in list(self.rows("usage")):
            if (due_at := usage.decode(raw).due_at) is not None:
                self._txn.delete(tables.moment_key(due_at) + self._owner.prefix + key, db=self._dbs["due"])
        removed = {table: self.clear(table) for table in tables.OF_A_USER}
        self._log(tables.CLEAR, MemoryId(str(records.NO_ID)))
        self._txn.delete(holdings.key_of(self.who, self._owner.prefix), db=self._dbs["users"])
        self._held_before, self._growth = Holdings(), Holdings()  # whatever it said
        return removed

    def forget_claims(self, record: MemoryRecord) -> None:
        for key in claims.keys_of(record.text):
            self.delete_row("current", key, uuid.UUID(record.id).bytes)

    def new_id(self, now: datetime) -> uuid.UUID:
        """Above all ids that the user's memories, links and snapshots ever had."""
        self._owner.last_id = records.next_id(self._owner.last_id, now)
        return self._owner.last_id

    def new_kv_epoch(self) -> None:
        """Makes KV that may hold what was said so far unreachable; ``kv_removals`` knows it until it is gone."""
        self.put_row("kv_removals", tables.number_key(self._owner.kv_epoch), tables.encode_principal(self.who))
        self._owner.kv_epoch += 1

    def put_session(self, name: str, session: Session) -> None:
        self.put_row("sessions", tables.session_key(name), sessions.encode(session))

    def drop_sessions(self, now: datetime, ttl_s: float) -> None:
        """Takes out the user's sessions that are over."""
        for key, raw in list(self.rows("sessions")):
            if sessions.decode(raw).is_over(now, ttl_s):
                self.delete_row("sessions", key)

    def put_row(self, table: str, key: bytes, value: bytes, *, is_new: bool = False) -> None:
        """
        Args:
            is_new: there is no such entry; which need not be looked up then.
        """
        if table in holdings.COUNTED:
            self._count(table, key, None if is_new else self.row(table, key), value)
        self._txn.put(self._owner.prefix + key, value, db=self._dbs[table])

    def delete_row(self, table: str, key: bytes, value: bytes = b"") -> bool:
        if table in holdings.COUNTED:
            self._count(table, key, self.row(table, key), None)
        return bool(self._txn.delete(self._owner.prefix + key, value, db=self._dbs[table]))

    def clear(self, table: str, prefix: bytes = b"") -> int:
        """Deletes the user's entries under a prefix; how many there were."""
        prefix = self._owner.prefix + prefix
        count = 0
        with self._txn.cursor(db=self._dbs[table]) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key().startswith(prefix):
                if table in holdings.COUNTED:
                    self._count(table, cursor.key()[8:], cursor.value(), None)
                cursor.delete()  # moves to the next entry
                count += 1
                found = bool(cursor.key())
        return count

    def _count(self, table: str, key: bytes, old: bytes | None, new: bytes | None) -> None:
        self.has_added |= old is None and new is not None
        key = self._owner.prefix + key
        memories = (new is not None) - (old is not None) if table == "records" else 0
        self._growth = self._growth.plus(memories, holdings.entry_bytes(key, new) - holdings.entry_bytes(key, old))

    def _log(self, operation: bytes, memory_id: MemoryId) -> None:
        self._owner.seq += 1
        self.put_row("changes", tables.number_key(self._owner.seq), operation + uuid.UUID(memory_id).bytes)
        if self._owner.seq > tables.CHANGES_KEPT:
            self.delete_row("changes", tables.number_key(self._owner.seq - tables.CHANGES_KEPT))


def _piece_key(record: MemoryRecord, document: str) -> bytes:
    return tables.document_key(document) + uuid.UUID(record.id).bytes


def _id_of(raw: bytes) -> MemoryId:
    return MemoryId(str(uuid.UUID(bytes=raw)))
