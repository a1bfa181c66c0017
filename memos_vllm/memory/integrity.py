"""Whether a store agrees with itself, table by table, and how to make it.

The records are the truth. What derives from them is made again; what nothing else tells is taken out
and handed to the caller, who keeps it; and a gap in a history, which nothing can fill, is only told.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace

from memos_vllm.memory import claims, sessions, tables
from memos_vllm.memory.checks import UNREADABLE, Checks, Problem, Repair, Report, entries_under, name_of
from memos_vllm.memory.contract import Transaction
from memos_vllm.memory.life_integrity import LifeChecks
from memos_vllm.memory.owner_integrity import OwnerChecks
from memos_vllm.memory.records import NO_ID
from memos_vllm.memory.recount import HoldingsChecks
from memos_vllm.types import Principal

_RESTART = tables.PUT + NO_ID.bytes
"""The first entry of a log that was begun anew; it tells of nothing."""

_OPERATIONS = (tables.PUT, tables.REMOVE, tables.CLEAR)


class RecordChecks(Checks):
    """Records, and what belongs to them one by one."""

    def records(self) -> Iterator[Problem]:
        """Each decodes, is its owner's, and refers to memories that are there."""
        for key, raw in self._rows("records"):
            record = self._decode(raw)
            if record is None:
                yield self._unreadable("records", key, raw)
                continue
            known = self._owners.get(key[:8])
            if known is None or known[0] != tables.owner_key(Principal(record.tenant, record.user)):
                yield self._unreadable("records", key, raw, "belongs to no user that owns its key")
                continue
            if uuid.UUID(record.id).bytes != key[8:]:
                yield self._unreadable("records", key, raw, f"says that it is {record.id}")
                continue
            if uuid.UUID(record.id) > known[1].last_id:
                owner = known[1]
                owner.last_id = uuid.UUID(record.id)
                yield Problem("owners", name_of(key), "a later memory exists", self._put("owners", known[0], owner))
            for name in ("supersedes", "superseded_by"):
                other = getattr(record, name)
                if (
                    other is not None
                    and self._txn.get(key[:8] + uuid.UUID(other).bytes, db=self._dbs["records"]) is None
                ):
                    mended = replace(record, **{name: None})
                    yield Problem(
                        "records",
                        name_of(key),
                        f"{name} {other}, which is not there",
                        self._put("records", key, mended),
                    )

    def versions(self) -> Iterator[Problem]:
        """Of each memory the versions 1, 2, ... up to the one before its record's."""
        expected: tuple[bytes, int] = (b"", 1)
        for key, raw in self._rows("versions"):
            memory, version = key[:24], int.from_bytes(key[24:], "big")
            old, now = self._decode(raw), self._record(memory)
            if old is None or len(key) != 28:
                yield self._unreadable("versions", key, raw)
            elif now is None:
                yield self._unreadable("versions", key, raw, "is a version of a memory that is not there")
            elif (old.version, old.id) != (version, now.id):
                yield self._unreadable("versions", key, raw, f"says that it is version {old.version} of {old.id}")
            if expected[0] != memory:
                yield from self._end_of_history(*expected)
                expected = (memory, 1)
            if version != expected[1]:
                yield Problem("versions", name_of(memory), f"version {expected[1]} is missing")
            expected = (memory, version + 1)
        yield from self._end_of_history(*expected)
        for key, raw in self._rows("records", counted=False):
            record = self._decode(raw)
            if record and record.version > 1 and not self._has("versions", key):
                yield Problem("versions", name_of(key), f"all {record.version - 1} earlier versions are missing")

    def _end_of_history(self, memory: bytes, version: int) -> Iterator[Problem]:
        now = self._record(memory) if memory else None
        if now is not None and now.version != version:
            yield Problem(
                "versions", name_of(memory), f"ends before version {version}, but the memory has {now.version}"
            )

    def current(self) -> Iterator[Problem]:
        """Under what each current memory says its id, and nothing else."""
        with self._txn.cursor(db=self._dbs["current"]) as cursor:
            for key, raw in self._rows("records", counted=False):
                record = self._decode(raw)
                if record is None or not record.is_current:
                    continue
                for claim in claims.keys_of(record.text):
                    if not cursor.set_key_dup(key[:8] + claim, key[8:]):
                        mend = self._put("current", key[:8] + claim, key[8:])
                        yield Problem("current", name_of(key), "is not found by what it says", mend)
        for key, memory in self._rows("current"):
            record = self._record(key[:8] + memory)
            if record is None or not record.is_current or key[8:] not in claims.keys_of(record.text):
                mend = self._delete("current", key, memory)
                yield Problem("current", name_of(key[:8] + memory), "is found by what it does not say", mend)

    def pieces(self) -> Iterator[Problem]:
        """Of each document the memories that say they are its pieces, and nothing else."""
        for key, raw in self._rows("records", counted=False):
            record = self._decode(raw)
            if record is not None and record.document is not None:
                place = key[:8] + tables.document_key(record.document) + key[8:]
                if self._txn.get(place, db=self._dbs["pieces"]) is None:
                    yield Problem(
                        "pieces", name_of(key), "its document does not know it", self._put("pieces", place, b"")
                    )
        for key, _ in self._rows("pieces"):
            memory = key[:8] + key[8 + tables.DOCUMENT_KEY_BYTES :]
            record = self._record(memory)
            known = record.document if record else None
            if known is None or tables.document_key(known) != key[8 : 8 + tables.DOCUMENT_KEY_BYTES]:
                yield Problem("pieces", name_of(memory), "is no piece of that document", self._delete("pieces", key))

    def changes(self) -> Iterator[Problem]:
        """Of each user the last changes up to the owner's number, without a gap."""
        seen: dict[bytes, list[int]] = {}
        broken: set[bytes] = set()
        for key, raw in self._rows("changes"):
            seq = int.from_bytes(key[8:], "big")
            if key[:8] not in seen and raw == _RESTART:
                seen[key[:8]] = [1, seq]
            first_last = seen.setdefault(key[:8], [seq, seq])
            if seq > first_last[1] + 1 or len(raw) != 17 or raw[:1] not in _OPERATIONS:
                broken.add(key[:8])
            first_last[1] = seq
        for prefix in seen:
            if prefix not in self._owners:
                yield Problem("changes", name_of(prefix), "belongs to no user", self._restart_changes(prefix))
        for prefix, (_, owner) in self._owners.items():
            first, last = seen.get(prefix, (1, 0))
            if prefix in broken or last != owner.seq or first > max(owner.seq - tables.CHANGES_KEPT + 1, 1):
                # Every index sees that it fell behind further than the log reaches, and is built again.
                owner.seq += tables.CHANGES_KEPT + 1
                yield Problem("changes", name_of(prefix), "the log has a gap", self._restart_changes(prefix))

    def sessions(self) -> Iterator[Problem]:
        """Each decodes and holds memories that are there."""
        for key, raw in self._rows("sessions"):
            try:
                session = sessions.decode(raw)
                gone = [each for each in session.ids if self._record(key[:8] + uuid.UUID(each).bytes) is None]
            except UNREADABLE:
                yield self._unreadable("sessions", key, raw)
                continue
            for memory_id in gone:
                session = session.without({memory_id})
            if gone:
                yield Problem(
                    "sessions",
                    name_of(key),
                    f"holds {gone[0]}, which is not there",
                    self._put("sessions", key, session),
                )

    def _restart_changes(self, prefix: bytes) -> Repair:
        """Empties a log; where it has an owner, down to an entry about nothing, with the owner's number."""

        def restart(txn: Transaction) -> None:
            db = self._dbs["changes"]
            for key in [key for key, _ in entries_under(txn, db, prefix)]:
                txn.delete(key, db=db)
            if prefix in self._owners:
                key, owner = self._owners[prefix]
                txn.put(key, owner.encode(), db=self._dbs["owners"])
                txn.put(prefix + tables.number_key(owner.seq), _RESTART, db=db)

        return restart


class Examination(OwnerChecks, RecordChecks, LifeChecks, HoldingsChecks):
    """All tables; the owners first, for the others look at them."""

    def run(self) -> Report:
        for check in (
            *(self.owners, self.records, self.versions, self.current, self.pieces, self.changes, self.sessions),
            *(self.usage, self.due, self.events, self.vectors, self.links, self.successors, self.snapshots),
            *(self.kv_removals, self.unrefined, self.users),
        ):
            self._report.problems += check()
        return self._report
