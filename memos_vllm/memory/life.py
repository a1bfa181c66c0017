"""The life of memories: what the HTTP layer calls beside ``service``. Each call but ``tend`` is for one user."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memos_vllm.core.lifecycle import OVER, Move, State
from memos_vllm.errors import Conflict, NotFound, RequestError
from memos_vllm.memory import cubes, inputs, links, removal, snapshots, succession
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.limits import UserLimits
from memos_vllm.memory.links import Link
from memos_vllm.memory.records import MemoryRecord, utc_now
from memos_vllm.memory.snapshots import RolledBack, Snapshot
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.memory.usage import Event
from memos_vllm.types import Principal

logger = logging.getLogger(__name__)

MAX_SNAPSHOTS = 100
TEND_BATCH = 1000
NO_LIMITS = UserLimits()
_INTO = {State.FROZEN: Move.FREEZE, State.ARCHIVED: Move.ARCHIVE}


@dataclass(slots=True)
class Tended:
    """What time moved, in memories of all users."""

    seen: int = 0
    """As many as were asked for: there may be more."""

    archived: int = 0
    expired: int = 0
    removed: int = 0


class MemoryLife:
    """
    Args:
        now: the time in UTC; tests set it.

    Raises as ``service.MemoryService``; ``LimitReached`` from merges, links, snapshots and rollbacks; ``NotFound``
    where the user has no such memory, link or snapshot.
    """

    def __init__(self, store: Store, now: Callable[[], datetime] = utc_now, limits: UserLimits = NO_LIMITS):
        self._store = store
        self._now = now
        self._limits = limits

    def cube(self, who: Principal, memory_id: str) -> dict[str, Any]:
        """The memory as a MemCube; see ``cubes``."""
        with self._store.read(who) as user:
            return cubes.cube(user, existing(user, memory_id), self._store.aging, self._now())

    def events(self, who: Principal, memory_id: str) -> Sequence[Event]:
        """The log of its uses and of what happened to it, oldest first."""
        with self._store.read(who) as user:
            return list(user.events(existing(user, memory_id).id))

    def used(
        self, who: Principal, where: Mapping[str, Sequence[str]], *, standing: Collection[str] = (), **detail: Any
    ) -> None:
        """Memories went into a prompt: they are activated and last longer.

        Args:
            where: memory ids by their place in the prompt; those that are gone by now are left out.
            standing: those of them that stood there whatever was asked, and that the question would not have
                found; that is noted, and is no use.
            detail: what is noted beside the place, as JSON: session, scene.
        """
        noted = {name: value for name, value in detail.items() if value is not None}

        def note(user: UserWriter) -> None:
            now = self._now()
            user.was_used(now)
            for place, ids in where.items():
                for memory_id in ids:
                    if (record := user.get(memory_id)) and record.is_current:
                        if memory_id in standing:
                            user.happened(record, "recalled", now, where=place, **noted)
                        else:
                            user.use(record, "recalled", now, where=place, **noted)

        if any(where.values()):
            self._store.write(who, note)

    def set_state(self, who: Principal, memory_id: str, state: str) -> MemoryRecord:
        """Freezes, archives, or brings back into use (``activated``), also what was merged or has expired.

        Raises:
            Conflict: the memory's state, or a newer memory, does not allow it.
        """
        wanted = inputs.check_state(state)

        def move(user: UserWriter) -> MemoryRecord:
            now, record = self._now(), existing(user, memory_id)
            if record.state is wanted:
                return record
            if wanted is not State.ACTIVATED:
                new = user.move(record, _INTO[wanted], now)
                if wanted is State.ARCHIVED:
                    succession.archive_restated(user, record, now)
            elif record.state is State.FROZEN:
                new = user.move(record, Move.RELEASE, now)
            elif record.state in OVER or record.is_current:
                restore = Move.USE if record.state is State.GENERATED else Move.RESTORE
                new = user.move(record, restore, now, superseded_by=None, valid_to=None, **_unexpired(record, now))
                succession.match_links(user, now, record.id)
            else:
                raise Conflict(f"the memory {memory_id} is superseded; roll back, or say it again")
            user.happened(new, str(wanted), now, is_use=wanted is State.ACTIVATED, by="user")
            user.was_used(now)
            return new

        return self._store.write(who, move)

    def merge(self, who: Principal, memory_id: str, others: Iterable[str], text: str | None = None) -> MemoryRecord:
        """Joins other memories into one; see ``succession.merge``. A new text makes KV of the old one unreachable."""
        copies = inputs.check_others(others, memory_id)
        text = None if text is None else inputs.check_text(text)

        def join(user: UserWriter) -> MemoryRecord:
            kept = existing(user, memory_id)
            found = [existing(user, other) for other in copies]
            if text not in (None, kept.text):
                user.new_kv_epoch()
            merged = succession.merge(user, kept, found, self._now(), text)
            self._note_addition(user)
            return merged

        return self._store.write(who, join)

    def link(
        self,
        who: Principal,
        source: str,
        target: str,
        type: str,
        *,
        valid_from: datetime | str | None = None,
        valid_to: datetime | str | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> Link:
        """Joins two memories, from now or for a given time."""
        type = inputs.check_link_type(type, links.RESERVED)
        begin, end = inputs.check_moment(valid_from, "valid_from"), inputs.check_moment(valid_to, "valid_to")
        if source == target:
            raise RequestError("a link joins two memories; 'to' is the memory itself")

        def connect(user: UserWriter) -> Link:
            now, first, second = self._now(), existing(user, source), existing(user, target)
            if end is not None and end <= (begin or now):
                raise RequestError("'valid_to' must be later than 'valid_from'")
            link = links.connect(
                user, first.id, second.id, type, now, valid_from=begin, valid_to=end, origin=inputs.check_origin(origin)
            )
            self._note_addition(user)
            return link

        return self._store.write(who, connect)

    def links(
        self, who: Principal, memory_id: str, *, at: datetime | str | None = None, type: str | None = None
    ) -> Sequence[Link]:
        """From it and to it, oldest first; with ``at`` those that are true at that time."""
        moment = inputs.check_moment(at, "at")
        with self._store.read(who) as user:
            found = links.of(user, existing(user, memory_id).id, type=type)
            return [link for link in found if moment is None or link.is_valid(moment)]

    def end_link(self, who: Principal, link_id: str, *, remove: bool = False) -> Link:
        """From now on it is not true; with ``remove`` it never was."""

        def end(user: UserWriter) -> Link:
            link = links.get(user, link_id)
            if link is None:
                raise NotFound(f"no link {link_id!r}")
            inputs.check_link_type(link.type, links.RESERVED)
            if remove:
                links.remove(user, link)
                return link
            return link if link.valid_to else links.close(user, link, max(self._now(), link.valid_from))

        return self._store.write(who, end)

    def take_snapshot(self, who: Principal, name: str) -> Snapshot:
        """Of all the user's memories as they are now.

        Raises:
            Conflict: the user has ``MAX_SNAPSHOTS`` already.
        """
        name = inputs.check_name(name, "name")

        def take(user: UserWriter) -> Snapshot:
            if sum(1 for _ in snapshots.every(user)) >= MAX_SNAPSHOTS:
                raise Conflict(f"there are {MAX_SNAPSHOTS} snapshots already; delete one first")
            snapshot = snapshots.take(user, name, self._now())
            self._note_addition(user)
            return snapshot

        return self._store.write(who, take)

    def snapshots(self, who: Principal) -> Sequence[Snapshot]:
        with self._store.read(who) as user:
            return list(snapshots.every(user))

    def remove_snapshot(self, who: Principal, snapshot_id: str) -> Snapshot:
        def remove(user: UserWriter) -> Snapshot:
            snapshot = _snapshot(user, snapshot_id)
            snapshots.remove(user, snapshot)
            return snapshot

        return self._store.write(who, remove, frees=True)

    def roll_back(self, who: Principal, snapshot_id: str) -> RolledBack:
        """Everything as it was, by new versions; see ``snapshots``. Where a text changes, so does the KV epoch."""

        def roll_back(user: UserWriter) -> RolledBack:
            done = snapshots.roll_back(user, _snapshot(user, snapshot_id), self._now())
            if done.text_changed:
                user.new_kv_epoch()
            self._note_addition(user)
            return done

        return self._store.write(who, roll_back)

    def _note_addition(self, user: UserWriter) -> None:
        """At the end of a write by which the user may have more than before."""
        user.was_used(self._now())
        self._limits.check(user)

    def tend(self, limit: int = TEND_BATCH) -> Tended:
        """Does what time has made due: archives, expires, removes. Of all users, the longest overdue first."""
        done = Tended()
        now = self._now()
        for who, ids in self._store.due(now, limit).items():
            moved = self._store.write(who, lambda user, ids=ids: _age(user, ids, now), frees=True)
            done.seen += len(ids)
            done.archived += moved.archived
            done.expired += moved.expired
            done.removed += moved.removed
        if done.archived or done.expired or done.removed:
            logger.info("memories aged: %s", done)
        return done


def existing(user: UserReader, memory_id: str) -> MemoryRecord:
    """
    Raises:
        NotFound: the user has no such memory; whether somebody else has does not show.
    """
    record = user.get(memory_id)
    if record is None:
        raise NotFound(f"no memory {memory_id!r}")
    return record


def _age(user: UserWriter, ids: Sequence[str], now: datetime) -> Tended:
    done = Tended()
    for memory_id in ids:
        record = user.get(memory_id)
        due = user.due(record) if record else None
        if record is None:
            continue
        if due is None or due.at > now:  # it was used meanwhile, or the rules have changed
            user.schedule(record, user.usage(record.id))
        elif due.move is None:
            removal.remove(user, record.id)
            done.removed += 1
        else:
            new = user.move(record, due.move, now)
            user.happened(new, str(new.state), now, by="time")
            done.archived += due.move is Move.ARCHIVE
            done.expired += due.move is Move.EXPIRE
    return done


def _unexpired(record: MemoryRecord, now: datetime) -> dict[str, Any]:
    return {"expires_at": None} if record.has_expired(now) else {}


def _snapshot(user: UserReader, snapshot_id: str) -> Snapshot:
    snapshot = snapshots.get(user, snapshot_id)
    if snapshot is None:
        raise NotFound(f"no snapshot {snapshot_id!r}")
    return snapshot
