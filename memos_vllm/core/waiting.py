"""One scene between its uses: what it waits for, and how long already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from memos_vllm.core.hazard import Context
from memos_vllm.core.hints import Hint
from memos_vllm.core.scenes import Scene, SceneKind


@dataclass(frozen=True, slots=True)
class Trigger:
    """Another scene was used, which this one often follows."""

    source: str
    since: float
    probability: float
    delay_s: float

    @property
    def expires(self) -> float:
        return self.since + 4.0 * self.delay_s + 1.0


@dataclass(slots=True)
class Wait:
    scene: Scene
    uses: int = 0
    busy: bool = False
    """A request with this scene runs."""
    closed: bool = False
    ended: float | None = None
    """When the last use ended; None before the first."""
    gap_s: float | None = None
    """The wait before the last use."""
    usual_gap: float | None = None
    """Smoothed binary logarithm of the waits."""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    output_tokens: int | None = None
    past_tokens: int | None = None
    """Of the last turn's prompt and answer, which this one's prompt repeats."""
    counted_s: float = 0.0
    """Up to where the wait has been learned from."""
    hint: Hint | None = None
    trigger: Trigger | None = None
    """By a scene of the same owner."""
    turn: Trigger | None = None
    """By the scene after which it is this one's turn, whoever owns that."""
    probability: float = 0.0
    urgency: float = 0.0
    """The probability, averaged over the parts of the horizon."""
    due: float | None = None
    """When to look at it again."""
    version: int = 0
    """Of the schedule; an older entry in the queue is void."""
    value: float = 0.0
    context: Context | None = None
    """None before the first use."""

    def elapsed_s(self, now: float) -> float:
        """0 while it is in use: as if the answer was complete now."""
        return 0.0 if self.busy or self.ended is None else max(0.0, now - self.ended)

    def state(self) -> dict[str, Any]:
        """Without what follows from the rest. Does not change any more."""
        return {name: getattr(self, name) for name in _STATE}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Wait:
        values = dict(state)
        scene = Scene(**values.pop("scene"))
        scene = Scene(**asdict(scene) | {"kind": SceneKind(scene.kind)})
        hint, trigger, turn = values.pop("hint"), values.pop("trigger"), values.pop("turn")
        wait = cls(scene, **values)
        wait.hint = None if hint is None else Hint(**hint)
        wait.trigger = None if trigger is None else Trigger(**trigger)
        wait.turn = None if turn is None else Trigger(**turn)
        return wait


_STATE = (
    "uses",
    "busy",
    "closed",
    "ended",
    "gap_s",
    "usual_gap",
    "prompt_tokens",
    "new_tokens",
    "output_tokens",
    "past_tokens",
    "counted_s",
    "probability",
    "urgency",
    "due",
    "scene",
    "hint",
    "trigger",
    "turn",
)
