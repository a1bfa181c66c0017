"""What becomes of a statement that is to be kept: a new memory, a repetition, or a correction."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from memos_vllm.memory import claims
from memos_vllm.memory.extraction import Extract
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserWriter


def keep(user: UserWriter, extracted: Extract, origin: Mapping[str, Any], now: datetime) -> MemoryRecord:
    """Stores one statement.

    What the user has said before, in the same words or as the same claim, is counted and not stored
    again. A claim about something that has another value by now supersedes the older ones: they
    leave recall and search but stay in the history, and a pin passes on to the new one.

    Returns:
        The new record, or the known one.
    """
    claim = claims.claim_of(extracted.text)
    rivals = user.holders(claims.subject_key(claim)) if claim else []
    same = user.holders(claims.text_key(extracted.text)) or [
        rival for rival in rivals if claims.claim_of(rival.text) == claim
    ]
    if same:
        return user.touch(same[-1], now)
    new = user.insert(
        now,
        text=extracted.text,
        type=extracted.type,
        pinned=any(rival.pinned for rival in rivals),
        tags=(),
        session=origin.get("session"),
        origin={**origin, "rule": extracted.rule},
        supersedes=rivals[-1].id if rivals else None,
    )
    for rival in rivals:
        user.supersede(rival, new, now)
    return new
