"""A session's long-lived memory, frozen at its first recall so that the prompt's prefix stays a hit."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from memos_vllm.types import MemoryId

_TOUCH_SHARE = 0.1
"""A use is written down once per this share of the idle time; one write per turn would cost a sync."""


@dataclass(frozen=True, slots=True)
class Session:
    """Which memories, in order; their texts are read anew with every recall."""

    ids: tuple[MemoryId, ...]
    touched_at: datetime
    """Its last use, up to ``_TOUCH_SHARE`` of the idle time too early."""

    def is_over(self, now: datetime, ttl_s: float) -> bool:
        """Idle for at least ``ttl_s``. A clock that jumped back as far counts as idle too."""
        return abs((now - self.touched_at).total_seconds()) > ttl_s * (1 + _TOUCH_SHARE)

    def needs_touch(self, now: datetime, ttl_s: float) -> bool:
        return abs((now - self.touched_at).total_seconds()) > ttl_s * _TOUCH_SHARE

    def without(self, removed: Collection[MemoryId]) -> Session:
        return replace(self, ids=tuple(memory_id for memory_id in self.ids if memory_id not in removed))


def end_of(touched_at: datetime, ttl_s: float) -> datetime:
    """When a session that is not used any more is over; its working memory ends with it."""
    return touched_at + timedelta(seconds=ttl_s * (1 + _TOUCH_SHARE))


def freeze(ids: Sequence[MemoryId], now: datetime) -> Session:
    return Session(tuple(ids), now)


def encode(session: Session) -> bytes:
    return json.dumps({"ids": session.ids, "touched_at": session.touched_at.isoformat()}).encode()


def decode(raw: bytes) -> Session:
    values = json.loads(raw)
    return Session(tuple(values["ids"]), datetime.fromisoformat(values["touched_at"]))
