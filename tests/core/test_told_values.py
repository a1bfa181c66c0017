"""Values as the planners tell them: merged, exact in sums, busy scenes above all."""

from __future__ import annotations

import pytest

from memos_vllm.core.residency import ResidencyPolicy
from memos_vllm.core.told_values import ToldValues


def test_the_latest_word_of_each_planner_counts_and_the_highest_of_several() -> None:
    values = ToldValues()
    values.tell("p", [(0.5, "a"), (0.2, "b")])
    values.tell("q", [(0.4, "b")])
    assert list(values) == ["a", "b"] and values.value("a") > values.value("b") > 0
    assert values.take_changes() == {"a", "b"}
    values.tell("p", [(0.2, "b")])
    assert list(values) == ["b"] and values.value("a") == 0.0
    assert values.take_changes() == {"a"}, "b is worth what q says, as before"


def test_a_busy_scene_is_worth_more_than_any_that_is_expected() -> None:
    values = ToldValues()
    values.tell("p", [(1e30, "a")], busy=["b"])
    values.tell("q", [(0.1, "b")])
    assert values.busy() == {"b"} and values.value("b") >= values.value("a") > 0


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_what_is_worth_nothing_is_not_expected(value: float) -> None:
    values = ToldValues()
    values.tell("p", [(value, "a")])
    assert not list(values)


def test_however_small_a_value_it_is_something() -> None:
    values = ToldValues()
    values.tell("p", [(1e-12, "a")])
    assert values.value("a") > 0.0


def test_a_block_is_worth_exactly_nothing_once_its_scenes_are() -> None:
    """Sums of fractions would leave a rest, and the block would be kept for ever."""
    values = ToldValues()
    policy = ResidencyPolicy(values, watch_worth=True)
    told = [(0.1, "a"), (0.2, "b"), (0.3, "c"), (0.7, "d")]
    values.tell("p", told)
    for _, scene_id in told:
        policy.track(scene_id, ["head", f"tail of {scene_id}"])
    for _, gone in told:
        values.tell("p", [each for each in told if each[1] > gone])
        policy.update()
    assert policy.value("head") == 0.0
