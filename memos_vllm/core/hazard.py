"""When does a scene that was used come back? The rate of return by elapsed time, learned online.

    rate(context, elapsed) = base(kind, bin) x product over the context's factors of ratio(factor, phase)

Elapsed time falls into logarithmic bins, two per octave; a *phase* is an octave (or, for an owner's
clock, an hour of the day). The base of a bin is returns / time that scenes spent in it. A factor (turns so far,
length of the message, of the answer, pace, owner) has a ratio: the returns seen divided by the returns
that the rest of the model expected. This is Poisson regression fitted one coordinate at a time, as the
events come. Ratios are shrunk as if a number of returns had been seen already, a phase to the factor as a
whole, the factor to 1: a new user is like everybody, then like himself.

Scenes that never return count too: the time they wait is exposure without a return, so that nothing has
to decide when a scene is gone. Before anything is learned the rate falls as 1 / elapsed: the least
recently used scene has the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

BINS_PER_OCTAVE = 2
NUM_BINS = 1 + 23 * BINS_PER_OCTAVE  # below 1 s, then up to 97 days
NUM_PHASES = (NUM_BINS + BINS_PER_OCTAVE) // BINS_PER_OCTAVE
EDGES_S = (0.0, *(2 ** (i / BINS_PER_OCTAVE) for i in range(NUM_BINS - 1)), math.inf)
"""Bin b is from EDGES_S[b] to EDGES_S[b + 1]."""

HOURS = 24

PRIOR_EVENTS = 4.0
"""A base, an owner's ratio or an owner's hour weighs as much as its prior once it has seen so many returns."""

SHARED_PRIOR_EVENTS = 16.0
SHARED_PHASE_PRIOR_EVENTS = 64.0
"""The same of the other factors as a whole, and of their phases. They see every return, and there are several
of them, so they need not be believed early; and a factor that matters mostly matters in all phases."""

PRIOR_RETURNS_PER_OCTAVE = 0.1
"""Of the base before anything is seen. Only the order matters then, not the level."""

MEMORY_EVENTS = 4096.0
"""A cell that has seen more forgets half: habits may change."""

MAX_KEYS = 100_000
"""Keys of one factor, i.e. owners; the ones that were new first are forgotten first."""

_MAX_RATIO = 64.0

Row = list[float]
"""Events and expected events: of all phases, then of each phase."""


def bin_of(elapsed_s: float) -> int:
    if elapsed_s < 1.0:
        return 0
    return min(NUM_BINS - 1, 1 + int(math.log2(elapsed_s) * BINS_PER_OCTAVE + 1e-9))


def octave(value: float) -> int:
    """Bucket of a size or a time: 0 below 1, then one per octave."""
    return int(value).bit_length() if value >= 1 else 0


@dataclass(frozen=True, slots=True)
class Context:
    """What is known of a scene while it waits: its kind's base, and the factors' rows that apply."""

    base: Base
    names: Sequence[str]
    rows: Sequence[Row]
    priors: Sequence[tuple[float, float]]
    clock: Row | None
    """The owner's hours of the day."""


class Factor:
    """The ratios of one factor, a row per key."""

    def __init__(self, name: str, num_phases: int, prior_events: float, phase_prior_events: float) -> None:
        self.name, self.priors = name, (prior_events, phase_prior_events)
        self._width = 2 + 2 * num_phases
        self._rows: dict[int | str, Row] = {}

    def row(self, key: int | str) -> Row:
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= MAX_KEYS:
                del self._rows[next(iter(self._rows))]
            row = self._rows[key] = [0.0] * self._width
        return row

    def __iter__(self) -> Iterator[int | str]:
        return iter(self._rows)

    def forget(self, key: int | str) -> None:
        self._rows.pop(key, None)

    def state(self) -> Iterator[list[Any]]:
        return ([key, *row] for key, row in self._rows.items())

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        for key, *row in state:
            if len(row) != self._width:
                raise ValueError(f"a row of factor {self.name} has {len(row)} values, not {self._width}")
            self._rows[key] = [float(value) for value in row]


class Base:
    """Rate per bin of one kind of scene: shrunk to 1 / elapsed times a level that all bins share.

    Without the level, a bin that scenes have not reached yet would look better than those they passed.
    """

    def __init__(self) -> None:
        self.events = [0.0] * NUM_BINS
        self.exposure_s = [0.0] * NUM_BINS
        self.total_events = self.total_expected = 0.0

    def rate(self, index: int) -> float:
        level = (self.total_events + PRIOR_EVENTS) / (self.total_expected + PRIOR_EVENTS)
        prior = level * _PRIOR_RATE[index]
        return (self.events[index] + PRIOR_EVENTS) / (self.exposure_s[index] + PRIOR_EVENTS / prior)

    def add(self, index: int, events: float, exposure_s: float) -> None:
        self.events[index] += events
        self.exposure_s[index] += exposure_s
        self.total_events += events
        self.total_expected += exposure_s * _PRIOR_RATE[index]
        if self.events[index] > MEMORY_EVENTS:
            self.events[index] *= 0.5
            self.exposure_s[index] *= 0.5
        if self.total_events > MEMORY_EVENTS or self.total_expected > MEMORY_EVENTS:
            self.total_events *= 0.5
            self.total_expected *= 0.5

    def state(self) -> list[Any]:
        return [self.total_events, self.total_expected, list(self.events), list(self.exposure_s)]

    def restore(self, state: Sequence[Any]) -> None:
        self.total_events, self.total_expected = float(state[0]), float(state[1])
        self.events, self.exposure_s = [list(map(float, values)) for values in state[2:]]


_PRIOR_RATE = [PRIOR_RETURNS_PER_OCTAVE / (max(1.0, edge) * 2 ** (0.5 / BINS_PER_OCTAVE)) for edge in EDGES_S[:-1]]


class HazardModel:
    """Bases by kind and factors by name."""

    SHARED = ("turn", "message", "answer", "length", "pace", "usual pace")

    def __init__(self) -> None:
        self._bases: dict[str, Base] = {}
        self._factors = {
            name: Factor(name, NUM_PHASES, SHARED_PRIOR_EVENTS, SHARED_PHASE_PRIOR_EVENTS) for name in self.SHARED
        }
        self._factors["owner"] = Factor("owner", NUM_PHASES, PRIOR_EVENTS, PRIOR_EVENTS)
        self._clock = Factor("clock", HOURS, PRIOR_EVENTS, PRIOR_EVENTS)

    def context(self, kind: str, keys: Iterable[tuple[str, int | str]], clock: str | None) -> Context:
        """``keys``: a factor's name and the key that applies; ``clock``: whose hours of the day."""
        keys = tuple(keys)
        return Context(
            self._bases.setdefault(kind, Base()),
            tuple(name for name, _ in keys),
            tuple(self._factors[name].row(key) for name, key in keys),
            tuple(self._factors[name].priors for name, _ in keys),
            None if clock is None else self._clock.row(clock),
        )

    def rate(self, context: Context, index: int, hour: int) -> float:
        """Returns per second in bin ``index``."""
        i = 2 + 2 * _PHASE[index]
        whole = 1.0
        for row, (prior, own) in zip(context.rows, context.priors, strict=True):  # _ratio, spelled out: the hot path
            whole *= (row[i] + own * (row[0] + prior) / (row[1] + prior)) / (row[i + 1] + own)
        if context.clock is not None:
            whole *= _ratio(context.clock, hour, self._clock.priors)
        return context.base.rate(index) * min(_MAX_RATIO, max(1.0 / _MAX_RATIO, whole))

    def observe(self, context: Context, index: int, hour: int | None, exposure_s: float, events: int) -> None:
        """A scene waited ``exposure_s`` in bin ``index`` and came back ``events`` (0 or 1) times.

        ``hour`` None: over whole days.
        """
        i = 2 + 2 * _PHASE[index]
        ratios = [
            (row[i] + own * (row[0] + prior) / (row[1] + prior)) / (row[i + 1] + own)
            for row, (prior, own) in zip(context.rows, context.priors, strict=True)
        ]
        clock = context.clock
        own_hour = 1.0 if clock is None or hour is None else _ratio(clock, hour, self._clock.priors)
        whole = min(_MAX_RATIO, max(1.0 / _MAX_RATIO, math.prod(ratios) * own_hour))
        base = context.base
        expected = base.rate(index) * exposure_s * whole
        base.add(index, events, exposure_s * whole)
        for row, own in zip(context.rows, ratios, strict=True):
            _add(row, i, events, expected / own)
        if clock is not None and hour is None:
            for each in range(HOURS):
                _add(clock, 2 + 2 * each, events / HOURS, expected / HOURS)
        elif clock is not None:
            _add(clock, 2 + 2 * hour, events, expected / own_hour)

    def explain(self, context: Context, index: int, hour: int) -> list[tuple[str, float]]:
        """The factors that move the rate most, and by how much."""
        ratios = map(_ratio, context.rows, repeat(_PHASE[index]), context.priors)
        found = list(zip(context.names, ratios, strict=True))
        if context.clock is not None:
            found.append(("hour of day", _ratio(context.clock, hour, self._clock.priors)))
        return sorted(found, key=lambda pair: -abs(math.log(pair[1])))

    def owners(self) -> set[str]:
        """Who has habits of his own."""
        return {key for each in (self._factors["owner"], self._clock) for key in each if isinstance(key, str)}

    def forget_owner(self, owner: str) -> None:
        self._factors["owner"].forget(owner)
        self._clock.forget(owner)

    def state(self) -> dict[str, Any]:
        return {
            "bins": NUM_BINS,
            "bases": {kind: base.state() for kind, base in self._bases.items()},
            "factors": {name: factor.state() for name, factor in self._factors.items()},
            "clock": self._clock.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if state["bins"] != NUM_BINS:
            raise ValueError(f"{state['bins']} bins of elapsed time, not {NUM_BINS}")
        for kind, base in state["bases"].items():
            self._bases.setdefault(kind, Base()).restore(base)
        for name, rows in state["factors"].items():
            self._factors[name].restore(rows)
        self._clock.restore(state["clock"])


_PHASE = [(index + BINS_PER_OCTAVE - 1) // BINS_PER_OCTAVE for index in range(NUM_BINS)]


def _ratio(row: Row, phase: int, priors: tuple[float, float]) -> float:
    i = 2 + 2 * phase
    prior, own = priors
    return (row[i] + own * (row[0] + prior) / (row[1] + prior)) / (row[i + 1] + own)


def _add(row: Row, i: int, events: float, expected: float) -> None:
    row[0] += events
    row[1] += expected
    row[i] += events
    row[i + 1] += expected
    if row[0] > MEMORY_EVENTS or row[1] > MEMORY_EVENTS:
        row[0] *= 0.5
        row[1] *= 0.5
    if row[i] > MEMORY_EVENTS or row[i + 1] > MEMORY_EVENTS:
        row[i] *= 0.5
        row[i + 1] *= 0.5
