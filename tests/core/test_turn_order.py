"""Whose turn is next: learned in one round where scenes take turns, not believed where they do not."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm.core import snapshot
from memos_vllm.core.predictor import Predictor
from memos_vllm.core.residency import SWAP_GAIN
from memos_vllm.core.scenes import Closed, Scene, SceneKind, TurnEnded, TurnStarted, Typing
from memos_vllm.core.turn_order import TurnOrder

USERS = tuple("abcdefgh")


def predictor_of(users: tuple[str, ...] = USERS) -> Predictor:
    predictor = Predictor()
    for user in users:
        predictor.add(Scene(user, owner=f"owner of {user}"))
    return predictor


def turn(predictor: Predictor, user: str, now: float) -> None:
    predictor.observe(TurnStarted(user), now)
    predictor.observe(TurnEnded(user), now + 0.5)


def best(predictor: Predictor, now: float) -> str:
    return predictor.rank(now, 1)[0].scene_id


def test_a_rota_is_known_after_one_round() -> None:
    predictor, now = predictor_of(), 0.0
    for user in (*USERS, USERS[0]):
        turn(predictor, user, now)
        now += 2.0
    for user in (*USERS[1:], *USERS):
        assert best(predictor, now - 1.0) == user
        turn(predictor, user, now)
        now += 2.0


def test_what_a_session_starts_with_has_no_turn_of_its_own() -> None:
    predictor, now = predictor_of(), 0.0
    for user in USERS:
        predictor.add(Scene(f"start of {user}", owner=f"owner of {user}", kind=SceneKind.SESSION_START))
    for user in USERS:
        turn(predictor, f"start of {user}", now)
        turn(predictor, user, now + 0.01)
        now += 2.0
    turn(predictor, USERS[0], now)
    for user in USERS[1:]:
        assert best(predictor, now + 1.0) == user
        now += 2.0
        turn(predictor, user, now)


def test_whose_turn_it_is_is_worth_a_swap_though_all_return_soon() -> None:
    """All return within the horizon for certain; only the one who comes first must be there now."""
    predictor, now = predictor_of(), 0.0
    for user in USERS * 12:
        turn(predictor, user, now)
        now += 1.2
    predictor.advance(now)
    assert all(predictor.value(USERS[0]) >= SWAP_GAIN * predictor.value(user) for user in USERS[1:])


def test_who_types_is_worth_a_swap() -> None:
    """They come in any order, so that nothing but the hint says who is first."""
    predictor, rng, now = predictor_of(), random.Random(1), 0.0
    for _ in range(40):
        for user in rng.sample(USERS, len(USERS)):
            predictor.observe(Typing(user), now)
            turn(predictor, user, now + 0.5)
            now += 1.2
    for user in USERS:
        predictor.observe(Typing(user), now)
        others = [each for each in USERS if each != user]
        assert all(predictor.value(user) >= SWAP_GAIN * predictor.value(each) for each in others), user
        turn(predictor, user, now + 0.5)
        now += 1.2


def test_the_reason_names_whose_turn_it_follows_if_that_is_his_own() -> None:
    for owner, place in (("owner of a", "its turn is after b"), ("owner of b", "its turn is next")):
        predictor = predictor_of(("a",))
        predictor.add(Scene("b", owner=owner))
        for now, user in enumerate("abab"):
            turn(predictor, user, float(now))
        prediction = predictor.predict("a", 4.0)
        assert prediction is not None and place in prediction.why
        assert prediction.expected_in_s < 1.0


def test_users_who_come_as_they_like_are_not_thought_to_take_turns() -> None:
    order, rng, now = TurnOrder(), random.Random(7), 0.0
    expected = None
    for _ in range(2000):
        expected = order.used(f"user {rng.randrange(100)}", now) or expected
        now += 1.0
    assert expected is not None and expected.probability < 0.1


def test_an_agent_loop_among_noise_is_still_believed() -> None:
    """Evidence is judged apart: what followed every time is right, what followed once is not."""
    order, rng, now = TurnOrder(), random.Random(7), 0.0
    for _ in range(300):
        for scene_id in ("plan", "act", "check", f"guest {rng.randrange(10**6)}"):
            order.used(scene_id, now)
            now += 1.0
    order.used("plan", now)
    following = order.used("act", now + 1.0)
    assert following is not None and following.scene_id == "check" and following.probability > 0.9


def test_what_did_not_come_is_taken_back() -> None:
    predictor = predictor_of(("a", "b", "c"))
    for now, user in enumerate("ababab"):
        turn(predictor, user, float(now))
    raised = predictor.predict("a", 6.0)
    turn(predictor, "c", 6.0)
    lowered = predictor.predict("a", 6.6)
    assert raised is not None and lowered is not None
    assert "its turn is next" in raised.why and "its turn is" not in lowered.why
    assert lowered.probability < raised.probability


def test_a_closed_scene_has_no_turn() -> None:
    predictor = predictor_of(("a", "b"))
    for now, user in enumerate("abab"):
        turn(predictor, user, float(now))
    predictor.observe(Closed("a"), 4.0)
    turn(predictor, "b", 5.0)
    assert best(predictor, 6.0) == "b"


def test_a_scene_that_goes_on_does_not_pass_its_turn() -> None:
    order = TurnOrder()
    for now, scene_id in enumerate("abab"):
        order.used(scene_id, float(now))
    following = order.used("b", 4.0)
    assert following is not None and following.scene_id == "a"


def test_forgotten_scenes_are_named_nowhere() -> None:
    order = TurnOrder()
    for now, scene_id in enumerate("abcabca"):
        order.used(scene_id, float(now))
    order.forget({"a"})
    state = snapshot.to_bytes(order.state()).decode()
    assert '"a"' not in state and '"b"' in state


@settings(max_examples=50)
@given(st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.sampled_from("abcd"), max_size=10))
def test_a_restored_order_goes_on_the_same(before: list[str], after: list[str]) -> None:
    order, restored = TurnOrder(), TurnOrder()
    for now, scene_id in enumerate(before):
        order.used(scene_id, float(now))
    restored.restore(snapshot.from_bytes(snapshot.to_bytes(order.state())))
    for now, scene_id in enumerate(after, len(before)):
        assert order.used(scene_id, float(now)) == restored.used(scene_id, float(now))
