"""What the API processes say scenes are worth, merged: the source of values for the engine's residency policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

UNIT = 2.0**20
"""Values are rounded to whole numbers of 1 / UNIT. Sums of them are exact then, so that a block whose last scene
is taken back is worth exactly nothing, however often values came and went."""

BUSY_VALUE = 1e6
"""Of a scene that a request is using: its blocks go last, after all that are only predicted."""


class ToldValues:
    """Each planner's latest word counts; where several name a scene, the highest value does."""

    def __init__(self) -> None:
        self._told: dict[str, dict[str, float]] = {}
        self._busy: dict[str, frozenset[str]] = {}
        self._values: dict[str, float] = {}
        self._changed: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """Scenes that are worth something, the most valuable first."""
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def tell(self, planner: str, scenes: Iterable[tuple[float, str]], busy: Sequence[str] = ()) -> None:
        """Replaces what this planner said before.

        Args:
            scenes: value, as ``core.prediction.Expected.value``, and id of the scenes that are expected.
            busy: those that a request is using.
        """
        self._told[planner] = {scene_id: value for value, scene_id in reversed(list(scenes))}
        self._busy[planner] = frozenset(busy)
        values: dict[str, float] = {}
        for told in self._told.values():
            for scene_id, value in told.items():
                if value > 0.0:
                    values[scene_id] = max(values.get(scene_id, 0.0), max(1.0, round(min(value, BUSY_VALUE) * UNIT)))
        for scene_id in self.busy():
            values[scene_id] = BUSY_VALUE * UNIT
        self._changed |= {each for each in values.keys() | self._values.keys() if values.get(each) != self.value(each)}
        self._values = dict(sorted(values.items(), key=lambda item: -item[1]))

    def busy(self) -> set[str]:
        return set().union(*self._busy.values())

    def value(self, scene_id: str) -> float:
        """A whole number; 0 if nobody expects it."""
        return self._values.get(scene_id, 0.0)

    def take_changes(self) -> set[str]:
        """Scenes whose value changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed
