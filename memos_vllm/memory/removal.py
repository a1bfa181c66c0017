"""Removing memories, with everything that is about them. What only mentions them is mended."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from memos_vllm.memory import links, sessions, snapshots, succession, tables
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserWriter
from memos_vllm.types import MemoryId


@dataclass(slots=True)
class Removed:
    """What a deletion took out of the store, in entries."""

    ids: list[MemoryId] = field(default_factory=list)
    versions: int = 0
    sessions: int = 0
    """That held it."""

    links: int = 0
    snapshot_entries: int = 0
    derived: list[MemoryId] = field(default_factory=list)
    """Memories that were made from it and are still there, by their ``derived_from`` links."""


def remove(user: UserWriter, memory_id: str) -> Removed:
    """Takes out a memory, its history, what was merged into it and what a model made of it; or nothing.

    A memory that it superseded stays out of use: a deleted correction does not make the error true.
    """
    return remove_several(user, [memory_id])


def remove_several(user: UserWriter, memory_ids: Iterable[str]) -> Removed:
    """Like ``remove`` for each; the KV epoch changes once."""
    removed = Removed()
    waiting = [record for memory_id in memory_ids if (record := user.get(memory_id))]
    while waiting:
        record = waiting.pop()
        if user.get(record.id) is None:  # merged into another one of them
            continue
        copies = links.of(user, record.id, end=tables.TO, type=links.MERGED_INTO)
        waiting += [copy for link in copies if (copy := user.get(link.source)) and copy.superseded_by == record.id]
        waiting += succession.restated(user, record)
        _remove_one(user, record, removed)
    if removed.ids:
        removed.sessions = _leave_sessions(user, set(removed.ids))
        removed.derived = [each for each in removed.derived if user.get(each)]
        user.new_kv_epoch()
    return removed


def remove_all(user: UserWriter) -> Removed:
    ids = [MemoryId(str(uuid.UUID(bytes=key))) for key, _ in user.rows("records")]
    counts = Counter(user.drop_all())
    user.new_kv_epoch()
    return Removed(ids, counts["versions"], counts["sessions"], counts["links"], counts["snapshot_entries"])


def _remove_one(user: UserWriter, record: MemoryRecord, removed: Removed) -> None:
    _close_the_gap(user, record)
    for link in list(links.of(user, record.id)):
        if link.type == links.DERIVED_FROM and link.target == record.id:
            removed.derived.append(link.source)
        links.remove(user, link)
        removed.links += 1
    removed.snapshot_entries += snapshots.forget(user, record.id)
    removed.versions += user.drop(record)
    removed.ids.append(record.id)


def _leave_sessions(user: UserWriter, removed: set[MemoryId]) -> int:
    """One pass for all of them: a user may have thousands of sessions, and a document as many pieces."""
    count = 0
    for key, raw in list(user.rows("sessions")):
        session = sessions.decode(raw)
        if num_held := len(removed.intersection(session.ids)):
            user.put_row("sessions", key, sessions.encode(session.without(removed)))
            count += num_held
    return count


def _close_the_gap(user: UserWriter, record: MemoryRecord) -> None:
    """Joins what superseded the memory to what it superseded, so that neither refers to it."""
    later = [user.get(link.source) for link in links.of(user, record.id, end=tables.TO, type=links.SUPERSEDES)]
    earlier = [user.get(link.target) for link in links.of(user, record.id, end=tables.FROM, type=links.SUPERSEDES)]
    for newer in later:
        if newer and newer.supersedes == record.id:
            user.put(replace(newer, supersedes=record.supersedes), newer)
    for older in earlier:
        if older and older.superseded_by == record.id:
            user.put(replace(older, superseded_by=record.superseded_by), older)
            if record.superseded_by:
                links.renew(user, record.superseded_by, older.id, links.SUPERSEDES, older.valid_to or older.updated_at)
