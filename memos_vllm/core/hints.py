"""What the application says is coming: how far to trust it, and how soon it comes, learned per kind of hint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memos_vllm.core.scenes import Retrieved, SessionOpened, ToolRunning, Typing, WillUse

IMMINENT_S = 5.0
"""From its announced time on a use is expected within this time or, where less was announced, a quarter of that."""

PATIENCE = 16.0
"""How many times as long it takes to stop believing in it."""

HintEvent = SessionOpened | Typing | WillUse | Retrieved | ToolRunning


@dataclass(slots=True)
class _Record:
    """Of one kind: the trust it starts with, and what came of it."""

    used: float
    unused: float
    log_delay: float
    delays: float = 4.0

    @property
    def probability(self) -> float:
        return self.used / (self.used + self.unused)

    @property
    def delay_s(self) -> float:
        return math.exp(self.log_delay)


def _records() -> dict[str, _Record]:
    """Beliefs before the first hint: used 19 times of 20, an opened session 7 times of 10."""
    return {
        "opened": _Record(7.0, 3.0, math.log(15.0)),
        "typing": _Record(19.0, 1.0, math.log(4.0)),
        "will-use": _Record(19.0, 1.0, math.log(2.0)),
        "retrieved": _Record(19.0, 1.0, math.log(0.5)),
        "tool": _Record(19.0, 1.0, math.log(5.0)),
    }


_KIND = {
    SessionOpened: "opened",
    Typing: "typing",
    WillUse: "will-use",
    Retrieved: "retrieved",
    ToolRunning: "tool",
}


@dataclass(frozen=True, slots=True)
class Hint:
    """One hint that is open: until the scene is used, or ``expires``."""

    kind: str
    since: float
    probability: float
    delay_s: float

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
        self._records = _records()

    def open(self, event: HintEvent, now: float) -> Hint:
        kind = _KIND[type(event)]
        record = self._records[kind]
        probability, delay_s = record.probability, record.delay_s
        if isinstance(event, WillUse):
            probability *= min(1.0, max(0.0, event.probability))
            delay_s = max(event.in_s, delay_s)
        elif isinstance(event, ToolRunning) and event.expected_s is not None:
            delay_s = event.expected_s
        return Hint(kind, now, probability, max(0.05, delay_s))

    def close(self, hint: Hint, used: bool, now: float) -> None:
        """The scene was used, or the hint expired."""
        record = self._records[hint.kind]
        if used:
            record.used += 1
            record.delays = min(record.delays + 1, 256.0)
            record.log_delay += (math.log(max(0.05, now - hint.since)) - record.log_delay) / record.delays
        else:
            record.unused += 1
        if record.used + record.unused > 1024:
            record.used /= 2
            record.unused /= 2

    def state(self) -> dict[str, list[float]]:
        return {kind: [r.used, r.unused, r.log_delay, r.delays] for kind, r in self._records.items()}

    def restore(self, state: Mapping[str, Sequence[Any]]) -> None:
        self._records |= {kind: _Record(*map(float, values)) for kind, values in state.items()}
