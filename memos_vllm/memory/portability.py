"""All memories of a user out of a store, and into one: what the HTTP layer calls. The form is in ``portable``."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, BinaryIO

from memos_vllm.errors import RequestError
from memos_vllm.memory import links, portable, records, succession, tables
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.limits import UserLimits
from memos_vllm.memory.links import Link
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.types import MemoryId, Principal

_CHECK_EVERY = 1000
"""Memories between two looks at the user's limits, so that far too much is not written to be taken back."""


@dataclass(slots=True)
class Imported:
    """What an import did."""

    memories: int = 0
    """New here."""

    known: int = 0
    """Were here already, as they are in the file or in a later version, and stay as they are here."""

    versions: int = 0
    links: int = 0
    mapped: dict[MemoryId, MemoryId] = field(default_factory=dict)
    """Ids that another memory of the user has, and what they became."""

    def as_json(self) -> dict[str, Any]:
        return {
            "object": "import",
            "memories": self.memories,
            "known": self.known,
            "versions": self.versions,
            "links": self.links,
            "mapped": self.mapped,
        }


class Portability:
    """
    Args:
        now: the time in UTC; tests set it.
        take_in: makes search follow what is new of a user's.

    Raises as ``service.MemoryService``.
    """

    def __init__(
        self, store: Store, now: Callable[[], datetime], limits: UserLimits, take_in: Callable[[Principal], Any]
    ):
        self._store = store
        self._now = now
        self._limits = limits
        self._take_in = take_in

    def export(self, who: Principal, file: BinaryIO) -> None:
        """Writes all memories of a moment into a file.

        Into a file, since the store's moment must not last as long as a client takes to read: the LMDB map cannot
        grow meanwhile.

        Raises:
            OSError: the file takes no more.
        """
        with self._store.read(who) as user:
            for line in portable.lines(user, self._now()):
                file.write(line)

    def take(self, who: Principal, file: BinaryIO) -> Imported:
        """Stores what an export has; all of it or nothing. The same file again changes nothing.

        Args:
            file: can be read several times.

        Raises:
            RequestError: a line is wrong.
            LimitReached: the user would have too much.
        """
        with self._store.read(who) as user:
            had = user.holdings.memories
        texts = _checked(file, lambda number: self._limits.check_number(number, had))

        def take(user: UserWriter) -> Imported:
            return _Import(user, texts, self._now(), self._limits).run(file)

        done = self._store.write(who, take)
        if done.memories:
            self._take_in(who)
        return done


def _checked(file: BinaryIO, check_number: Callable[[int], None]) -> Mapping[MemoryId, bytes]:
    """Digests of the texts of all memories, after every line and what lines say of each other were looked at.

    Args:
        check_number: raises where there are too many memories.
    """
    file.seek(0)
    header = portable.read_header(file)
    texts: dict[MemoryId, bytes] = {}
    successors: dict[MemoryId, MemoryId] = {}
    named: set[str] = set()
    num_versions = num_links = 0
    last: MemoryRecord | None = None
    last_version = 0
    for entry in portable.entries(file):
        record, link = entry.record, entry.link
        if link is not None:
            num_links += 1
            named.update((link.source, link.target))
        elif record is not None and entry.usage is not None:
            if record.id in texts:
                raise RequestError(f"the memory {record.id} stands twice in the file")
            texts[record.id] = _digest(record.text)
            check_number(len(texts))
            named.update(other for other in (record.supersedes, record.superseded_by) if other)
            if record.superseded_by:
                successors[record.id] = record.superseded_by
            last, last_version = record, 0
        elif record is not None:
            if last is None or last.id != record.id or not last_version < record.version < last.version:
                raise RequestError(
                    f"version {record.version} of {record.id} must be an earlier one and stand behind its memory"
                )
            last_version, num_versions = record.version, num_versions + 1
    counted = portable.Header(len(texts), num_versions, num_links)
    if counted != header:
        raise RequestError(
            f"the header tells of {header.memories} memories, {header.versions} versions and {header.links} links, but "
            f"there are {counted.memories}, {counted.versions} and {counted.links}: the file was cut off or changed"
        )
    if missing := named - texts.keys():
        raise RequestError(f"the file names the memory {min(missing)}, which is not in it")
    _check_ends(successors)
    return texts


def _check_ends(successors: Mapping[MemoryId, MemoryId]) -> None:
    """Who follows from a memory to what superseded it comes to an end."""
    ending: set[MemoryId] = set()
    for memory_id in successors:
        path: dict[MemoryId, None] = {}
        at: MemoryId | None = memory_id
        while at is not None and at not in ending:
            if at in path:
                raise RequestError(f"'superseded_by' leads from {at} back to it")
            path[at] = None
            at = successors.get(at)
        ending.update(path)


class _Import:
    def __init__(self, user: UserWriter, texts: Mapping[MemoryId, bytes], now: datetime, limits: UserLimits):
        self._user = user
        self._now = now
        self._limits = limits
        self._done = Imported()
        self._ids: dict[MemoryId, MemoryId] = {}
        """Of every memory in the file its id here."""

        self._taken: set[MemoryId] = set()
        self._added: set[MemoryId] = set()
        """Of ``_taken`` those that are new here."""

        for memory_id, text in texts.items():
            self._place(memory_id, text)

    def run(self, file: BinaryIO) -> Imported:
        file.seek(0)
        portable.read_header(file)
        superseded: list[MemoryId] = []
        for entry in portable.entries(file):
            if entry.link is not None:
                self._link(entry.link)
            elif entry.record is not None and self._ids[entry.record.id] in self._added:
                record = self._here(entry.record)
                if entry.usage is None:
                    self._version(record)
                    continue
                self._user.restore(record, entry.usage)
                self._done.memories += 1
                if record.superseded_by:
                    superseded.append(record.id)
                if self._done.memories % _CHECK_EVERY == 0:
                    self._limits.check(self._user)
        for memory_id in superseded:
            self._join(memory_id)
        self._done.known = len(self._ids) - self._done.memories
        if self._done.memories or self._done.links:
            self._user.was_used(self._now)
            self._limits.check(self._user)
        return self._done

    def _place(self, memory_id: MemoryId, text: bytes) -> None:
        """Its own id if that is free, or is this memory; else one that is the same for this text each time."""
        here = memory_id
        known = self._user.get(here)
        if known is not None and not _said(self._user, known, text):
            here = portable.derived_id(memory_id, text.hex())
            known = self._user.get(here)
            self._done.mapped[memory_id] = here
        if here in self._taken:
            raise RequestError(f"two memories of the file would have the id {here}; give one of them another")
        self._taken.add(here)
        self._ids[memory_id] = here
        if known is None:
            self._added.add(here)

    def _here(self, record: MemoryRecord) -> MemoryRecord:
        def other(memory_id: MemoryId | None) -> MemoryId | None:
            return None if memory_id is None else self._ids.get(memory_id)

        return replace(
            record,
            id=self._ids[record.id],
            tenant=self._user.who.tenant,
            user=self._user.who.user,
            supersedes=other(record.supersedes),
            superseded_by=other(record.superseded_by),
        )

    def _version(self, record: MemoryRecord) -> None:
        key = uuid.UUID(record.id).bytes + tables.version_key(record.version)
        self._user.put_row("versions", key, records.encode(record), is_new=True)
        self._done.versions += 1

    def _link(self, given: Link) -> None:
        source, target = self._ids[given.source], self._ids[given.target]
        link = replace(given, source=source, target=target)
        known = links.get(self._user, link.id)
        if known is not None and (known.source, known.target, known.type) != (source, target, link.type):
            link = replace(link, id=portable.derived_id(link.id, f"{source}\n{target}\n{link.type}"))
            known = links.get(self._user, link.id)
        if known is None:
            links.restore(self._user, succession.matched(self._user, link, self._now))
            self._done.links += 1

    def _join(self, memory_id: MemoryId) -> None:
        """A file that was made by hand may lack the link that the record implies."""
        record = self._user.get(memory_id)
        assert record is not None
        if not any(
            link.valid_to is None and link.type in links.RESERVED and record.superseded_by in (link.source, link.target)
            for link in links.of(self._user, memory_id)
        ):
            succession.join(self._user, record)


def _said(user: UserReader, known: MemoryRecord, text: bytes) -> bool:
    """Whether the memory says this, or said it in an earlier version."""
    return _digest(known.text) == text or any(_digest(old.text) == text for old in user.versions(known.id))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
