"""Who comes after whom, whoever they are: agents that take turns, a rota, a pipeline of roles.

An order-1 prediction by partial matching (Cleary and Witten 1984; for prefetching, Vitter and Krishnan
1996): the scene that most often was used right after this one is predicted. How far that can be
trusted is not assumed but learned: predictions with the same evidence (how often it followed, how often
something else did) share a record of how many came true. Where scenes take turns, one round is enough;
where users come and go as they like, the record says so after a few predictions, and nothing is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_SOURCES = 50_000
MAX_SUCCESSORS = 4

PRIOR_TRIES = 2.0
"""Predictions of a kind of evidence that are believed to have been made before the first: right as often as those of
all kinds were, and those half of the time before any was made."""

MEMORY_TRIES = 64.0
"""A record of more predictions forgets half: the traffic may change."""

MAX_EVIDENCE = 3
"""More observations than this count as so many."""

Evidence = tuple[int, int]
"""How often the predicted scene followed, how often another one did; each at most ``MAX_EVIDENCE``."""


@dataclass(frozen=True, slots=True)
class Next:
    """The scene that is expected right after another one."""

    scene_id: str
    probability: float
    delay_s: float
    """From the start of one turn to the start of the next."""


@dataclass(slots=True)
class _Successor:
    count: float
    delay_s: float


@dataclass(slots=True)
class _Record:
    right: float = 0.0
    tries: float = 0.0

    def probability(self, prior: float) -> float:
        return (self.right + PRIOR_TRIES * prior) / (self.tries + PRIOR_TRIES)

    def add(self, right: bool) -> None:
        self.right += right
        self.tries += 1.0
        if self.tries > MEMORY_TRIES:
            self.right /= 2
            self.tries /= 2


class TurnOrder:
    """Times are seconds; ``now`` does not go back."""

    def __init__(self) -> None:
        self._successors: dict[str, dict[str, _Successor]] = {}
        self._records: dict[Evidence, _Record] = {}
        self._all = _Record()
        self._last: tuple[str, float] | None = None
        self._standing: tuple[str, Evidence] | None = None

    def used(self, scene_id: str, now: float) -> Next | None:
        """A turn of the scene starts: learns from it, and says who is expected next."""
        if self._last is not None:
            last, at = self._last
            if last == scene_id:  # it goes on itself, and whose turn is next is as it was
                self._last = (scene_id, now)
                return self._expected()
            if self._standing is not None:
                expected, evidence = self._standing
                for record in (self._records.setdefault(evidence, _Record()), self._all):
                    record.add(expected == scene_id)
            self._follow(last, scene_id, now - at)
        self._last = (scene_id, now)
        return self._expected()

    def drop(self, scene_id: str) -> None:
        """The scene is not known any more. Where it is named as a successor its name stays, at no harm."""
        self._successors.pop(scene_id, None)

    def forget(self, scene_ids: set[str]) -> None:
        """Nothing names them any more."""
        for scene_id in scene_ids:
            self.drop(scene_id)
        for successors in self._successors.values():
            for scene_id in scene_ids & successors.keys():
                del successors[scene_id]
        if self._last is not None and self._last[0] in scene_ids:
            self._last = self._standing = None
        if self._standing is not None and self._standing[0] in scene_ids:
            self._standing = None

    def _follow(self, before: str, scene_id: str, delay_s: float) -> None:
        if before not in self._successors and len(self._successors) >= MAX_SOURCES:
            del self._successors[next(iter(self._successors))]
        successors = self._successors.setdefault(before, {})
        known = successors.pop(scene_id, None) or _Successor(0.0, delay_s)
        if len(successors) >= MAX_SUCCESSORS:
            del successors[min(successors, key=lambda each: successors[each].count)]
        known.count += 1.0
        known.delay_s += (delay_s - known.delay_s) / known.count
        successors[scene_id] = known  # the latest stands last

    def _expected(self) -> Next | None:
        assert self._last is not None
        self._standing = None
        successors = self._successors.get(self._last[0])
        if not successors:
            return None
        # Among equals the latest: an order that changed is followed at once.
        scene_id = max(reversed(successors), key=lambda each: successors[each].count)
        best = successors[scene_id]
        others = sum(each.count for each in successors.values()) - best.count
        evidence = (min(MAX_EVIDENCE, int(best.count)), min(MAX_EVIDENCE, int(others)))
        self._standing = (scene_id, evidence)
        record = self._records.get(evidence, _Record())
        return Next(scene_id, record.probability(self._all.probability(0.5)), max(0.05, best.delay_s))

    def state(self) -> dict[str, Any]:
        return {
            "successors": (
                [source, [[each, known.count, known.delay_s] for each, known in successors.items()]]
                for source, successors in self._successors.items()
            ),
            "records": [[*evidence, record.right, record.tries] for evidence, record in self._records.items()],
            "all": [self._all.right, self._all.tries],
            "last": self._last,
            "standing": self._standing,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._successors = {source: _successors(rows) for source, rows in state["successors"]}
        self._records = {
            (int(followed), int(others)): _Record(float(right), float(tries))
            for followed, others, right, tries in state["records"]
        }
        self._all = _Record(*map(float, state["all"]))
        self._last = self._standing = None
        if state["last"] is not None:
            self._last = (state["last"][0], float(state["last"][1]))
        if state["standing"] is not None:
            scene_id, (followed, others) = state["standing"]
            self._standing = (scene_id, (int(followed), int(others)))


def _successors(rows: Sequence[Sequence[Any]]) -> dict[str, _Successor]:
    return {scene_id: _Successor(float(count), float(delay_s)) for scene_id, count, delay_s in rows}
