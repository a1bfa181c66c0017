"""How a memory was used: a count and a moment for the life of it, and the last events, for people."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from memos_vllm.memory import tables

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_USAGE = struct.Struct(">QQQQ")


@dataclass(frozen=True, slots=True)
class Usage:
    """One memory's row."""

    uses: int = 0
    """Times a question found it for a prompt, or it was said again."""

    last_used_at: datetime | None = None
    due_at: datetime | None = None
    """Its key in ``due``."""

    events: int = 0
    """Number of the last event."""

    def encode(self) -> bytes:
        return _USAGE.pack(self.uses, _milliseconds(self.last_used_at), _milliseconds(self.due_at), self.events)


def decode(raw: bytes) -> Usage:
    uses, last_used_ms, due_ms, events = _USAGE.unpack(raw)
    return Usage(uses, _moment(last_used_ms), _moment(due_ms), events)


@dataclass(frozen=True, slots=True)
class Event:
    """Something in a memory's life.

    The same kind in the same session and place, with nothing in between, is one event that is
    counted: a fact that stands in the prompt of a hundred turns has one line, not a hundred.
    """

    kind: str
    """``recalled``, ``said_again``, ``superseded``, ``took_over``, ``rolled_back``, or the state that it went into."""

    at: datetime
    last_at: datetime
    times: int = 1
    detail: Mapping[str, Any] | None = None
    """As JSON: session, where in the prompt, scene, the other memory, the message that caused it."""

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "at": self.at.isoformat(),
            "last_at": self.last_at.isoformat(),
            "times": self.times,
            **(self.detail or {}),
        }

    def encode(self) -> bytes:
        values = [self.kind, self.at.isoformat(), self.last_at.isoformat(), self.times, dict(self.detail or {})]
        return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def decode_event(raw: bytes) -> Event:
    kind, at, last_at, times, detail = json.loads(raw)
    return Event(kind, datetime.fromisoformat(at), datetime.fromisoformat(last_at), times, detail)


def _milliseconds(moment: datetime | None) -> int:
    return 0 if moment is None else max(tables.milliseconds(moment), 1)


def _moment(milliseconds: int) -> datetime | None:
    return _EPOCH + timedelta(milliseconds=milliseconds) if milliseconds else None
