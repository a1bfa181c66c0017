"""The states of a memory and what time does to it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from memos_vllm.core.lifecycle import (
    OVER,
    TRANSITIONS,
    Aging,
    Due,
    IllegalMove,
    Life,
    Move,
    State,
    after,
    next_due,
    retention,
    strength_s,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
AGING = Aging(archive_after_s=100.0, remove_after_s=1000.0)


def life(**values: object) -> Life:
    defaults = {
        "state": State.GENERATED, "priority": 0, "expires_at": None, "uses": 0, "last_used_at": NOW, "keeps": False,
    }  # fmt: skip
    return Life(**{**defaults, **values})  # type: ignore[arg-type]


def seconds(number: float) -> datetime:
    return NOW + timedelta(seconds=number)


def test_every_state_has_its_transitions_and_can_be_left() -> None:
    assert set(TRANSITIONS) == set(State)
    for state, moves in TRANSITIONS.items():
        assert any(target is not state for target in moves.values())


def test_what_is_frozen_can_only_be_used_or_released() -> None:
    assert TRANSITIONS[State.FROZEN] == {Move.USE: State.FROZEN, Move.RELEASE: State.ACTIVATED}


@pytest.mark.parametrize("state", sorted(OVER))
def test_what_is_over_only_comes_back(state: State) -> None:
    assert TRANSITIONS[state] == {Move.RESTORE: State.ACTIVATED}
    with pytest.raises(IllegalMove, match="only restore"):
        after(state, Move.USE)


def test_use_brings_back_from_the_archive() -> None:
    assert after(State.ARCHIVED, Move.USE) is State.ACTIVATED


@pytest.mark.parametrize(
    ("uses", "priority", "idle_s"), [(0, 0, 100), (1, 0, 200), (9, 0, 1000), (0, 1, 200), (0, -3, 12.5), (3, 3, 3200)]
)
def test_the_more_it_is_used_the_longer_it_lasts(uses: int, priority: int, idle_s: float) -> None:
    assert strength_s(AGING, uses, priority) == idle_s
    assert next_due(AGING, life(uses=uses, priority=priority)) == Due(seconds(idle_s), Move.ARCHIVE)
    assert retention(idle_s, idle_s) == pytest.approx(0.3679, abs=1e-4)


def test_retention_never_exceeds_one() -> None:
    assert retention(-5.0, 10.0) == retention(0.0, 10.0) == 1.0


@pytest.mark.parametrize(
    ("values", "due"),
    [
        ({"expires_at": seconds(50)}, Due(seconds(50), Move.EXPIRE)),
        ({"expires_at": seconds(500)}, Due(seconds(100), Move.ARCHIVE)),
        ({"expires_at": seconds(500), "keeps": True}, Due(seconds(500), Move.EXPIRE)),
        ({"expires_at": seconds(500), "state": State.ARCHIVED}, Due(seconds(500), Move.EXPIRE)),
        ({"expires_at": seconds(5), "state": State.EXPIRED}, Due(seconds(1005), None)),
        ({"expires_at": seconds(5), "state": State.FROZEN}, None),
        ({"expires_at": seconds(5), "state": State.MERGED}, None),
        ({"state": State.ARCHIVED}, None),
        ({"keeps": True}, None),
    ],
)
def test_what_time_does_next(values: dict[str, object], due: Due | None) -> None:
    assert next_due(AGING, life(**values)) == due


def test_time_can_be_switched_off() -> None:
    assert next_due(Aging(0.0, 0.0), life()) is None
    assert next_due(Aging(0.0, 0.0), life(state=State.EXPIRED, expires_at=NOW)) is None
