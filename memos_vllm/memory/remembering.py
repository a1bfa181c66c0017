"""What becomes of a statement that is to be kept: a new memory, a repetition, a near-duplicate, or a correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from memos_vllm.core.lifecycle import State
from memos_vllm.memory import assertions, claims, succession
from memos_vllm.memory.extraction import Extract
from memos_vllm.memory.records import UNPROMPTED_TYPES, MemoryRecord
from memos_vllm.memory.transactions import UserReader, UserWriter

_CAUSE = ("session", "request", "message", "digest")


def keep(
    user: UserWriter,
    extracted: Extract,
    origin: Mapping[str, Any],
    now: datetime,
    *,
    said: bool = True,
    valid_from: datetime | None = None,
) -> MemoryRecord:
    """Stores one statement.

    What the user has said before, in the same words or as the same claim, is counted and not stored
    again. Nearly the same words are stored and merged into what is known. A claim about something
    that has another value by now supersedes the older ones, and so does what denies what was asserted: they leave
    recall and search but stay in the history, and a pin passes on to the new one.

    Args:
        said: by the user; what he did not say himself is not counted as said again.

    Returns:
        The new record, or the known one.
    """
    if same := known(user, extracted.text, now):
        if same.type == "remark" != extracted.type and same.state is not State.FROZEN:  # asked to remember it now
            same = user.change(same, now, type=extracted.type)
        return _said_again(user, same, origin, now) if said else same
    claim = claims.claim_of(extracted.text)
    rivals = contradicted(user, extracted.text, now)
    near = [] if claim else lasting(sayings(user, claims.near_key(extracted.text), now))
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
        valid_from=valid_from,
    )
    for rival in rivals:
        succession.supersede(user, rival, new, now)
    if near and near[-1].state is not State.FROZEN:
        kept = _said_again(user, near[-1], origin, now) if said else near[-1]
        return succession.merge(user, kept, [replace(new, uses=0)], now)
    return new


def known(user: UserReader, text: str, now: datetime) -> MemoryRecord | None:
    """The current memory that says this, to stay: in the same words, or as the same claim."""
    claim = claims.claim_of(text)
    same = lasting(sayings(user, claims.text_key(text), now))
    if claim and not same:
        same = lasting([each for each in claimed(user, claim, now) if _value(each.text) == claim.value])
    return same[-1] if same else None


def claimed(user: UserReader, claim: claims.Claim, now: datetime) -> list[MemoryRecord]:
    """Claims about the same thing, oldest first."""
    found = {record.id: record for key in claims.subject_keys(claim) for record in sayings(user, key, now)}
    return [found[memory_id] for memory_id in sorted(found)]


def contradicted(user: UserReader, text: str, now: datetime) -> list[MemoryRecord]:
    """What cannot be true beside the text, and claims about the same thing, oldest first."""
    claim, assertion = claims.reading_of(text)
    found = claimed(user, claim, now) if claim else []
    if assertion is not None:
        for predicate in (assertion.predicate, *(implied for implied, _ in assertion.implied)):
            for record in sayings(user, claims.assertion_key(predicate), now):
                earlier = claims.assertion_of(record.text)
                if earlier is not None and assertions.contradicts(assertion, earlier):
                    found.append(record)
        if assertion.ended_subject is not None:
            found += sayings(user, claims.subject_key(claims.Claim(assertion.ended_subject, "")), now)
    by_id = {record.id: record for record in found}
    return [by_id[memory_id] for memory_id in sorted(by_id)]


def _value(text: str) -> str | None:
    claim = claims.claim_of(text)
    return claim.value if claim else None


def sayings(user: UserReader, key: bytes, now: datetime) -> list[MemoryRecord]:
    """Memories that say what the key stands for.

    What a document, a note of one session or a tool says, the user has not said; what has expired is not said
    any more.
    """
    return [
        record
        for record in user.holders(key)
        if record.document is None and record.type not in UNPROMPTED_TYPES and not record.has_expired(now)
    ]


def lasting(records: Sequence[MemoryRecord]) -> list[MemoryRecord]:
    """Those that do not end by themselves: what is said again must not end with what was said before."""
    return [record for record in records if record.expires_at is None or record.state is State.FROZEN]


def _said_again(user: UserWriter, known: MemoryRecord, origin: Mapping[str, Any], now: datetime) -> MemoryRecord:
    """Counted, with the message that said so, but no new version. What was archived comes back."""
    counted = replace(known, uses=known.uses + 1, updated_at=now)
    user.put(counted, known)
    return user.use(counted, "said_again", now, **{name: origin[name] for name in _CAUSE if name in origin})
