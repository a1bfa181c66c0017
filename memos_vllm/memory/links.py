"""Links between memories: typed, directed, true for a time. Both ends can be read; none outlives an end."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from memos_vllm.memory import records, tables
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.types import MemoryId

SUPERSEDES, MERGED_INTO, CONTRADICTS, DERIVED_FROM = "supersedes", "merged_into", "contradicts", "derived_from"
FOLLOWED_BY = "followed_by"
"""From a piece of a document to the next one."""

RESERVED = frozenset({SUPERSEDES, MERGED_INTO})
"""Made by corrections and merges only, for the records say the same."""


@dataclass(frozen=True, slots=True)
class Link:
    id: str
    source: MemoryId
    target: MemoryId
    type: str
    created_at: datetime
    valid_from: datetime
    valid_to: datetime | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def is_valid(self, at: datetime) -> bool:
        return self.valid_from <= at and (self.valid_to is None or at < self.valid_to)

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "from": self.source,
            "to": self.target,
            "type": self.type,
            "created_at": self.created_at.isoformat(),
            "valid_from": self.valid_from.isoformat(),
            "valid_to": self.valid_to.isoformat() if self.valid_to else None,
            "origin": dict(self.origin),
        }


def encode(link: Link) -> bytes:
    return json.dumps(link.as_json(), ensure_ascii=False, separators=(",", ":")).encode()


def decode(raw: bytes) -> Link:
    values = json.loads(raw)
    for name in ("created_at", "valid_from", "valid_to"):
        if values[name] is not None:
            values[name] = datetime.fromisoformat(values[name])
    return Link(source=values.pop("from"), target=values.pop("to"), **values)


def connect(
    user: UserWriter,
    source: MemoryId,
    target: MemoryId,
    type: str,
    now: datetime,
    *,
    valid_from: datetime | None = None,
    valid_to: datetime | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Link:
    """A new link; both memories exist."""
    identifier = user.new_id(now)
    link = Link(str(identifier), source, target, type, now, valid_from or now, valid_to, origin or {})
    restore(user, link)
    return link


def restore(user: UserWriter, link: Link) -> None:
    """Stores a link that has its id already; both memories exist, and no link has the id."""
    identifier = uuid.UUID(link.id)
    user.restore_link(identifier, encode(link))
    user.put_row("link_ends", uuid.UUID(link.source).bytes + identifier.bytes, tables.FROM)
    user.put_row("link_ends", uuid.UUID(link.target).bytes + identifier.bytes, tables.TO)


def renew(user: UserWriter, source: MemoryId, target: MemoryId, type: str, now: datetime, **values: Any) -> Link:
    """Like ``connect``, but of these two and this type there is one link, which is true again."""
    for link in of(user, source, end=tables.FROM, type=type):
        if link.target == target:
            return close(user, link, None)
    return connect(user, source, target, type, now, **values)


def of(user: UserReader, memory_id: MemoryId, *, end: bytes | None = None, type: str | None = None) -> Iterator[Link]:
    """The links of a memory, oldest first; of ``end`` FROM those that go out, of TO those that come in."""
    for key, which in user.rows("link_ends", uuid.UUID(memory_id).bytes):
        if end in (None, which):
            raw = user.row("links", key[16:])
            assert raw is not None
            link = decode(raw)
            if type in (None, link.type):
                yield link


def get(user: UserReader, link_id: str) -> Link | None:
    parsed = records.parse_id(link_id)
    raw = user.row("links", parsed.bytes) if parsed else None
    return decode(raw) if raw else None


def close(user: UserWriter, link: Link, valid_to: datetime | None) -> Link:
    """True until then, or without an end; it stays readable."""
    closed = replace(link, valid_to=valid_to)
    user.put_row("links", uuid.UUID(link.id).bytes, encode(closed))
    return closed


def remove(user: UserWriter, link: Link) -> None:
    identifier = uuid.UUID(link.id).bytes
    user.delete_row("links", identifier)
    for memory_id in (link.source, link.target):
        user.delete_row("link_ends", uuid.UUID(memory_id).bytes + identifier)
