"""Next-scene prediction: which scenes will be used soon, and what it is worth to have them ready.

    TurnStarted --> busy --TurnEnded--> waiting --TurnStarted--> busy ...
                                        | hints raise the probability, Closed sets it to 0

A scene's probability is that of a use within the horizon, from four sources taken as independent: its
rate of return (``returns``, ``hazard``), a hint that is open (``hints``), a scene of the same owner that it
often follows and that was just used (``following``), and whose turn is next (``turn_order``). Its value
is probability x prefill seconds saved / bytes, the probability being averaged with those of uses in the
first parts of the horizon (``NEARER``).

Values are kept, not computed when asked for. A scene is visited when an event names it and when
its wait enters the next bin of elapsed time, less and less often as it waits (``visits``): ``advance`` does what
is due.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from memos_vllm.core import snapshot
from memos_vllm.core.following import Following
from memos_vllm.core.hints import HintModel
from memos_vllm.core.prediction import Expected, Prediction, prediction
from memos_vllm.core.ranking import Ranking
from memos_vllm.core.returns import Returns
from memos_vllm.core.scenes import Closed, Event, Scene, SceneKind, TurnEnded, TurnStarted
from memos_vllm.core.turn_order import TurnOrder
from memos_vllm.core.visits import Visits
from memos_vllm.core.waiting import Trigger, Wait

STATE_VERSION = 4
HORIZON_S = 10.0
"""A scene is worth having if it is used within this time; of the order of a few loads and turns."""

NEARER = (1.0, 1 / 16)
"""Parts of the horizon in which a use counts once each. Of two scenes that will surely be used within it the sooner
one is worth more: the other can still be brought when that one has been used, as Belady would have it."""

MAX_SCENES = 200_000
LOOKED_AT = 16
"""How many times as many scenes as are wanted a ranking by owner looks at, in the loop that serves requests."""
_MIN_PROBABILITY = 0.5
"""Whose turn is next is acted on where that is more often right than wrong. What it would bring takes the place of
what is likely by other signs, and until some predictions were made the share that is right is hardly known."""
_HOUR_STEP_S = 1800.0
"""An owner's scene is visited at least this often: the hour of the day changes."""


class Predictor:
    """Not safe for threads; one loop owns it. ``now`` must not go back (if it does, it counts as the latest).

    Args:
        horizon_s: see ``Expected.probability``.
        max_scenes: beyond this the scene of the lowest value is forgotten.
    """

    def __init__(self, horizon_s: float = HORIZON_S, max_scenes: int = MAX_SCENES) -> None:
        self.horizon_s, self.max_scenes = horizon_s, max_scenes
        self._returns, self._hints, self._turn_order = Returns(), HintModel(), TurnOrder()
        self._following = Following(max_scenes)
        self._next: str | None = None  # whose turn is next, as far as that is known
        self._now = -math.inf
        self._waits: dict[str, Wait] = {}
        self._visits = Visits(self._waits)
        self._ranking = Ranking()
        self._changed: set[str] = set()

    def __len__(self) -> int:
        return len(self._waits)

    def __contains__(self, scene_id: str) -> bool:
        return scene_id in self._waits

    def scene(self, scene_id: str) -> Scene | None:
        wait = self._waits.get(scene_id)
        return None if wait is None else wait.scene

    def add(self, scene: Scene) -> None:
        """A scene exists, or its size changed. What was learned of it stays."""
        wait = self._waits.get(scene.id)
        if wait is None:
            if len(self._waits) >= self.max_scenes:
                self.remove(self._ranking.least())
            self._waits[scene.id] = Wait(scene)
            self._ranking.set(scene.id, 0.0)
        else:
            wait.scene = scene
            self._set(wait, wait.probability, wait.urgency)
        self._following.add(scene)

    def remove(self, scene_id: str) -> None:
        """Forgets a scene; what all scenes taught stays."""
        wait = self._waits.pop(scene_id, None)
        if wait is None:
            return
        self._returns.count(wait, self._now)
        self._ranking.remove(scene_id)
        self._changed.add(scene_id)
        self._following.remove(wait.scene)
        self._turn_order.drop(scene_id)

    def owners(self) -> set[str]:
        """Of whom anything is known."""
        of_scenes = {wait.scene.owner for wait in self._waits.values() if wait.scene.owner is not None}
        return of_scenes | self._following.owners() | self._returns.hazard.owners() | self._hints.owners()

    def forget_owner(self, owner: str) -> None:
        """Removes the owner's scenes and habits."""
        theirs = {each for each, wait in self._waits.items() if wait.scene.owner == owner}
        for scene_id in theirs:
            self.remove(scene_id)
        for wait in self._waits.values():
            if wait.trigger is not None and wait.trigger.source in theirs:
                wait.trigger = None
            if wait.turn is not None and wait.turn.source in theirs:
                wait.turn = None
        self._turn_order.forget(theirs)
        self._returns.hazard.forget_owner(owner)
        self._hints.forget_owner(owner)
        self._following.forget_owner(owner)

    def observe(self, event: Event, now: float) -> None:
        """Learns from an event. One that names an unknown scene is ignored."""
        now = self._now = max(now, self._now)
        wait = self._waits.get(event.scene_id)
        if wait is None:
            return
        match event:
            case TurnStarted():
                self._use(wait, event.owner or wait.scene.owner, now)
                wait.prompt_tokens, wait.new_tokens = event.prompt_tokens, event.new_tokens
                wait.context = self._returns.context(wait)
            case TurnEnded():
                self._end(wait, event, now)
            case Closed():
                self._returns.count(wait, now)
                self._end_hint(wait, False, now)
                wait.closed, wait.trigger, wait.turn = True, None, None
            case _:
                if wait.closed:
                    wait.closed, wait.counted_s = False, wait.elapsed_s(now)
                wait.hint = self._hints.open(event, wait.scene.owner, now, wait.hint)
        self._visit(wait, now)

    def advance(self, now: float) -> None:
        """Time passed: visits the scenes whose probability has changed by that."""
        now = self._now = max(now, self._now)
        while (wait := self._visits.next_due(now)) is not None:
            self._visit(wait, now)

    def rank(
        self, now: float, limit: int, kinds: Iterable[SceneKind] | None = None, of_one: int | None = None
    ) -> list[Expected]:
        """The most valuable scenes that no request is using, best first.

        Args:
            of_one: more than so many scenes of one owner are in it only where others have too few, among the
                ``LOOKED_AT * limit`` most valuable.
        """
        self.advance(now)
        wanted = None if kinds is None else set(kinds)
        out: list[Expected] = []
        beyond: list[Expected] = []
        num_of: Counter[str] = Counter()
        for place, scene_id in enumerate(self._ranking.best()):
            if len(out) == limit or (place >= LOOKED_AT * limit and len(out) + len(beyond) >= limit):
                break
            wait = self._waits[scene_id]
            if wait.busy or (wanted is not None and wait.scene.kind not in wanted):
                continue
            expected = Expected(scene_id, wait.probability, wait.value)
            owner = wait.scene.owner
            if of_one is not None and owner is not None:
                num_of[owner] += 1
                if num_of[owner] > of_one:
                    beyond.append(expected)
                    continue
            out.append(expected)
        if beyond and len(out) < limit:
            out += beyond[: limit - len(out)]
            out.sort(key=lambda each: (-each.value, each.scene_id))
        return out

    def predict(self, scene_id: str, now: float) -> Prediction | None:
        """Of one scene; None if it is not known."""
        self.advance(now)
        wait = self._waits.get(scene_id)
        return None if wait is None else prediction(wait, self._returns, self._now, self.scene)

    def value(self, scene_id: str) -> float:
        """As of the last visit."""
        wait = self._waits.get(scene_id)
        return 0.0 if wait is None else wait.value

    def take_changes(self) -> set[str]:
        """Scenes whose value changed, or that were removed, since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def state(self) -> dict[str, Any]:
        """What was learned and the scenes' waits, for ``snapshot``; nothing may change while it is copied."""
        return {
            "version": STATE_VERSION,
            "now": self._now if math.isfinite(self._now) else None,
            "hazard": self._returns.hazard.state(),
            "trust": self._hints.state(),
            **self._following.state(),
            "turn_order": self._turn_order.state(),
            "waits": (wait.state() for wait in self._waits.values()),
        }

    def to_bytes(self) -> bytes:
        return snapshot.to_bytes(self.state())

    @classmethod
    def from_bytes(
        cls, data: bytes, horizon_s: float = HORIZON_S, max_scenes: int = MAX_SCENES, now: float | None = None
    ) -> Predictor:
        """Goes on where ``to_bytes`` was. A scene that was in use then counts as ended then.

        Args:
            now: of the restart. Nobody could return while the server was down, so that time teaches nothing.

        Raises:
            ValueError: not such a state, or of another version: start with a new predictor.
        """
        predictor = cls(horizon_s, max_scenes)
        try:
            state = snapshot.from_bytes(data)
            if state["version"] != STATE_VERSION:
                raise ValueError(f"version {state['version']} of the predictor's state, not {STATE_VERSION}")
            predictor._returns.hazard.restore(state["hazard"])
            if "trust" in state:
                predictor._hints.restore(state["trust"])
            else:
                predictor._hints.restore_whole(state["hints"])
            predictor._following.restore(state["transitions"], state["last_use"])
            predictor._turn_order.restore(state["turn_order"])
            predictor._now = -math.inf if state["now"] is None else state["now"]
            for each in state["waits"]:
                predictor._restore(Wait.from_state(each))
            if now is not None:
                predictor._skip_to(now)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a predictor's state: {error!r}") from error
        return predictor

    def fresh(self) -> Predictor:
        """Knows the habits of kinds and owners that this one has learned, and no scene."""
        predictor = Predictor(self.horizon_s, self.max_scenes)
        predictor._returns.hazard.restore(self._returns.hazard.state())
        predictor._hints.restore(self._hints.state())
        return predictor

    # -- events ------------------------------------------------------------------------------------

    def _use(self, wait: Wait, owner: str | None, now: float) -> None:
        self._returns.returned(wait, now)
        self._end_hint(wait, True, now)
        wait.uses += 1
        wait.busy, wait.closed, wait.trigger, wait.turn = True, False, None, None
        if wait.prompt_tokens is not None:
            wait.past_tokens = wait.prompt_tokens + (wait.output_tokens or 0)
        wait.prompt_tokens = wait.new_tokens = wait.output_tokens = None
        if owner is not None:
            for scene_id, trigger in self._following.used(wait.scene, owner, now, self.scene):
                self._raise(scene_id, trigger)
        if wait.scene.kind is not SceneKind.SESSION_START:  # that is part of the turn of the session which starts so
            self._pass_turn(wait, now)

    def _end(self, wait: Wait, event: TurnEnded, now: float) -> None:
        """The answer is complete: what is known now decides how the return is predicted."""
        if not wait.busy:
            self._use(wait, wait.scene.owner, now)
        if event.prompt_tokens is not None:
            wait.prompt_tokens = event.prompt_tokens
        if event.new_tokens is not None:
            wait.new_tokens = event.new_tokens
        elif wait.new_tokens is None and wait.prompt_tokens is not None and wait.past_tokens is not None:
            wait.new_tokens = max(0, wait.prompt_tokens - wait.past_tokens)
        wait.output_tokens = event.output_tokens
        wait.busy, wait.ended, wait.counted_s = False, now, 0.0
        wait.context = self._returns.context(wait)

    def _pass_turn(self, wait: Wait, now: float) -> None:
        """Takes back who was thought to be next, and says anew whose turn it is after this one."""
        expected = self._turn_order.used(wait.scene.id, now)
        before = None if self._next is None else self._waits.get(self._next)
        self._next = None
        if before is not None and before.turn is not None:
            before.turn = None
            self._visit(before, now)
        if expected is None or expected.probability < _MIN_PROBABILITY:
            return
        target = self._waits.get(expected.scene_id)
        if target is not None and not target.busy and not target.closed:
            target.turn = Trigger(wait.scene.id, now, expected.probability, expected.delay_s)
            self._next = expected.scene_id
            self._visit(target, now)

    def _raise(self, scene_id: str, trigger: Trigger) -> None:
        target = self._waits.get(scene_id)
        if target is not None and not target.busy and not target.closed:
            target.trigger = trigger
            self._visit(target, trigger.since)

    def _end_hint(self, wait: Wait, used: bool, now: float) -> None:
        if wait.hint is not None:
            self._hints.close(wait.hint, wait.scene.owner, used, now)
        wait.hint = None

    # -- probability -------------------------------------------------------------------------------

    def _visit(self, wait: Wait, now: float) -> None:
        """Learns from the wait so far, computes the probability, and says when to come again."""
        if wait.hint is not None and wait.hint.expires <= now:
            self._end_hint(wait, False, now)
        if wait.trigger is not None and wait.trigger.expires <= now:
            wait.trigger = None
        if wait.turn is not None and wait.turn.expires <= now:
            wait.turn = None
        self._returns.count(wait, now)
        gone = wait.closed and wait.hint is None
        within = [0.0 if gone else self._probability(wait, now, part * self.horizon_s) for part in NEARER]
        self._set(wait, within[0], sum(within) / len(within))
        self._visits.schedule(wait, None if gone else self._next_visit(wait, now))

    def _probability(self, wait: Wait, now: float, within_s: float) -> float:
        stays_away = math.exp(-self._returns.expected(wait, now, within_s))
        if wait.hint is not None:
            stays_away *= 1.0 - wait.hint.probability_within(within_s, now)
        if wait.trigger is not None:
            stays_away *= 1.0 + wait.trigger.probability * math.expm1(-within_s / wait.trigger.delay_s)
        if wait.turn is not None:  # before any other, so that how soon that is does not matter
            stays_away *= 1.0 + wait.turn.probability * math.expm1(-self.horizon_s / wait.turn.delay_s)
        return 1.0 - stays_away

    def _set(self, wait: Wait, probability: float, urgency: float) -> None:
        """``urgency``: the probability, averaged over the parts of the horizon."""
        wait.probability, wait.urgency = probability, urgency
        value = urgency * wait.scene.prefill_s / max(1, wait.scene.size_bytes)
        if value != wait.value:
            wait.value = value
            self._changed.add(wait.scene.id)
            self._ranking.set(wait.scene.id, value)

    def _next_visit(self, wait: Wait, now: float) -> float:
        """Not before the probability can have changed much."""
        step_s = self.horizon_s / 4.0
        in_s = max(step_s, self._returns.next_edge_s(wait, now))
        if wait.context is not None and wait.context.clock is not None:
            in_s = min(in_s, max(step_s, _HOUR_STEP_S))
        if wait.hint is not None:
            in_s = min(in_s, step_s)
        for trigger in (wait.trigger, wait.turn):
            if trigger is not None:
                in_s = min(in_s, max(0.001, trigger.expires - now))
        return now + in_s

    def _restore(self, wait: Wait) -> None:
        scene = wait.scene
        if wait.turn is not None:
            self._next = scene.id
        self._waits[scene.id] = wait
        self._ranking.set(scene.id, 0.0)
        self._following.add(scene)
        if wait.uses:
            wait.context = self._returns.context(wait)
        if wait.busy:
            wait.busy, wait.ended, wait.counted_s = False, self._now, 0.0
        self._set(wait, wait.probability, wait.urgency)
        self._visits.schedule(wait, wait.due)

    def _skip_to(self, now: float) -> None:
        self._now = max(now, self._now)
        for wait in self._waits.values():
            if wait.ended is not None:
                wait.counted_s = max(wait.counted_s, self._now - wait.ended)
