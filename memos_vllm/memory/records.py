"""A memory as it is stored: its text, where it came from and what became of it."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from memos_vllm.types import MemoryId

TYPES = ("fact", "preference", "profile", "document", "working", "tool")

STANDING_TYPES = frozenset({"fact", "preference", "profile"})
"""Statements about the user, which may stand in the prompt of every conversation."""

NO_ID = uuid.UUID(int=0)
_RANDOM_BITS = 74  # what RFC 9562 leaves to a version 7 UUID beside the 48-bit time, version and variant


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """One memory of one user. All times are UTC."""

    id: MemoryId
    """A version 7 UUID; ids of one user sort by creation, whatever the clock did."""

    tenant: str
    user: str
    type: str
    """One of ``TYPES``."""

    text: str
    pinned: bool
    tags: tuple[str, ...]
    session: str | None
    """The conversation in which it was learned."""

    created_at: datetime
    updated_at: datetime
    """When it was last changed, or said again."""

    version: int = 1
    """Grows by one with each change; earlier versions stay in the history."""

    uses: int = 1
    """How often the user said it."""

    supersedes: MemoryId | None = None
    superseded_by: MemoryId | None = None
    """The newer memory that contradicts this one, which is then not recalled any more."""

    valid_to: datetime | None = None
    """Since when it has been superseded."""

    origin: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, as JSON: source, role, session, request, the rule that kept it."""

    @property
    def is_current(self) -> bool:
        return self.superseded_by is None

    def as_json(self) -> dict[str, Any]:
        """Every field under its own name; times in ISO 8601."""
        return {
            "id": self.id,
            "tenant": self.tenant,
            "user": self.user,
            "type": self.type,
            "text": self.text,
            "pinned": self.pinned,
            "tags": list(self.tags),
            "session": self.session,
            "created_at": self.created_at.isoformat(),
            "updated_at": self.updated_at.isoformat(),
            "version": self.version,
            "uses": self.uses,
            "supersedes": self.supersedes,
            "superseded_by": self.superseded_by,
            "valid_to": self.valid_to.isoformat() if self.valid_to else None,
            "origin": dict(self.origin),
        }


def encode(record: MemoryRecord) -> bytes:
    return json.dumps(record.as_json(), ensure_ascii=False, separators=(",", ":")).encode()


def decode(raw: bytes) -> MemoryRecord:
    values = json.loads(raw)
    for name in ("created_at", "updated_at", "valid_to"):
        if values[name] is not None:
            values[name] = datetime.fromisoformat(values[name])
    values["tags"] = tuple(values["tags"])
    return MemoryRecord(**values)


def next_id(last: uuid.UUID, now: datetime) -> uuid.UUID:
    """A version 7 UUID (RFC 9562) above ``last``, even where the clock stands still or goes back."""
    number = max(_milliseconds(now) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS), _number(last) + 1)
    time, high, low = number >> 74, number >> 62 & 0xFFF, number & (1 << 62) - 1
    return uuid.UUID(int=time << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low)


def parse_id(value: str) -> uuid.UUID | None:
    """The id as it is written by ``str``; None for anything else."""
    try:
        parsed = uuid.UUID(value)
    except (ValueError, TypeError, AttributeError):
        return None
    return parsed if str(parsed) == value else None


def utc_now() -> datetime:
    return datetime.now(UTC)


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000) & (1 << 48) - 1


def _number(identifier: uuid.UUID) -> int:
    """The bits of a version 7 UUID that carry time and order, without version and variant."""
    value = identifier.int
    return (value >> 80) << 74 | (value >> 64 & 0xFFF) << 62 | value & (1 << 62) - 1
