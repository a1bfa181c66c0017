"""What is said of a scene: how probable its use is, what it is worth, when it comes, and why that is thought."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memos_vllm.core.returns import Returns
from memos_vllm.core.scenes import Scene
from memos_vllm.core.waiting import Wait

_DAY_S = 86400.0


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


def prediction(wait: Wait, returns: Returns, now: float, known: Callable[[str], Scene | None]) -> Prediction:
    """
    Args:
        known: the scene of an id, if there is one.
    """
    why = _why(wait, returns, now, known)
    return Prediction(wait.scene.id, wait.probability, wait.value, _expected_in_s(wait, returns, now), why)


def _expected_in_s(wait: Wait, returns: Returns, now: float) -> float:
    if wait.hint is not None:
        return wait.hint.remaining_s(now)
    for trigger in (wait.turn, wait.trigger):
        if trigger is not None:
            return max(0.0, trigger.since + trigger.delay_s - now)
    return returns.median_s(wait, now, _DAY_S)


def _why(wait: Wait, returns: Returns, now: float, known: Callable[[str], Scene | None]) -> str:
    parts = []
    if wait.hint is not None:
        share = 100 * wait.hint.probability
        parts.append(f"hint {wait.hint.kind} {now - wait.hint.since:.1f} s ago, right in {share:.0f} % of cases")
    if wait.closed:
        parts.append("closed")
    if wait.trigger is not None:
        parts.append(f"follows {wait.trigger.source} in {100 * wait.trigger.probability:.0f} % of cases")
    if wait.turn is not None:
        before = known(wait.turn.source)
        # The owner is told why, and not of others: a scene's id is a digest of names that can be guessed.
        is_own = before is not None and before.owner == wait.scene.owner
        place = f"after {wait.turn.source}" if is_own else "next"
        parts.append(f"its turn is {place}, right in {100 * wait.turn.probability:.0f} % of cases")
    if not wait.closed:
        parts.append(returns.explain(wait, now))
    return "; ".join(parts)
