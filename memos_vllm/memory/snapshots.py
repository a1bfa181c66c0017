"""Snapshots of all that a user has, and the way back to one.

A snapshot holds no text. It names versions, which the history keeps anyway, and how each memory
stood; so it costs little, and a deleted memory is gone from every snapshot too. A rollback makes new
versions with the old content, and archives what came later: nothing is lost, and it can itself be
rolled back.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from memos_vllm.core.lifecycle import Move, State
from memos_vllm.memory import records, succession, tables
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.types import MemoryId

CONTENT = ("text", "type", "pinned", "tags", "priority", "sensitivity", "valid_from")
"""What a version is, and a rollback brings back."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    id: str
    name: str
    created_at: datetime
    memories: int

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "created_at": self.created_at.isoformat(),
            "memories": self.memories,
        }


@dataclass(frozen=True, slots=True)
class Entry:
    """One memory as the snapshot knows it."""

    version: int
    state: State
    superseded_by: MemoryId | None
    valid_to: datetime | None
    expires_at: datetime | None


@dataclass(slots=True)
class RolledBack:
    """What a rollback did."""

    restored: list[MemoryId] = field(default_factory=list)
    """Have the content or the standing that they had."""

    archived: list[MemoryId] = field(default_factory=list)
    """Came after the snapshot."""

    frozen: list[MemoryId] = field(default_factory=list)
    """Would have changed, but are frozen."""

    text_changed: bool = False

    def as_json(self) -> dict[str, Any]:
        return {"restored": self.restored, "archived": self.archived, "frozen": self.frozen}


def take(user: UserWriter, name: str, now: datetime) -> Snapshot:
    identifier = user.new_id(now)
    count = 0
    for record in user.scan():
        values = [record.version, record.state, record.superseded_by, _text(record.valid_to), _text(record.expires_at)]
        key = identifier.bytes + uuid.UUID(record.id).bytes
        user.put_row("snapshot_entries", key, json.dumps(values).encode(), is_new=True)
        count += 1
    snapshot = Snapshot(str(identifier), name, now, count)
    user.put_row("snapshots", identifier.bytes, _encode(snapshot), is_new=True)
    return snapshot


def every(user: UserReader) -> Iterator[Snapshot]:
    """Oldest first."""
    for _, raw in user.rows("snapshots"):
        yield decode(raw)


def get(user: UserReader, snapshot_id: str) -> Snapshot | None:
    parsed = records.parse_id(snapshot_id)
    raw = user.row("snapshots", parsed.bytes) if parsed else None
    return decode(raw) if raw else None


def remove(user: UserWriter, snapshot: Snapshot) -> None:
    key = uuid.UUID(snapshot.id).bytes
    user.delete_row("snapshots", key)
    user.clear("snapshot_entries", key)


def forget(user: UserWriter, memory_id: MemoryId) -> int:
    """Takes a memory out of all snapshots; of how many."""
    memory = uuid.UUID(memory_id).bytes
    return sum(user.delete_row("snapshot_entries", key + memory) for key, _ in list(user.rows("snapshots")))


def entries(user: UserReader, snapshot: Snapshot) -> dict[MemoryId, Entry]:
    found = {}
    for key, raw in user.rows("snapshot_entries", uuid.UUID(snapshot.id).bytes):
        version, state, superseded_by, valid_to, expires_at = json.loads(raw)
        memory_id = MemoryId(str(uuid.UUID(bytes=key[16:])))
        found[memory_id] = Entry(version, State(state), superseded_by, _moment(valid_to), _moment(expires_at))
    return found


def roll_back(user: UserWriter, snapshot: Snapshot, now: datetime) -> RolledBack:
    """Every memory says and stands as it did then; frozen ones excepted."""
    done = RolledBack()
    wanted = entries(user, snapshot)
    for record in list(user.scan()):
        entry = wanted.get(record.id)
        if entry is None:
            _put_away(user, record, snapshot, now, done)
        else:
            _bring_back(user, record, entry, snapshot, now, done)
    succession.match_links(user, now)
    return done


def _put_away(user: UserWriter, record: MemoryRecord, snapshot: Snapshot, now: datetime, done: RolledBack) -> None:
    if record.state is State.FROZEN:
        done.frozen.append(record.id)
    elif record.is_current and record.state is not State.ARCHIVED:
        user.move(record, Move.ARCHIVE, now)
        user.happened(record, "archived", now, rollback=snapshot.id)
        done.archived.append(record.id)


def _bring_back(
    user: UserWriter, record: MemoryRecord, entry: Entry, snapshot: Snapshot, now: datetime, done: RolledBack
) -> None:
    then = _version(user, record, entry.version)
    content = {name: getattr(then, name) for name in CONTENT}
    state = entry.state
    if record.state is State.ACTIVATED and state is State.GENERATED:
        state = record.state  # it was used since; that stays true
    standing = {
        "state": state,
        "superseded_by": entry.superseded_by if entry.superseded_by and user.get(entry.superseded_by) else None,
        "valid_to": entry.valid_to,
        "expires_at": entry.expires_at,
    }
    changed = any(getattr(record, name) != value for name, value in content.items())
    if not changed and all(getattr(record, name) == value for name, value in standing.items()):
        return
    if record.state is State.FROZEN:
        done.frozen.append(record.id)
        return
    done.text_changed |= then.text != record.text
    new = user.change(record, now, **content, **standing)
    user.happened(new, "rolled_back", now, rollback=snapshot.id, version=entry.version)
    done.restored.append(record.id)


def _version(user: UserReader, record: MemoryRecord, version: int) -> MemoryRecord:
    if version == record.version:
        return record
    raw = user.row("versions", uuid.UUID(record.id).bytes + tables.version_key(version))
    assert raw is not None, "a version that a snapshot names is gone"
    return records.decode(raw)


def _encode(snapshot: Snapshot) -> bytes:
    return json.dumps(snapshot.as_json(), ensure_ascii=False).encode()


def decode(raw: bytes) -> Snapshot:
    values = json.loads(raw)
    values["created_at"] = datetime.fromisoformat(values["created_at"])
    return Snapshot(**values)


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
