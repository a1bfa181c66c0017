"""The life of a memory: its states, what moves it between them, and how long it lasts unused.

States and transitions are those of MemOS (arXiv 2507.03724, section 4.3, "MemLifecycle"):

    generated   stored, not used yet
    activated   used at least once: found for a question, or said again
    archived    left out of recall; comes back when it is used
    merged      said the same as another memory, which took its place
    expired     its time is over; kept for a while, then removed
    frozen      nothing changes it until it is released, neither a correction nor time

That a newer memory contradicts it is no state but the end of its validity.

Forgetting follows MemoryBank (arXiv 2305.10250, section 2.3): retention is exp(-t / S), where t is
the time since the last use and S grows by its first value with each use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

PRIORITIES = range(-3, 4)
"""Each step doubles how long a memory lasts unused."""


class State(StrEnum):
    GENERATED = "generated"
    ACTIVATED = "activated"
    ARCHIVED = "archived"
    MERGED = "merged"
    EXPIRED = "expired"
    FROZEN = "frozen"


class Move(StrEnum):
    USE = "use"
    ARCHIVE = "archive"
    MERGE = "merge"
    EXPIRE = "expire"
    FREEZE = "freeze"
    RELEASE = "release"
    RESTORE = "restore"
    """Back into use, from wherever it went: by a rollback, or because the user asks."""


_IN_USE = {
    Move.ARCHIVE: State.ARCHIVED,
    Move.MERGE: State.MERGED,
    Move.EXPIRE: State.EXPIRED,
    Move.FREEZE: State.FROZEN,
}
_BACK = {Move.RESTORE: State.ACTIVATED}
TRANSITIONS: dict[State, dict[Move, State]] = {
    State.GENERATED: _IN_USE | {Move.USE: State.ACTIVATED},
    State.ACTIVATED: _IN_USE | {Move.USE: State.ACTIVATED},
    State.ARCHIVED: _IN_USE | _BACK | {Move.USE: State.ACTIVATED},
    State.MERGED: _BACK,
    State.EXPIRED: _BACK,
    State.FROZEN: {Move.USE: State.FROZEN, Move.RELEASE: State.ACTIVATED},
}
IN_RECALL = frozenset({State.GENERATED, State.ACTIVATED, State.FROZEN})
OVER = frozenset({State.MERGED, State.EXPIRED})
"""Not a memory of its own any more; only the history tells of it."""


class IllegalMove(ValueError):
    """No such transition."""


def after(state: State, move: Move) -> State:
    """
    Raises:
        IllegalMove: the state does not allow it.
    """
    try:
        return TRANSITIONS[state][move]
    except KeyError:
        allowed = ", ".join(TRANSITIONS[state])
        raise IllegalMove(f"a memory that is {state} has no '{move}', only {allowed}") from None


@dataclass(frozen=True, slots=True)
class Aging:
    """How time moves memories.

    Args:
        archive_after_s: S of a memory without a use and with priority 0; 0 never archives.
        remove_after_s: how long an expired memory is kept; 0 keeps it for ever.
    """

    archive_after_s: float = 90 * 86400.0
    remove_after_s: float = 30 * 86400.0


def strength_s(aging: Aging, uses: int, priority: int) -> float:
    """S, in seconds: the idle time after which retention is 1/e."""
    return aging.archive_after_s * (1 + uses) * 2.0**priority


def retention(idle_s: float, strength_s: float) -> float:
    """From 1 (just used) to 0. A clock that went back counts as just used."""
    return math.exp(-max(idle_s, 0.0) / strength_s) if strength_s else 1.0


@dataclass(frozen=True, slots=True)
class Life:
    """What time needs to know of a memory."""

    state: State
    priority: int
    expires_at: datetime | None
    uses: int
    last_used_at: datetime
    keeps: bool
    """Pinned, of a type that lasts, or superseded and so out of recall already: not archived for want of use."""


@dataclass(frozen=True, slots=True)
class Due:
    at: datetime
    move: Move | None
    """None: it is removed."""


def next_due(aging: Aging, life: Life) -> Due | None:
    """What time does to a memory next, and when; None where time does nothing."""
    if life.state in (State.FROZEN, State.MERGED):
        return None
    if life.state is State.EXPIRED:
        if not aging.remove_after_s or life.expires_at is None:
            return None
        return Due(life.expires_at + timedelta(seconds=aging.remove_after_s), None)
    dues = []
    if life.expires_at is not None:
        dues.append(Due(life.expires_at, Move.EXPIRE))
    if aging.archive_after_s and not life.keeps and life.state is not State.ARCHIVED:
        idle = timedelta(seconds=min(strength_s(aging, life.uses, life.priority), 1e9))
        dues.append(Due(life.last_used_at + idle, Move.ARCHIVE))
    return min(dues, key=lambda due: due.at, default=None)
