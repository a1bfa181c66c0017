"""Whether usage, links and snapshots agree with the records. Everything here can be made again or taken out."""

from __future__ import annotations

import contextlib
import json
import struct
import uuid
from collections.abc import Iterator

from memos_vllm.memory import links, snapshots, succession, tables, usage
from memos_vllm.memory.checks import UNREADABLE, Checks, Problem, name_of
from memos_vllm.memory.links import Link
from memos_vllm.memory.usage import Usage


class LifeChecks(Checks):
    """All that is about memories beside what they say."""

    def usage(self) -> Iterator[Problem]:
        """Each record has a row, and stands in ``due`` where the row says."""
        for key, raw in self._rows("records", counted=False):
            record = self._decode(raw)
            if record is None:
                continue
            known = self._usage(key)
            if known is None or (known.due_at is not None and not self._is_due(known, key)):
                mend = self._as_user(record, lambda user, r=record, known=known: user.schedule(r, known or Usage()))
                yield Problem("usage", name_of(key), "time does not find it", mend)
        for key, raw in self._rows("usage"):
            if self._record(key) is None or self._usage(key) is None:
                yield self._unreadable("usage", key, raw, "cannot be read, or is of a memory that is not there")

    def due(self) -> Iterator[Problem]:
        for key, _ in self._rows("due"):
            known = self._usage(key[8:])
            if known is None or known.due_at is None or tables.moment_key(known.due_at) != key[:8]:
                yield Problem("due", name_of(key[8:]), "time finds it too often", self._delete("due", key))

    def events(self) -> Iterator[Problem]:
        for key, raw in self._rows("events"):
            known = self._usage(key[:24])
            number = int.from_bytes(key[24:], "big")
            try:
                usage.decode_event(raw)
            except UNREADABLE:
                yield self._unreadable("events", key, raw)
                continue
            if known is None or not known.events - tables.EVENTS_KEPT < number <= known.events:
                yield self._unreadable("events", key, raw, f"event {number} is of no memory, or not one of its last")

    def vectors(self) -> Iterator[Problem]:
        for key, _ in self._rows("vectors"):
            if self._record(key) is None:
                mend = self._delete("vectors", key)
                yield Problem("vectors", name_of(key), "is of a memory that is not there", mend)

    def unrefined(self) -> Iterator[Problem]:
        for key, _ in self._rows("unrefined"):
            if self._record(key) is None:
                mend = self._delete("unrefined", key)
                yield Problem("unrefined", name_of(key), "is of a memory that is not there", mend)

    def links(self) -> Iterator[Problem]:
        """Both ends are there and know the link; links that the records imply are true as long as they say so."""
        for key, raw in self._rows("links"):
            try:
                link = links.decode(raw)
                ends = {
                    key[:8] + uuid.UUID(link.source).bytes: tables.FROM,
                    key[:8] + uuid.UUID(link.target).bytes: tables.TO,
                }
            except UNREADABLE:
                yield self._unreadable("links", key, raw)
                continue
            if any(self._record(end) is None for end in ends):
                yield Problem("links", name_of(key), "joins a memory that is not there", self._delete("links", key))
                continue
            for end, which in ends.items():
                if self._txn.get(end + key[8:], db=self._dbs["link_ends"]) != which:
                    mend = self._put("link_ends", end + key[8:], which)
                    yield Problem("links", name_of(end), f"does not know the link {link.id}", mend)
            if link.type in links.RESERVED:
                yield from self._agrees(key, link)
        for key, which in self._rows("link_ends"):
            raw = self._txn.get(key[:8] + key[24:], db=self._dbs["links"])
            if raw is None or which not in (tables.FROM, tables.TO):
                mend = self._delete("link_ends", key)
                yield Problem("link_ends", name_of(key), "knows a link that is not there", mend)

    def successors(self) -> Iterator[Problem]:
        """What took a memory's place is joined to it by a link."""
        for key, raw in self._rows("records", counted=False):
            record = self._decode(raw)
            if record is None or record.superseded_by is None:
                continue
            if not any(self._is_successor(end, record.superseded_by) for end in self._ends(key)):
                mend = self._as_user(record, lambda user, record=record: succession.join(user, record))
                yield Problem("records", name_of(key), f"has no link to {record.superseded_by}", mend)

    def snapshots(self) -> Iterator[Problem]:
        known: set[bytes] = set()
        for key, raw in self._rows("snapshots"):
            try:
                snapshots.decode(raw)
                known.add(key)
            except UNREADABLE:
                yield self._unreadable("snapshots", key, raw)
        for key, raw in self._rows("snapshot_entries"):
            record = self._record(key[:8] + key[24:])
            try:
                version = json.loads(raw)[0]
            except UNREADABLE:
                version = 0
            if key[:24] not in known or record is None or not 1 <= version <= record.version:
                mend = self._delete("snapshot_entries", key)
                yield Problem("snapshot_entries", name_of(key), "names a version that is not there", mend)

    def kv_removals(self) -> Iterator[Problem]:
        for key, raw in self._rows("kv_removals"):
            owner = self._owners.get(key[:8])
            try:
                named = tables.owner_key(tables.decode_principal(raw))
            except UNREADABLE:
                named = b""
            if owner is None or named != owner[0] or int.from_bytes(key[8:], "big") >= owner[1].kv_epoch:
                yield self._unreadable("kv_removals", key, raw, "is of no past epoch of a user")

    def _agrees(self, key: bytes, link: Link) -> Iterator[Problem]:
        replaced, by = (link.target, link.source) if link.type == links.SUPERSEDES else (link.source, link.target)
        record = self._record(key[:8] + uuid.UUID(replaced).bytes)
        assert record is not None
        if (record.superseded_by == by) != (link.valid_to is None):
            mend = self._as_user(record, lambda user: succession.match_links(user, record.updated_at, record.id))
            yield Problem("links", name_of(key), "says something else of a correction or merge than the records", mend)

    def _usage(self, key: bytes) -> Usage | None:
        raw = self._txn.get(key, db=self._dbs["usage"])
        try:
            return usage.decode(raw) if raw is not None else None
        except struct.error:
            return None

    def _is_due(self, known: Usage, key: bytes) -> bool:
        assert known.due_at is not None
        return self._txn.get(tables.moment_key(known.due_at) + key, db=self._dbs["due"]) is not None

    def _ends(self, memory: bytes) -> Iterator[Link]:
        with self._txn.cursor(db=self._dbs["link_ends"]) as cursor:
            found = cursor.set_range(memory)
            while found and cursor.key().startswith(memory):
                raw = self._txn.get(memory[:8] + cursor.key()[24:], db=self._dbs["links"])
                with contextlib.suppress(*UNREADABLE):  # told by ``links``
                    yield links.decode(raw or b"")
                found = cursor.next()

    @staticmethod
    def _is_successor(link: Link, successor: str) -> bool:
        return link.type in links.RESERVED and successor in (link.source, link.target)
