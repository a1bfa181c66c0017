"""Which scene follows which: of one owner by id, over all owners by role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SOURCES = 50_000
MAX_SUCCESSORS = 16
PRIOR_USES = 2.0
"""Uses that led nowhere, believed before the first one is seen."""


@dataclass(frozen=True, slots=True)
class Follower:
    key: str
    probability: float
    delay_s: float


class Transitions:
    def __init__(self) -> None:
        self._uses: dict[str, float] = {}
        self._next: dict[str, dict[str, list[float]]] = {}  # source -> successor -> [count, mean delay]

    def use(self, key: str) -> None:
        if key not in self._uses and len(self._uses) >= MAX_SOURCES:
            self.forget(next(iter(self._uses)))
        self._uses[key] = self._uses.get(key, 0.0) + 1.0

    def follow(self, key: str, successor: str, delay_s: float) -> None:
        """``successor`` was used next, ``delay_s`` after ``key``."""
        successors = self._next.setdefault(key, {})
        if successor not in successors and len(successors) >= MAX_SUCCESSORS:
            del successors[min(successors, key=lambda each: successors[each][0])]
        cell = successors.setdefault(successor, [0.0, 0.0])
        cell[0] += 1.0
        cell[1] += (delay_s - cell[1]) / cell[0]

    def followers(self, key: str) -> list[Follower]:
        """Most probable first."""
        total = self._uses.get(key, 0.0) + PRIOR_USES
        found = [Follower(each, min(1.0, n / total), delay_s) for each, (n, delay_s) in self._next.get(key, {}).items()]
        return sorted(found, key=lambda each: (-each.probability, each.key))

    def forget(self, key: str) -> None:
        self._uses.pop(key, None)
        self._next.pop(key, None)

    def state(self) -> Iterator[list[Any]]:
        return ([key, uses, _cells(self._next.get(key, {}))] for key, uses in self._uses.items())

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        for key, uses, successors in state:
            self._uses[key] = float(uses)
            if successors:
                self._next[key] = _cells(successors)


def _cells(successors: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {each: [float(n), float(delay_s)] for each, (n, delay_s) in successors.items()}
