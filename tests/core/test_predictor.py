"""What a prediction is: bounds, hints, order, reasons, persistence, cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.core import snapshot
from memos_vllm.core.predictor import STATE_VERSION, Predictor
from memos_vllm.core.scenes import (
    Closed,
    Event,
    Scene,
    SceneKind,
    SessionOpened,
    ToolRunning,
    TurnEnded,
    TurnStarted,
    Typing,
    WillUse,
)

SCENES = [f"scene-{i}" for i in range(6)]


def predictor_with(*ids: str, owner: str | None = None) -> Predictor:
    predictor = Predictor()
    for scene_id in ids:
        predictor.add(Scene(scene_id, owner=owner))
    return predictor


def turn(predictor: Predictor, scene_id: str, now: float, tokens: int = 100) -> None:
    predictor.observe(TurnStarted(scene_id, None, tokens, tokens), now)
    predictor.observe(TurnEnded(scene_id, output_tokens=tokens), now + 1)


def event(kind: int, scene_id: str, number: int) -> Event:
    return [
        TurnStarted(scene_id, None, number, number),
        TurnEnded(scene_id, output_tokens=number),
        SessionOpened(scene_id),
        Typing(scene_id),
        WillUse(scene_id, number / 10, (number % 11) / 10),
        ToolRunning(scene_id, number / 10 if number % 2 else None),
        Closed(scene_id),
    ][kind]


events = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.sampled_from(SCENES),
        st.integers(0, 5000),
        st.one_of(st.floats(0, 30), st.floats(0, 1e6)),
    ),
    max_size=60,
)


def replay(steps: list[tuple[int, str, int, float]]) -> tuple[Predictor, float]:
    predictor = Predictor()
    for i, scene_id in enumerate(SCENES):
        predictor.add(Scene(scene_id, owner=["ada", "bob", None][i % 3], label=["", "notes"][i % 2]))
    now = 1e9
    for kind, scene_id, number, wait_s in steps:
        now += wait_s
        predictor.observe(event(kind, scene_id, number), now)
    return predictor, now


@given(events)
def test_probabilities_are_probabilities_and_the_order_follows_the_value(steps) -> None:
    predictor, now = replay(steps)
    ranked = predictor.rank(now + 1, 10)
    for each in ranked:
        told = predictor.predict(each.scene_id, now + 1)
        assert told is not None and (told.probability, told.value) == (each.probability, each.value)
        assert 0.0 < each.probability <= 1.0
        assert 0.0 <= told.expected_in_s < math.inf
        assert told.why
    assert [(-each.value, each.scene_id) for each in ranked] == sorted((-e.value, e.scene_id) for e in ranked)
    assert predictor.rank(now + 1, 10) == ranked
    assert predictor.rank(now + 1, 2) == ranked[:2]


@given(events, st.sampled_from(SCENES), st.sampled_from([Typing, SessionOpened, ToolRunning, WillUse]))
def test_a_hint_never_lowers_the_value(steps, scene_id, hint) -> None:
    predictor, now = replay([step for step in steps if step[0] < 2 or step[0] == 7])
    before = predictor.predict(scene_id, now)
    predictor.observe(hint(scene_id), now)
    after = predictor.predict(scene_id, now)
    assert before is not None and after is not None
    assert after.value >= before.value * (1 - 1e-9)


@given(events, events)
def test_a_restored_predictor_goes_on_the_same(steps, more) -> None:
    predictor, now = replay(steps)
    for scene_id in SCENES:  # what is in use at a stop counts as ended
        predictor.observe(TurnEnded(scene_id), now)
    restored = Predictor.from_bytes(predictor.to_bytes())
    assert restored.rank(now, 10) == predictor.rank(now, 10)
    for kind, scene_id, number, wait_s in more:
        now += wait_s
        for each in (predictor, restored):
            each.observe(event(kind, scene_id, number), now)
    assert restored.rank(now + 60, 10) == predictor.rank(now + 60, 10)
    assert restored.to_bytes() == predictor.to_bytes()


def test_hints_rank_above_everything_else() -> None:
    predictor = predictor_with("quiet", "typed")
    for now in range(0, 6000, 60):  # comes back like a clock
        turn(predictor, "quiet", now)
    turn(predictor, "typed", 0)
    assert predictor.rank(6000, 1)[0].scene_id == "quiet"
    predictor.observe(Typing("typed"), 6000)
    first = predictor.rank(6000, 1)[0]
    assert (first.scene_id, first.probability > 0.8) == ("typed", True)
    told = predictor.predict("typed", 6000)
    assert told is not None and "typing" in told.why


def test_a_more_certain_announcement_is_worth_more() -> None:
    values = []
    for probability in (0.1, 0.5, 1.0):
        predictor = predictor_with("a")
        predictor.observe(WillUse("a", 0, probability), 0)
        values.append(predictor.value("a"))
    assert values == sorted(values) and values[0] < values[-1]


def test_an_announcement_for_later_waits_for_its_time() -> None:
    predictor = predictor_with("soon", "later")
    predictor.observe(WillUse("soon", 5), 0)
    predictor.observe(WillUse("later", 300), 0)
    assert [each.scene_id for each in predictor.rank(0, 2)] == ["soon", "later"]
    early = predictor.predict("later", 1)
    near = predictor.predict("later", 298)
    assert early is not None and near is not None
    assert near.probability > 2 * early.probability
    assert early.expected_in_s == pytest.approx(299, abs=1)


@pytest.mark.parametrize("in_s", [5, 60, 600, 7200])
def test_an_announced_use_is_likely_when_its_time_has_come_and_not_long_after(in_s: float) -> None:
    predictor = predictor_with("a")
    predictor.observe(WillUse("a", in_s), 0)
    due, overdue = predictor.predict("a", in_s), predictor.predict("a", in_s + 600)
    assert due is not None and due.probability > 0.75
    assert overdue is not None and overdue.probability < 0.1


def test_a_hint_that_never_comes_true_is_trusted_less() -> None:
    predictor = predictor_with("a")
    predictor.observe(Typing("a"), 0)
    trusted = predictor.predict("a", 0)
    for i in range(1, 60):
        predictor.observe(Typing("a"), i * 1000)
        predictor.advance(i * 1000 + 900)
    predictor.observe(Typing("a"), 100_000)
    distrusted = predictor.predict("a", 100_000)
    assert trusted is not None and distrusted is not None
    assert distrusted.probability < 0.5 < trusted.probability


def test_closed_is_worth_nothing_until_it_is_opened_again() -> None:
    predictor = predictor_with("a")
    turn(predictor, "a", 0)
    predictor.observe(Closed("a"), 10)
    assert predictor.value("a") == 0 and predictor.rank(11, 5) == []
    assert predictor.predict("a", 11).why == "closed"
    predictor.observe(SessionOpened("a"), 20)
    assert predictor.value("a") > 0


def test_a_scene_in_use_is_not_ranked_but_keeps_its_value() -> None:
    predictor = predictor_with("a")
    turn(predictor, "a", 0)
    predictor.observe(TurnStarted("a"), 30)
    assert predictor.rank(31, 5) == [] and predictor.value("a") > 0
    predictor.observe(TurnEnded("a"), 35)
    assert len(predictor.rank(36, 5)) == 1


def test_before_anything_is_learned_the_latest_is_the_likeliest() -> None:
    predictor = predictor_with(*SCENES)
    for i, scene_id in enumerate(SCENES):
        turn(predictor, scene_id, 10_000 - 10_000 / 4**i)
    assert [each.scene_id for each in predictor.rank(10_000, 10)] == SCENES[::-1]


def test_value_is_seconds_saved_per_byte() -> None:
    predictor = Predictor()
    predictor.add(Scene("small", size_bytes=10, prefill_s=1.0))
    predictor.add(Scene("large", size_bytes=1000, prefill_s=1.0))
    predictor.add(Scene("slow", size_bytes=10, prefill_s=5.0))
    for scene_id in ("small", "large", "slow"):
        predictor.observe(WillUse(scene_id), 0)
    assert [each.scene_id for each in predictor.rank(0, 3)] == ["slow", "small", "large"]


def test_kinds_can_be_asked_for_apart() -> None:
    predictor = predictor_with("a")
    predictor.add(Scene("adapter", kind=SceneKind.ADAPTER))
    for scene_id in ("a", "adapter"):
        predictor.observe(Typing(scene_id), 0)
    assert [each.scene_id for each in predictor.rank(0, 5, [SceneKind.ADAPTER])] == ["adapter"]


def test_removed_scenes_and_owners_are_gone() -> None:
    predictor = predictor_with("a", "b", owner="ada")
    turn(predictor, "a", 0)
    turn(predictor, "b", 5)
    predictor.remove("b")
    assert "b" not in predictor and [each.scene_id for each in predictor.rank(10, 5)] == ["a"]
    predictor.forget_owner("ada")
    assert len(predictor) == 0 and b"ada" not in predictor.to_bytes()


def test_the_table_of_scenes_is_bounded() -> None:
    predictor = Predictor(max_scenes=10)
    for i in range(50):
        predictor.add(Scene(f"s{i}"))
        turn(predictor, f"s{i}", i * 10)
    assert len(predictor) == 10
    assert predictor.rank(500, 1)[0].scene_id == "s49"


def test_changes_are_told_once() -> None:
    predictor = predictor_with("a", "b")
    turn(predictor, "a", 0)
    assert predictor.take_changes() == {"a"}
    assert predictor.take_changes() == set()
    predictor.remove("a")
    assert predictor.take_changes() == {"a"}


def test_events_of_unknown_scenes_and_a_clock_that_goes_back_do_no_harm() -> None:
    predictor = predictor_with("a")
    predictor.observe(Typing("nobody"), 0)
    turn(predictor, "a", 100)
    predictor.observe(TurnStarted("a"), 50)
    predictor.observe(TurnEnded("a"), 40)
    assert 0 < predictor.rank(30, 1)[0].probability <= 1


def test_while_the_server_was_down_nobody_stayed_away() -> None:
    predictor = predictor_with("a", "b")
    for now in range(0, 6000, 60):
        turn(predictor, "a", now)
    state = predictor.to_bytes()
    day_s = 86400.0
    after = {}
    for name, restart in (("told", day_s), ("not told", None)):
        restored = Predictor.from_bytes(state, now=restart)
        restored.advance(day_s)
        turn(restored, "b", day_s)
        after[name] = restored.predict("b", day_s + 50).probability
    assert after["told"] > after["not told"]


def test_a_predictor_can_start_with_the_habits_of_another() -> None:
    predictor = predictor_with("a")
    for now in range(0, 6000, 60):
        turn(predictor, "a", now)
    fresh = predictor.fresh()
    assert len(fresh) == 0 and len(predictor) == 1
    novice = predictor_with("b")
    fresh.add(Scene("b"))
    for each in (fresh, novice):
        turn(each, "b", 0)
    assert fresh.predict("b", 55).probability > 2 * novice.predict("b", 55).probability


def test_what_a_turn_added_follows_from_the_turn_before() -> None:
    """A server sees how long a prompt is when it is rendered, and no more."""
    told, seen = predictor_with("a"), predictor_with("a")
    past = None
    for now, prompt, output in ((0.0, 100, 20), (60.0, 150, 30), (120.0, 800, 10), (180.0, 500, 10)):
        added = None if past is None else max(0, prompt - past)
        told.observe(TurnStarted("a", None, prompt, added), now)
        told.observe(TurnEnded("a", output_tokens=output), now + 1)
        seen.observe(TurnStarted("a"), now)
        seen.observe(TurnEnded("a", prompt, output_tokens=output), now + 1)
        seen = Predictor.from_bytes(seen.to_bytes())  # over a restart, too
        past = prompt + output
        assert seen.to_bytes() == told.to_bytes()
    seen.observe(TurnStarted("a"), 240.0)
    seen.observe(TurnEnded("a"), 241.0)  # an answer that nobody saw
    assert seen.predict("a", 250.0) is not None


def test_what_a_shared_scene_led_to_is_forgotten_with_its_owner() -> None:
    predictor = predictor_with("ada/notes", owner="ada")
    predictor.add(Scene("manual", None, SceneKind.PREFIX))
    for now in range(0, 100, 10):
        predictor.observe(TurnStarted("manual", "ada"), now)
        predictor.observe(TurnEnded("manual"), now + 1)
        turn(predictor, "ada/notes", now + 5)
    predictor.forget_owner("ada")
    assert b"ada" not in predictor.to_bytes()


def text(**state: Any) -> bytes:
    return snapshot.to_bytes(state)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{}", b"[]", b"\xff\xfe", b'{"version": 1, "hazard": 3}', b'{"parts": 1}\n'),
        *(text(), text(version=99), text(version=STATE_VERSION, hazard=3), text(version=[1])),
        *(b'{"parts": 1}\n' + line for line in (b"3", b"[[], false, 1]", b"[[1], true, 1]", b'[["a", "b"], 0, 0]')),
    ],
)
def test_a_state_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Predictor.from_bytes(data)


def test_the_state_is_json() -> None:
    predictor = predictor_with("a", owner="ada")
    turn(predictor, "a", 0)
    first, version, *rest = map(json.loads, predictor.to_bytes().splitlines())
    assert first == {"parts": 1 + len(rest)} and version == [["version"], False, STATE_VERSION]


def test_many_scenes_cost_what_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is looked at: an event visits the scenes that it moves, time those that are due, a ranking its best."""
    num_scenes, num_turns = 2_000, 200
    predictor = Predictor()
    for i in range(num_scenes):
        predictor.add(Scene(f"s{i}", owner=f"u{i % 200}"))
        turn(predictor, f"s{i}", i * 0.25)
    now = 600.0
    predictor.advance(now)
    seen: Counter[str] = Counter()
    visit, best = predictor._visit, predictor._ranking.best
    monkeypatch.setattr(predictor, "_visit", lambda *args: seen.update([doing]) or visit(*args))
    monkeypatch.setattr(predictor._ranking, "best", lambda: (seen.update(["looked at"]) or each for each in best()))
    for i in range(num_turns):
        now += 0.25
        doing = "observing"
        turn(predictor, f"s{i}", now)
        doing = "time"
        predictor.advance(now)
        doing = "ranking"
        predictor.rank(now, 8)
    assert seen["observing"] <= 10 * 2 * num_turns
    assert seen["time"] <= 20 * num_turns
    assert seen["looked at"] <= 2 * 8 * num_turns
    assert not seen["ranking"]


def test_owners_whose_scenes_are_gone_leave_nothing() -> None:
    predictor = Predictor(max_scenes=4)
    predictor.add(Scene("shared", None, SceneKind.PREFIX))
    for number in range(40):
        predictor.add(Scene(f"own {number}", owner=f"user {number}"))
        predictor.observe(TurnStarted(f"own {number}", owner=f"user {number}"), number)
        predictor.observe(TurnStarted("shared", owner=f"guest {number}"), number)
    assert len(predictor._following._last_use) <= 4
    predictor.forget_owner("user 39")
    predictor.remove("shared")
    assert not {"user 39"} & set(predictor._following._last_use)
