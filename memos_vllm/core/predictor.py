"""Next-scene prediction: which scenes will be used soon, and what it is worth to have them ready.

    TurnStarted --> busy --TurnEnded--> waiting --TurnStarted--> busy ...
                                        | hints raise the probability, Closed sets it to 0

A scene's probability is that of a use within the horizon, from four sources taken as independent: its
rate of return (``returns``, ``hazard``), a hint that is open (``hints``), a scene of the same owner that it
often follows and that was just used (``transitions``), and whose turn is next (``turn_order``). Its value
is probability x prefill seconds saved / bytes, the probability being averaged with those of uses in the
first parts of the horizon (``NEARER``).

Values are kept, not computed when asked for. A scene is visited when an event names it and when
its wait enters the next bin of elapsed time, less and less often as it waits: ``advance`` does what is due.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memos_vllm.core import snapshot
from memos_vllm.core.hints import HintModel
from memos_vllm.core.ranking import Ranking
from memos_vllm.core.returns import Returns
from memos_vllm.core.scenes import Closed, Event, Scene, SceneKind, TurnEnded, TurnStarted
from memos_vllm.core.transitions import Transitions
from memos_vllm.core.turn_order import TurnOrder
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
_MAX_TRIGGERS = 4
_MIN_PROBABILITY = 0.5
"""Whose turn is next is acted on where that is more often right than wrong. What it would bring takes the place of
what is likely by other signs, and until some predictions were made the share that is right is hardly known."""
_DAY_S = 86400.0
_HOUR_STEP_S = 1800.0
"""An owner's scene is visited at least this often: the hour of the day changes."""


@dataclass(frozen=True, slots=True)
class Expected:
    scene_id: str
    probability: float
    """Of a use within the horizon."""
    value: float
    """Expected prefill seconds saved per byte."""


@dataclass(frozen=True, slots=True)
class Prediction(Expected):
    """With what takes a hundred times as long to tell, and nobody needs of all scenes."""

    expected_in_s: float
    """Of the uses that come within a day, half come earlier."""
    why: str


class Predictor:
    """Not safe for threads; one loop owns it. ``now`` must not go back (if it does, it counts as the latest).

    Args:
        horizon_s: see ``Prediction.probability``.
        max_scenes: beyond this the scene of the lowest value is forgotten.
    """

    def __init__(self, horizon_s: float = HORIZON_S, max_scenes: int = MAX_SCENES) -> None:
        self.horizon_s, self.max_scenes = horizon_s, max_scenes
        self._returns, self._hints, self._transitions = Returns(), HintModel(), Transitions()
        self._turn_order = TurnOrder()
        self._next: str | None = None  # whose turn is next, as far as that is known
        self._now = -math.inf
        self._waits: dict[str, Wait] = {}
        self._roles: dict[tuple[str | None, str], str] = {}  # owner and role -> the latest such scene
        self._last_use: dict[str | None, tuple[str, float]] = {}  # owner -> scene and time, the latest last
        self._due: list[tuple[float, str, int]] = []
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
        self._roles[scene.owner, scene.role] = scene.id

    def remove(self, scene_id: str) -> None:
        """Forgets a scene; what all scenes taught stays."""
        wait = self._waits.pop(scene_id, None)
        if wait is None:
            return
        self._returns.count(wait, self._now)
        self._ranking.remove(scene_id)
        self._changed.add(scene_id)
        self._transitions.forget(scene_id)
        self._turn_order.drop(scene_id)
        if self._roles.get((wait.scene.owner, wait.scene.role)) == scene_id:
            del self._roles[wait.scene.owner, wait.scene.role]
        if (owner := wait.scene.owner) in self._last_use and self._last_use[owner][0] == scene_id:
            del self._last_use[owner]

    def owners(self) -> set[str]:
        """Of whom anything is known."""
        of_scenes = {wait.scene.owner for wait in self._waits.values() if wait.scene.owner is not None}
        of_uses = {owner for owner in self._last_use if owner}
        return of_scenes | of_uses | self._returns.hazard.owners() | self._hints.owners()

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
        self._last_use.pop(owner, None)

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
        while self._due and self._due[0][0] <= now:
            _, scene_id, version = heapq.heappop(self._due)
            wait = self._waits.get(scene_id)
            if wait is not None and wait.version == version:
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
        return None if wait is None else self._prediction(wait, self._now)

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
            "transitions": self._transitions.state(),
            "turn_order": self._turn_order.state(),
            "last_use": ([owner, *use] for owner, use in self._last_use.items()),
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
            predictor._transitions.restore(state["transitions"])
            predictor._turn_order.restore(state["turn_order"])
            predictor._last_use = {owner: (scene_id, at) for owner, scene_id, at in state["last_use"]}
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
        wait.prompt_tokens = wait.new_tokens = wait.output_tokens = None
        if owner is not None:
            self._follow(wait, owner, now)
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
        wait.output_tokens = event.output_tokens
        wait.busy, wait.ended, wait.counted_s = False, now, 0.0
        wait.context = self._returns.context(wait)

    def _follow(self, wait: Wait, owner: str, now: float) -> None:
        """Learns what this use followed, and raises what usually follows it."""
        scene_id, role = wait.scene.id, f"role {wait.scene.role}"
        if owner in self._last_use:
            before_id, at = self._last_use[owner]
            before = self._waits.get(before_id)
            if before is not None and before is not wait:
                if before.scene.owner is not None or wait.scene.owner is None:  # else it would outlive its owner
                    self._transitions.follow(before_id, scene_id, now - at)
                if before.scene.role != wait.scene.role:
                    self._transitions.follow(f"role {before.scene.role}", wait.scene.role, now - at)
        self._last_use.pop(owner, None)
        self._last_use[owner] = (scene_id, now)
        if len(self._last_use) > self.max_scenes:  # of shared scenes, whose users have none of their own
            del self._last_use[next(iter(self._last_use))]
        self._transitions.use(scene_id)
        self._transitions.use(role)
        raised = {scene_id}
        for follower in self._transitions.followers(scene_id)[:_MAX_TRIGGERS]:
            raised.add(follower.key)
            self._raise(follower.key, Trigger(scene_id, now, follower.probability, max(0.05, follower.delay_s)))
        for follower in self._transitions.followers(role)[:_MAX_TRIGGERS]:
            target = self._roles.get((owner, follower.key)) or self._roles.get((None, follower.key))
            if target is not None and target not in raised:
                self._raise(target, Trigger(role, now, follower.probability, max(0.05, follower.delay_s)))

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
        self._schedule(wait, None if gone else self._next_visit(wait, now))

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

    def _schedule(self, wait: Wait, due: float | None) -> None:
        wait.due = due
        wait.version += 1
        if due is not None:
            heapq.heappush(self._due, (due, wait.scene.id, wait.version))
        if len(self._due) > 4 * len(self._waits) + 1024:
            self._due = [
                (each.due, each.scene.id, each.version) for each in self._waits.values() if each.due is not None
            ]
            heapq.heapify(self._due)

    def _restore(self, wait: Wait) -> None:
        scene = wait.scene
        if wait.turn is not None:
            self._next = scene.id
        self._waits[scene.id] = wait
        self._ranking.set(scene.id, 0.0)
        self._roles[scene.owner, scene.role] = scene.id
        if wait.uses:
            wait.context = self._returns.context(wait)
        if wait.busy:
            wait.busy, wait.ended, wait.counted_s = False, self._now, 0.0
        self._set(wait, wait.probability, wait.urgency)
        self._schedule(wait, wait.due)

    def _skip_to(self, now: float) -> None:
        self._now = max(now, self._now)
        for wait in self._waits.values():
            if wait.ended is not None:
                wait.counted_s = max(wait.counted_s, self._now - wait.ended)

    # -- telling -----------------------------------------------------------------------------------

    def _prediction(self, wait: Wait, now: float) -> Prediction:
        return Prediction(
            wait.scene.id, wait.probability, wait.value, self._expected_in_s(wait, now), self._why(wait, now)
        )

    def _expected_in_s(self, wait: Wait, now: float) -> float:
        if wait.hint is not None:
            return wait.hint.remaining_s(now)
        for trigger in (wait.turn, wait.trigger):
            if trigger is not None:
                return max(0.0, trigger.since + trigger.delay_s - now)
        return self._returns.median_s(wait, now, _DAY_S)

    def _why(self, wait: Wait, now: float) -> str:
        parts = []
        if wait.hint is not None:
            share = 100 * wait.hint.probability
            parts.append(f"hint {wait.hint.kind} {now - wait.hint.since:.1f} s ago, right in {share:.0f} % of cases")
        if wait.closed:
            parts.append("closed")
        if wait.trigger is not None:
            parts.append(f"follows {wait.trigger.source} in {100 * wait.trigger.probability:.0f} % of cases")
        if wait.turn is not None:
            before = self._waits.get(wait.turn.source)
            # The owner is told why, and not of others: a scene's id is a digest of names that can be guessed.
            is_own = before is not None and before.scene.owner == wait.scene.owner
            place = f"after {wait.turn.source}" if is_own else "next"
            parts.append(f"its turn is {place}, right in {100 * wait.turn.probability:.0f} % of cases")
        if not wait.closed:
            parts.append(self._returns.explain(wait, now))
        return "; ".join(parts)
