"""What becomes of a statement that is to be kept: a new memory, a repetition, a near-duplicate, or a correction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from memos_vllm.core.lifecycle import State
from memos_vllm.memory import claims, succession
from memos_vllm.memory.extraction import Extract
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserWriter

_CAUSE = ("session", "request", "message", "digest")


def keep(user: UserWriter, extracted: Extract, origin: Mapping[str, Any], now: datetime) -> MemoryRecord:
    """Stores one statement.

    What the user has said before, in the same words or as the same claim, is counted and not stored
    again. Nearly the same words are stored and merged into what is known. A claim about something
    that has another value by now supersedes the older ones: they leave recall and search but stay in
    the history, and a pin passes on to the new one.

    Returns:
        The new record, or the known one.
    """
    claim = claims.claim_of(extracted.text)
    rivals = _said(user, claims.subject_key(claim)) if claim else []
    same = _said(user, claims.text_key(extracted.text)) or [
        rival for rival in rivals if claims.claim_of(rival.text) == claim
    ]
    if same:
        return _said_again(user, same[-1], origin, now)
    near = [] if claim else _said(user, claims.near_key(extracted.text))
    changed = [rival for rival in rivals if rival.state is not State.FROZEN]
    new = user.insert(
        now,
        text=extracted.text,
        type=extracted.type,
        pinned=any(rival.pinned for rival in changed),
        tags=(),
        session=origin.get("session"),
        origin={**origin, "rule": extracted.rule},
        supersedes=changed[-1].id if changed else None,
    )
    for rival in rivals:
        succession.supersede(user, rival, new, now)
    if near and near[-1].state is not State.FROZEN:
        return succession.merge(user, _said_again(user, near[-1], origin, now), [replace(new, uses=0)], now)
    return new


def _said(user: UserWriter, key: bytes) -> list[MemoryRecord]:
    """Memories that say what the key stands for; what a document says, the user has not said."""
    return [record for record in user.holders(key) if record.document is None]


def _said_again(user: UserWriter, known: MemoryRecord, origin: Mapping[str, Any], now: datetime) -> MemoryRecord:
    """Counted, with the message that said so, but no new version. What was archived comes back."""
    counted = replace(known, uses=known.uses + 1, updated_at=now)
    user.put(counted, known)
    return user.use(counted, "said_again", now, **{name: origin[name] for name in _CAUSE if name in origin})
