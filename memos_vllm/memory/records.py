"""A memory as it is stored: its text, where it came from and what became of it."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from memos_vllm.core.lifecycle import IN_RECALL, OVER, State
from memos_vllm.types import MemoryId

TYPES = ("fact", "preference", "profile", "remark", "document", "working", "tool_schema", "trajectory")
"""``fact`` is long-term memory of what a user told; docs/MEMORY.md has what is different about each."""

STANDING_TYPES = frozenset({"fact", "preference", "profile"})
"""Statements about the user, which may stand in the prompt of every conversation."""

LASTING_TYPES = frozenset({"preference", "profile"})
"""Who somebody is does not fade: they are not archived because nobody used them."""

UNPROMPTED_TYPES = frozenset({"working", "tool_schema", "trajectory"})
"""Search finds them; what is recalled for a prompt does not have them. ``working`` goes into its session's."""

SENSITIVITIES = ("normal", "sensitive")
MOSTLY: dict[str, Any] = {
    "type": "fact", "pinned": False, "tags": [], "session": None, "version": 1, "state": "generated", "priority": 0,
    "sensitivity": "normal", "expires_at": None, "valid_from": None, "uses": 1, "supersedes": None,
    "superseded_by": None, "valid_to": None, "origin": {},
}  # fmt: skip
_NOTHING = object()
_MOMENTS = ("created_at", "updated_at", "expires_at", "valid_from", "valid_to")

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

    state: State = State.GENERATED
    priority: int = 0
    """From -3 to 3: how long it lasts unused, see ``core.lifecycle``."""

    sensitivity: str = "normal"
    """One of ``SENSITIVITIES``. A sensitive memory is found by its user's search, and goes into no prompt."""

    expires_at: datetime | None = None
    valid_from: datetime | None = None
    """Since when it is true, where that is not when it was stored."""

    uses: int = 1
    """How often the user said it."""

    supersedes: MemoryId | None = None
    superseded_by: MemoryId | None = None
    """The newer memory that contradicts this one or, where this one is ``merged``, that took it over."""

    valid_to: datetime | None = None
    """Since when it has been superseded or merged; stays when the newer memory is deleted."""

    origin: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, as JSON: source, role, session, request, message and digest, the rule that kept it."""

    @property
    def is_current(self) -> bool:
        """Neither superseded nor over. An archived memory is current: search finds it if asked to."""
        return self.valid_to is None and self.state not in OVER

    @property
    def said_at(self) -> datetime:
        return self.valid_from or self.created_at

    @property
    def document(self) -> str | None:
        """The name of the document that it is a piece of."""
        place = self.origin.get("document")
        return place["name"] if isinstance(place, Mapping) else None

    def is_recallable(self, now: datetime) -> bool:
        """Whether it may go into a prompt."""
        return (
            self.is_current and self.state in IN_RECALL and self.sensitivity == "normal" and not self.has_expired(now)
        )

    def is_distillable(self, now: datetime) -> bool:
        """Whether it may go into an adapter's weights, which stand in every conversation."""
        return self.type in STANDING_TYPES and self.is_recallable(now)

    def has_expired(self, now: datetime) -> bool:
        """Also before the state says so."""
        return self.expires_at is not None and self.expires_at <= now and self.state is not State.FROZEN

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
            "state": str(self.state),
            "priority": self.priority,
            "sensitivity": self.sensitivity,
            "expires_at": _text(self.expires_at),
            "valid_from": _text(self.valid_from),
            "uses": self.uses,
            "supersedes": self.supersedes,
            "superseded_by": self.superseded_by,
            "valid_to": _text(self.valid_to),
            "origin": dict(self.origin),
        }


def encode(record: MemoryRecord) -> bytes:
    """What is as it mostly is goes without saying; that is half of a short memory's bytes."""
    values = {name: value for name, value in record.as_json().items() if value != MOSTLY.get(name, _NOTHING)}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def decode(raw: bytes) -> MemoryRecord:
    values = {**MOSTLY, **json.loads(raw)}
    for name in _MOMENTS:
        if values[name] is not None:
            values[name] = datetime.fromisoformat(values[name])
    values["state"] = State(values["state"])
    values["tags"] = tuple(values["tags"])
    values["origin"] = dict(values["origin"])
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


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def utc_now() -> datetime:
    return datetime.now(UTC)


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000) & (1 << 48) - 1


def _number(identifier: uuid.UUID) -> int:
    """The bits of a version 7 UUID that carry time and order, without version and variant."""
    value = identifier.int
    return (value >> 80) << 74 | (value >> 64 & 0xFFF) << 62 | value & (1 << 62) - 1
