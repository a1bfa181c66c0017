"""What the predictor learns from users that behave in a known way."""

from __future__ import annotations

import random

import pytest

from memos_vllm.core.predictor import HORIZON_S, Predictor
from memos_vllm.core.scenes import Scene, SceneKind, TurnEnded, TurnStarted

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
MONDAY = 20_000 * DAY_S


def turn(predictor: Predictor, scene_id: str, now: float, new_tokens: int = 100, length_s: float = 1.0) -> None:
    predictor.observe(TurnStarted(scene_id, None, new_tokens, new_tokens), now)
    predictor.observe(TurnEnded(scene_id, output_tokens=100), now + length_s)


def probability(predictor: Predictor, scene_id: str, now: float) -> float:
    prediction = predictor.predict(scene_id, now)
    assert prediction is not None
    return prediction.probability


def test_a_user_who_returns_each_morning_is_expected_in_the_morning() -> None:
    predictor = Predictor(horizon_s=1800.0)
    rng = random.Random(1)
    predictor.add(Scene("ada/start", "ada", SceneKind.SESSION_START))
    for i in range(20):  # others come once and never again
        predictor.add(Scene(f"other{i}/start", f"other{i}", SceneKind.SESSION_START))
    for day in range(14):
        turn(predictor, "ada/start", MONDAY + day * DAY_S + 8 * HOUR_S + rng.uniform(0, 1200))
        if day < 10:
            for i in (2 * day, 2 * day + 1):
                turn(predictor, f"other{i}/start", MONDAY + day * DAY_S + 9 * HOUR_S)
    today = MONDAY + 14 * DAY_S
    morning = probability(predictor, "ada/start", today + 8 * HOUR_S)
    assert morning > 5 * probability_at(predictor, "ada/start", today - 2 * HOUR_S)
    assert morning > 20 * probability(predictor, "other19/start", today + 8 * HOUR_S)
    assert predictor.rank(today + 8 * HOUR_S, 1)[0].scene_id == "ada/start"


def probability_at(predictor: Predictor, scene_id: str, now: float) -> float:
    """At an earlier time than the predictor has seen; it does not go back itself."""
    state = Predictor.from_bytes(predictor.to_bytes(), horizon_s=predictor.horizon_s)
    state._now = now
    wait = state._waits[scene_id]
    return state._probability(wait, now, HORIZON_S)


def test_one_who_never_returns_is_given_up() -> None:
    predictor = Predictor()
    now = 0.0
    for i in range(200):
        scene_id, owner = (f"loyal{i}", "loyal") if i % 2 else (f"once{i}", "once")
        predictor.add(Scene(scene_id, owner))
        turn(predictor, scene_id, now)
        if i % 2:
            turn(predictor, scene_id, now + 60)
        now += 300
    for name in ("loyal", "once"):
        predictor.add(Scene(f"{name}-new", name))
        turn(predictor, f"{name}-new", now)
    loyal, once = (probability(predictor, f"{name}-new", now + 50) for name in ("loyal", "once"))
    assert loyal > 5 * once


def test_habits_of_all_are_the_start_for_a_new_user() -> None:
    predictor = Predictor()
    for i in range(300):  # everybody returns after about a minute
        predictor.add(Scene(f"s{i}", f"user{i}"))
        turn(predictor, f"s{i}", i * 200.0)
        turn(predictor, f"s{i}", i * 200.0 + 60.0)
    now = 300 * 200.0 + 5000
    predictor.add(Scene("new", "somebody"))
    turn(predictor, "new", now)
    assert probability(predictor, "new", now + 55) > 4 * probability(predictor, "new", now + 300)


@pytest.mark.parametrize("mark", ["position", "message"])
def test_what_tells_returns_from_farewells_is_found(mark: str) -> None:
    """Conversations that reach a second turn go on (position); long messages are answered once and done (message)."""
    predictor = Predictor()
    rng = random.Random(2)
    now = 0.0
    for i in range(400):
        goes_on = rng.random() < 0.3
        tokens = 100 if mark == "position" or goes_on else 5000
        predictor.add(Scene(f"s{i}"))
        turn(predictor, f"s{i}", now, tokens)
        for later in (40, 80, 120) if goes_on else ():
            turn(predictor, f"s{i}", now + later)
        now += 200
    predictor.add(Scene("stays"))
    predictor.add(Scene("leaves"))
    if mark == "position":
        turn(predictor, "stays", now)
        turn(predictor, "leaves", now + 39)
        turn(predictor, "stays", now + 39)
    else:
        turn(predictor, "stays", now + 39, 100)
        turn(predictor, "leaves", now + 39, 5000)
    at = now + 39 + 35
    assert probability(predictor, "stays", at) > 1.5 * probability(predictor, "leaves", at)


def test_the_document_that_usually_follows_is_raised() -> None:
    predictor = Predictor()
    for name in ("question", "manual", "atlas"):
        predictor.add(Scene(name, "ada", SceneKind.PREFIX, label=name))
    now = 0.0
    for _ in range(12):
        turn(predictor, "question", now)
        turn(predictor, "manual", now + 5)
        turn(predictor, "atlas", now + 5000)
        now += 20_000
    turn(predictor, "question", now)
    manual, atlas = predictor.predict("manual", now + 2), predictor.predict("atlas", now + 2)
    assert manual is not None and atlas is not None
    assert manual.probability > 0.6 > atlas.probability
    assert "follows question" in manual.why
    assert manual.expected_in_s == pytest.approx(3, abs=1)


def test_what_follows_for_others_follows_for_a_new_user() -> None:
    predictor = Predictor()
    now = 0.0
    for i in range(20):
        predictor.add(Scene(f"start{i}", f"u{i}", SceneKind.SESSION_START))
        predictor.add(Scene(f"profile{i}", f"u{i}", SceneKind.PREFIX, label="profile"))
        turn(predictor, f"start{i}", now)
        turn(predictor, f"profile{i}", now + 5)
        now += 1000
    predictor.add(Scene("start", "new", SceneKind.SESSION_START))
    predictor.add(Scene("profile", "new", SceneKind.PREFIX, label="profile"))
    turn(predictor, "start", now)
    assert probability(predictor, "profile", now + 2) > 0.6


def test_a_popular_prefix_is_worth_more_than_a_conversation() -> None:
    predictor = Predictor()
    predictor.add(Scene("system prompt", None, SceneKind.PREFIX))
    for i in range(100):
        predictor.add(Scene(f"c{i}"))
        turn(predictor, "system prompt", i * 3.0, length_s=0.0)
        turn(predictor, f"c{i}", i * 3.0)
    first = predictor.rank(300, 1)[0]
    assert first.scene_id == "system prompt" and first.probability > 0.5


def test_a_change_of_habits_is_followed() -> None:
    predictor = Predictor()
    now = 0.0
    for i in range(3000):
        predictor.add(Scene(f"s{i}"))
        turn(predictor, f"s{i}", now)
        if i < 1000:
            turn(predictor, f"s{i}", now + 30)
        now += 100
        if i == 1000:
            eager = probability(predictor, "s1000", now - 100 + 28)
        predictor.remove(f"s{i - 5}")
    predictor.add(Scene("last"))
    turn(predictor, "last", now)
    assert probability(predictor, "last", now + 28) < eager / 2
