"""What stays, what goes first, what is brought: on chains that share blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.core.block_tree import ABSENT, LOADING, RESIDENT
from memos_vllm.core.predictor import Predictor
from memos_vllm.core.residency import ResidencyPolicy
from memos_vllm.core.scenes import Closed, Scene, TurnEnded, Typing, WillUse
from memos_vllm.core.told_values import ToldValues

SYSTEM = ["system0", "system1"]


def chain(name: str, length: int = 4, prefix: list[str] = SYSTEM) -> list[str]:
    return [*prefix, *(f"{name}{i}" for i in range(length))]


def policy_with(**probabilities: float) -> ResidencyPolicy:
    """A policy over chains of two shared and four own blocks, each announced with a probability."""
    policy = ResidencyPolicy(Predictor())
    for name, probability in probabilities.items():
        add(policy, name, chain(name), probability)
    return policy


def add(policy: ResidencyPolicy, name: str, blocks: list[str], probability: float) -> None:
    policy.values.add(Scene(name))
    policy.values.observe(WillUse(name, 0, probability), 0)
    policy.track(name, blocks)
    policy.update()


def test_the_least_probable_goes_first_and_from_its_end() -> None:
    policy = policy_with(a=0.9, b=0.1)
    policy.resident(chain("a") + chain("b"))
    assert policy.coldest(5) == ["b3", "b2", "b1", "b0", "a3"]
    assert policy.coldest(99)[-2:] == ["system1", "system0"]
    policy.check_integrity()


def test_a_shared_block_is_worth_the_sum_of_its_scenes() -> None:
    policy = policy_with(a=0.9, b=0.1)
    assert policy.value("system0") == pytest.approx(policy.value("a0") + policy.value("b0"))
    assert policy.value("a0") == policy.value("a3") == policy.values.value("a")
    assert policy.value("nobody's") == 0


def test_values_follow_the_predictor() -> None:
    policy = policy_with(a=0.9, b=0.1)
    policy.resident(chain("a") + chain("b"))
    policy.values.observe(Closed("a"), 1)
    policy.values.observe(Typing("b"), 1)
    policy.update()
    assert policy.coldest(1) == ["a3"] and policy.value("a0") == 0
    policy.check_integrity()


def test_among_equals_the_least_recently_used_goes_first() -> None:
    policy = policy_with(a=0.5, b=0.5, c=0.5)
    policy.resident(chain("a") + chain("b") + chain("c"))
    policy.used("b", 6, 10.0)
    policy.used("a", 6, 20.0)
    policy.used("c", 6, 15.0)
    assert [block[0] for block in policy.coldest(12)] == list("bbbbccccaaaa")


def test_eviction_is_all_or_nothing() -> None:
    policy = policy_with(a=0.5)
    policy.resident(chain("a"))
    assert policy.evict(7) is None and policy.num_resident == 6
    assert policy.evict(2) == ["a3", "a2"] and policy.num_resident == 4
    assert policy.state("a3") == ABSENT and policy.state("a1") == RESIDENT
    assert policy.evict(0) == []


@pytest.mark.parametrize(("worth", "evicted"), [(1.0, []), (1.24, []), (1.26, ["old1"])])
def test_a_block_takes_anothers_place_only_if_it_is_worth_a_quarter_more(worth: float, evicted: list[str]) -> None:
    values = ToldValues()
    policy = ResidencyPolicy(values)
    policy.track("old", ["old0", "old1"])
    policy.track("new", ["new0"])
    values.tell("planner", [(1.0, "old"), (worth, "new")])
    policy.update()
    policy.resident(["old0", "old1"])
    plan = policy.plan(budget_blocks=1, free_blocks=0)
    assert plan.evict == evicted and len(plan.fetch) == len(evicted)


def test_what_a_request_uses_is_never_given_up() -> None:
    policy = policy_with(a=0.5, b=0.9)
    policy.resident(chain("a") + chain("b"))
    policy.hold(chain("a"))
    policy.hold(chain("a"))
    policy.release(chain("a"))
    assert policy.coldest(99) == ["b3", "b2", "b1", "b0"]
    policy.release(chain("a"))
    assert policy.coldest(1) == ["a3"]


def test_below_a_value_only() -> None:
    policy = policy_with(a=0.9, b=0.1)
    policy.resident(chain("a") + chain("b"))
    assert policy.coldest(99, below=policy.value("a0")) == ["b3", "b2", "b1", "b0"]


def test_the_order_of_given_blocks() -> None:
    policy = policy_with(a=0.9, b=0.1)
    blocks = ["a0", "b0", "x", "system0", "a1", "y", "b1"]
    assert policy.order(blocks) == ["x", "y", "b1", "b0", "a1", "a0", "system0"]


def test_the_most_valuable_is_brought_first_and_from_its_head() -> None:
    policy = policy_with(a=0.1, b=0.9)
    plan = policy.plan(budget_blocks=5, free_blocks=100)
    assert plan.fetch == ["system0", "system1", "b0", "b1", "b2"] and plan.evict == []
    assert policy.state("b0") == LOADING and policy.num_resident == 5
    assert policy.coldest(9) == []  # on their way: they cannot be given up
    assert policy.plan(100, 100).fetch == ["b3", "a0", "a1", "a2", "a3"]
    assert policy.plan(100, 100).fetch == []
    policy.check_integrity()


def test_room_is_made_only_for_what_is_worth_more() -> None:
    policy = policy_with(a=0.9, b=0.5, c=0.48)
    policy.resident(chain("c"))
    plan = policy.plan(budget_blocks=100, free_blocks=0)
    assert plan.fetch == ["a0", "a1", "a2", "a3"]  # b is hardly worth more than c
    assert plan.evict == ["c3", "c2", "c1", "c0"]
    assert policy.num_resident == 6


def test_what_free_places_hold_is_given_up_for_what_is_worth_more() -> None:
    policy = policy_with(a=0.9, b=0.5)
    policy.resident(SYSTEM)
    plan = policy.plan(100, 6, free_worths=[0.0, 0.0, 0.3, 0.3, 0.45, 0.1])
    assert plan.fetch == ["a0", "a1", "a2", "a3"], "b is worth less than 1.25 times 0.45, and what is behind stays"
    plan = policy.plan(100, 3, free_worths=[0.2])
    assert plan.fetch == ["b0", "b1", "b2"], "places that are not named hold nothing"
    assert policy.plan(100, 0, free_worths=[0.0]).fetch == []


def test_a_kept_block_leaves_where_what_free_places_hold_is_worth_more() -> None:
    policy = policy_with(a=0.9, b=0.1)
    policy.resident(chain("b"))
    plan = policy.plan(1, 6, free_worths=[0.8] * 6)
    assert plan.fetch == ["a0"] and plan.evict == ["b3"]


def test_what_no_tier_has_is_not_brought_nor_what_is_behind_it() -> None:
    policy = policy_with(a=0.9, b=0.5)
    policy.resident(SYSTEM)
    plan = policy.plan(100, 100, available=lambda block: block not in ("a2", "b0"))
    assert plan.fetch == ["a0", "a1"]
    assert policy.plan(100, 100, available=lambda block: block != "b0").fetch == ["a2", "a3"]


def test_a_load_that_failed_can_be_planned_again() -> None:
    policy = policy_with(a=0.9)
    fetch = policy.plan(100, 100).fetch
    policy.absent(fetch)
    assert policy.num_resident == 0
    assert policy.plan(100, 100).fetch == fetch


def test_a_conversation_that_grows_keeps_its_blocks() -> None:
    policy = policy_with(a=0.9)
    policy.resident(chain("a", 4))
    policy.track("a", chain("a", 7))
    policy.resident(chain("a", 7))
    assert policy.num_resident == 9 and policy.coldest(1) == ["a6"]
    policy.check_integrity()


def test_what_nobody_contains_any_more_goes_first_and_is_forgotten() -> None:
    policy = policy_with(a=0.9, b=0.5)
    policy.resident(chain("a") + chain("b"))
    policy.forget("a")
    policy.values.remove("a")
    policy.update()
    assert policy.evict(4) == ["a3", "a2", "a1", "a0"]
    assert policy.tree.segment_of("a0") is None
    policy.check_integrity()


def test_a_partial_last_block_is_worth_as_little_as_it_was_used_again() -> None:
    policy = ResidencyPolicy(Predictor(), partial_tails=True)
    add(policy, "a", ["a0", "a1", "a2-partial"], 0.9)
    for i in range(3, 20):
        policy.used("a", i - 1, float(i))
        policy.track("a", [*(f"a{j}" for j in range(i)), f"a{i}-partial"])
    policy.resident([*(f"a{j}" for j in range(19)), "a19-partial"])
    assert policy.tail_share < 0.1
    assert policy.coldest(2) == ["a19-partial", "a18"]
    policy.check_integrity()


names = st.integers(0, 5).map(lambda i: f"scene{i}")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), names, st.lists(st.integers(0, 2), min_size=1, max_size=6)),
        st.tuples(st.just("restart"), names, st.lists(st.integers(0, 2), min_size=1, max_size=6)),
        st.tuples(st.just("hint"), names, st.none()),
        st.tuples(st.just("forget"), names, st.none()),
        st.tuples(st.just("evict"), st.integers(0, 8), st.none()),
        st.tuples(st.just("plan"), st.integers(0, 8), st.integers(0, 4)),
        st.tuples(st.just("fail"), st.integers(0, 8), st.integers(0, 4)),
        st.tuples(st.just("hold"), names, st.none()),
        st.tuples(st.just("wait"), st.floats(0, 1000), st.none()),
    ),
    max_size=50,
)


@given(steps, st.booleans())
def test_counters_and_sums_hold_whatever_happens(steps, partial_tails) -> None:
    predictor = Predictor()
    policy = ResidencyPolicy(predictor, partial_tails=partial_tails)
    chains: dict[str, list[object]] = {}
    held: list[list[object]] = []
    now = 0.0
    for kind, argument, more in steps:
        now += 1.0
        if kind in ("turn", "restart"):
            blocks = list(chains.get(argument, [])) if kind == "turn" else []
            for number in more:
                blocks.append((blocks[-1] if blocks else None, number))
            chains[argument] = blocks
            predictor.add(Scene(argument, num_blocks=len(blocks)))
            predictor.observe(TurnEnded(argument, 100, 10, 10), now)
            policy.track(argument, blocks)
            policy.used(argument, len(blocks), now)
            policy.resident(blocks)
        elif kind == "hint":
            predictor.observe(Typing(argument), now)
        elif kind == "forget" and argument in chains:
            del chains[argument]
            policy.forget(argument)
            predictor.remove(argument)
        elif kind == "evict":
            before = policy.num_resident
            blocks = policy.evict(argument)
            assert policy.num_resident == before - len(blocks or [])
            assert blocks is None or len(set(blocks)) == argument
        elif kind in ("plan", "fail"):
            before = policy.num_resident
            plan = policy.plan(argument, more)
            assert len(plan.fetch) <= argument and policy.num_resident <= before + more
            assert not set(plan.fetch) & set(plan.evict)
            assert all(policy.state(block) == ABSENT for block in plan.evict)
            (policy.resident if kind == "plan" else policy.absent)(plan.fetch)
        elif kind == "hold" and argument in chains:
            policy.hold(chains[argument])
            held.append(list(chains[argument]))
        elif kind == "wait":
            now += argument
            predictor.advance(now)
        policy.update()
        policy.check_integrity()
        in_use = {block for blocks in held for block in blocks}
        assert not in_use.intersection(policy.coldest(99))
    for blocks in held:
        policy.release(blocks)
    for name in chains:
        policy.forget(name)
    policy.check_integrity()
    policy.evict(policy.num_resident)
    assert policy.num_resident == 0 and len(policy.tree) == 0
