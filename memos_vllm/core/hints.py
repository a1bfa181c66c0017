"""What the application says is coming: how far to trust it, and how soon it comes, per kind of hint and user."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memos_vllm.core.scenes import SessionOpened, ToolRunning, Typing, WillUse
from memos_vllm.core.trust import Record, Trust

IMMINENT_S = 5.0
"""From its announced time on a use is expected within this time or, where less was announced, a quarter of that."""

PATIENCE = 16.0
"""How many times as long it takes to stop believing in it."""

REPEATED_S = 600.0
"""After so long of hints that follow each other a use is overdue: nobody types for longer."""

HintEvent = SessionOpened | Typing | WillUse | ToolRunning


def _first_beliefs() -> dict[str, Record]:
    """Before the first hint: used 19 times of 20, an opened session 7 times of 10."""
    return {
        "opened": _belief(7.0, 3.0, math.log(15.0)),
        "typing": _belief(19.0, 1.0, math.log(4.0)),
        "will-use": _belief(19.0, 1.0, math.log(2.0)),
        "tool": _belief(19.0, 1.0, math.log(5.0)),
    }


def _belief(used: float, unused: float, log_delay: float, delays: float = 4.0) -> Record:
    return Record(float(used), float(unused), float(log_delay) * float(delays), float(delays))


_KIND = {
    SessionOpened: "opened",
    Typing: "typing",
    WillUse: "will-use",
    ToolRunning: "tool",
}


@dataclass(frozen=True, slots=True)
class Hint:
    """One hint that is open: until the scene is used, or ``expires``."""

    kind: str
    since: float
    probability: float
    delay_s: float
    first: float | None = None
    """When the first of those came that followed each other for this use; None: this is it."""

    @property
    def expires(self) -> float:
        return self.since + max(30.0, 12.0 * self.delay_s)

    def probability_within(self, horizon_s: float, now: float) -> float:
        """Falls when the use does not come, rises while the announced time draws near."""
        waited_s = max(0.0, now - self.since)
        overdue_s = max(0.0, waited_s - self.delay_s)
        still = self.probability * math.exp(-overdue_s / (PATIENCE * self._imminent_s))
        return still / (still + 1.0 - self.probability) * -math.expm1(-horizon_s / self.remaining_s(now))

    def remaining_s(self, now: float) -> float:
        return max(self.delay_s - max(0.0, now - self.since), self._imminent_s)

    @property
    def _imminent_s(self) -> float:
        return min(self.delay_s / 4.0, IMMINENT_S)


class HintModel:
    def __init__(self) -> None:
        self._trust = Trust(_first_beliefs())

    def open(self, event: HintEvent, owner: str | None, now: float, before: Hint | None = None) -> Hint:
        """
        Args:
            owner: of the scene.
            before: the hint that is open for it, whose place this one takes. That alone says nothing about it, but a
                use that is announced over and over and does not come counts against who announces it.
        """
        kind = _KIND[type(event)]
        probability, delay_s = self._trust.probability(kind, owner), self._trust.delay_s(kind, owner)
        if isinstance(event, WillUse):
            probability *= min(1.0, max(0.0, event.probability))
            delay_s = max(event.in_s, delay_s)
        elif isinstance(event, ToolRunning) and event.expected_s is not None:
            delay_s = event.expected_s
        first = now
        if before is not None and before.kind == kind:
            first = before.since if before.first is None else before.first
            if now - first >= max(REPEATED_S, before.expires - before.since):
                self._trust.learn(kind, owner, None)
                first = now
        return Hint(kind, now, probability, max(0.05, delay_s), first)

    def close(self, hint: Hint, owner: str | None, used: bool, now: float) -> None:
        """The scene was used, or the hint expired."""
        self._trust.learn(hint.kind, owner, max(0.05, now - hint.since) if used else None)

    def owners(self) -> set[str]:
        """Of whom anything is known."""
        return self._trust.owners()

    def forget_owner(self, owner: str) -> None:
        self._trust.forget(owner)

    def state(self) -> Iterator[list[Any]]:
        return self._trust.state()

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        self._trust.restore(state)

    def restore_whole(self, state: Mapping[str, Sequence[Any]]) -> None:
        """What versions without records of owners had learned: the trust in each kind, whoever sends it."""
        self._trust.whole |= {kind: _belief(*values) for kind, values in state.items()}
