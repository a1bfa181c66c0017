"""One client's hints, however many and however wrong, are its own affair."""

from __future__ import annotations

import json
from collections import Counter
from math import exp

import pytest

from memos_vllm.core import trust
from memos_vllm.core.predictor import Predictor
from memos_vllm.core.scenes import Scene, TurnEnded, TurnStarted, Typing, WillUse

STEP_S = 1000.0
"""Longer than any hint here stays open."""


class Story:
    """Users who type, and come or do not."""

    def __init__(self) -> None:
        self.predictor = Predictor()
        self.now = 0.0

    def types(self, owner: str, times: int, comes_after_s: float | None) -> None:
        for _ in range(times):
            self.now += STEP_S
            self.hint(owner)
            if comes_after_s is not None:
                self.predictor.observe(TurnStarted(f"of {owner}"), self.now + comes_after_s)
                self.predictor.observe(TurnEnded(f"of {owner}"), self.now + comes_after_s)
            self.predictor.advance(self.now + STEP_S / 2)

    def hint(self, owner: str) -> None:
        if f"of {owner}" not in self.predictor:
            self.predictor.add(Scene(f"of {owner}", owner=owner))
        self.predictor.observe(Typing(f"of {owner}"), self.now)

    def trusted(self, owner: str) -> float:
        return self.predictor._hints._trust.probability("typing", owner)

    def delay_s(self, owner: str) -> float:
        return self.predictor._hints._trust.delay_s("typing", owner)


def test_a_client_whose_hints_are_wrong_is_not_believed_and_others_are() -> None:
    story = Story()
    before = story.trusted("good/new")
    for number in range(50):
        story.types(f"bad/user-{number}", 20, None)
    story.types("good/ada", 5, 3.0)
    assert story.trusted("bad/user-7") < 0.05 and story.trusted("bad/one nobody has seen") < 0.2
    assert story.trusted("good/ada") > 0.85
    assert before - 0.2 < story.trusted("other/new") < before, "the whole learned of it, a little"
    assert story.trusted("good/new") > 0.8


def test_one_user_of_an_application_does_not_spoil_it_for_the_others() -> None:
    story = Story()
    for number in range(10):
        story.types(f"shop/user-{number}", 3, 3.0)
    story.types("shop/broken", 200, None)
    assert story.trusted("shop/broken") < 0.1
    assert story.trusted("shop/user-3") > 0.85 and story.trusted("shop/new") > 0.75


def test_a_slow_client_does_not_make_the_others_late() -> None:
    story = Story()
    before = story.delay_s("quick/ada")
    story.types("slow/eve", 100, 40.0)
    assert story.delay_s("slow/eve") > 25.0
    assert story.delay_s("quick/ada") < 4 * before


def test_a_client_that_is_mended_is_believed_again() -> None:
    story = Story()
    story.types("app/ada", 2000, None)
    story.types("app/ada", 200, 3.0)
    assert story.trusted("app/ada") > 0.6


def test_the_habit_of_many_is_what_a_new_one_starts_with() -> None:
    story = Story()
    for number in range(100):
        story.types(f"tenant-{number}/user", 10, None)
    assert story.trusted("new/user") < 0.15


@pytest.mark.parametrize("event", [Typing, WillUse])
def test_a_use_that_is_announced_over_and_over_and_does_not_come_counts_against_who_does(event: type) -> None:
    predictor = Predictor()
    predictor.add(Scene("never used", owner="app/ada"))
    for second in range(3600):
        predictor.observe(event("never used"), float(second))
    told = predictor.predict("never used", 3600.0)
    assert told is not None and told.probability < 0.6


def test_repeated_hints_before_a_use_are_one_hint_that_was_right() -> None:
    story = Story()
    for _ in range(20):
        story.now += STEP_S
        for _ in range(60):
            story.now += 2.0
            story.hint("app/ada")
        story.predictor.observe(TurnStarted("of app/ada"), story.now)
        story.predictor.observe(TurnEnded("of app/ada"), story.now)
    assert story.trusted("app/ada") > 0.95


def test_a_state_without_records_of_owners_is_read() -> None:
    """As versions before them wrote it."""
    story = Story()
    story.types("app/ada", 3, None)
    story.hint("app/ada")
    older = [json.loads(line) for line in story.predictor.to_bytes().splitlines()[1:]]
    older = [line for line in older if line[0] != ["trust"]] + [[["hints", "typing"], False, [19.0, 61.0, 1.5, 4.0]]]
    for wait in next(value for path, _, value in older if path == ["waits"]):
        del wait["hint"]["first"]
    restored = Predictor.from_bytes(b"\n".join(json.dumps(each).encode() for each in [{"parts": len(older)}, *older]))
    assert "of app/ada" in restored
    story.predictor = restored
    assert story.trusted("new/user") == pytest.approx(19 / 80) and story.delay_s("new/user") == pytest.approx(exp(1.5))
    story.types("app/ada", 3, None)


def test_what_is_known_of_owners_is_kept_over_a_restart() -> None:
    story = Story()
    story.types("bad/eve", 50, None)
    restored = Predictor.from_bytes(story.predictor.to_bytes())
    assert restored.to_bytes() == story.predictor.to_bytes()
    assert restored._hints._trust.probability("typing", "bad/eve") == story.trusted("bad/eve") < 0.1


def test_a_forgotten_user_leaves_nothing_and_the_last_one_takes_the_tenant_along() -> None:
    story = Story()
    story.types("ann's key/ann", 3, None)
    story.types("shop/ada", 3, None)
    story.types("shop/bob", 3, None)
    assert {"ann's key/ann", "shop/ada"} <= story.predictor.owners()
    for scene_id in ("of ann's key/ann", "of shop/ada"):
        story.predictor.remove(scene_id)
    assert {"ann's key/ann", "shop/ada"} <= story.predictor.owners(), "of their hints something is known still"
    for owner in ("ann's key/ann", "shop/ada"):
        story.predictor.forget_owner(owner)
    text = story.predictor.to_bytes()
    assert b"ann" not in text and b"ada" not in text and b"shop/bob" in text


def test_the_records_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "MAX_OWNERS", 10)
    story = Story()
    for number in range(100):
        story.types(f"tenant-{number}/user-{number}", 2, None)
    records = story.predictor._hints._trust
    assert len(records._owners) == len(records._tenants) == 10
    assert "tenant-99/user-99" in records._owners


# -- the share of one owner in what is expected -------------------------------------------------


def hinted(scenes_of: dict[str | None, int]) -> Predictor:
    """Each owner's scenes, those of the first worth most."""
    predictor = Predictor()
    for place, (owner, number) in enumerate(scenes_of.items()):
        for index in range(number):
            predictor.add(Scene(f"{owner} {index:04}", owner=owner, prefill_s=100.0 - place))
            predictor.observe(Typing(f"{owner} {index:04}"), 0.0)
    return predictor


def owners_of(predictor: Predictor, limit: int, of_one: int) -> Counter[str]:
    ranked = predictor.rank(0.0, limit, of_one=of_one)
    assert len({each.scene_id for each in ranked}) == len(ranked) <= limit
    assert [(-each.value, each.scene_id) for each in ranked] == sorted((-e.value, e.scene_id) for e in ranked)
    return Counter(each.scene_id.split()[0] for each in ranked)


def test_one_owner_does_not_take_the_places_of_all() -> None:
    predictor = hinted({"eve": 64, "ada": 3, "bob": 20})
    assert owners_of(predictor, 24, 6) == {"eve": 15, "ada": 3, "bob": 6}
    assert owners_of(predictor, 12, 6) == {"eve": 6, "ada": 3, "bob": 3}
    assert owners_of(predictor, 24, 24) == {"eve": 24}


def test_an_owner_takes_what_nobody_else_needs() -> None:
    predictor = hinted({"eve": 64, "ada": 1})
    assert owners_of(predictor, 24, 6) == {"eve": 23, "ada": 1}
    assert owners_of(hinted({"eve": 64}), 24, 6) == {"eve": 24}
    assert predictor.rank(0.0, 24, of_one=6)[0].scene_id == "eve 0000"


def test_scenes_of_nobody_have_no_owner_to_hold_back() -> None:
    assert owners_of(hinted({None: 64, "ada": 8}), 24, 6) == {"None": 24}


def test_a_ranking_by_owner_does_not_look_at_every_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = hinted({"eve": 2000})
    looked = []
    best = predictor._ranking.best
    monkeypatch.setattr(predictor._ranking, "best", lambda: (looked.append(each) or each for each in best()))
    assert len(predictor.rank(0.0, 4, of_one=1)) == 4
    assert len(looked) < 200
