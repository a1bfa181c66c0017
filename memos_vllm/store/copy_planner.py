"""Which way to copy is the fastest on this machine: measured once, then looked up.

Published crossovers do not carry over: a batch of DMA descriptors falls from 40 to 7 GB/s between
fragments of 28 and 24 KiB on one H100, elsewhere on another device and count. So a worker with a GPU
measures at its first start (a second at most) each method over sizes and counts of fragments, and keeps
the table in the data directory; what a slow machine could not measure in that time follows at its next
starts. In CPU memory there is one way and nothing to measure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from memos_vllm.store.pipeline import Method

logger = logging.getLogger(__name__)

FRAGMENT_BYTES = (64 * 2**10, 16 * 2**10, 256 * 2**10, 4 * 2**10, 2**20)
FRAGMENTS = (512, 64, 8)
CELL_BYTES = 32 * 2**20
"""No cell copies more; it would take too long and say nothing new."""
BUDGET_S = 1.0
"""Of a start. For cells that do not fit the nearest measured one stands until the next start measures them."""
MARGIN = 1.03
"""How much faster than staged another method must be to be taken: staged disturbs the least."""


CELLS = [
    (fragment_bytes, fragments)
    for fragments in FRAGMENTS
    for fragment_bytes in FRAGMENT_BYTES
    if fragments * fragment_bytes <= CELL_BYTES
]
"""The most telling first."""


class Direction(StrEnum):
    LOAD = "load"
    SAVE = "save"


@dataclass(frozen=True, slots=True)
class Measured:
    direction: Direction
    method: Method
    fragment_bytes: int
    """Contiguous bytes on the device."""
    fragments: int
    """Of one piece."""
    gb_per_s: float


class CopyPlan:
    """Measurements, and what follows from them; immutable."""

    def __init__(self, measured: Sequence[Measured] = ()) -> None:
        self.measured = tuple(measured)
        self._cells: dict[Direction, dict[tuple[int, int], dict[Method, float]]] = {each: {} for each in Direction}
        for one in measured:
            cell = self._cells[one.direction].setdefault((one.fragment_bytes, one.fragments), {})
            cell[one.method] = one.gb_per_s

    @property
    def complete(self) -> bool:
        """Whether every cell was measured."""
        return not self.missing

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Cells that were not measured, the most telling first."""
        return [cell for cell in CELLS if not all(cell in cells for cells in self._cells.values())]

    def choose(
        self, direction: Direction, fragment_bytes: int, fragments: int, allowed: frozenset[Method] = frozenset(Method)
    ) -> Method:
        """The fastest allowed method in the nearest measured cell; staged where nothing was measured."""
        cells = self._cells[direction]
        if not cells or fragments < 1:
            return Method.STAGED

        def distance(cell: tuple[int, int]) -> tuple[float, float]:
            size, count = (abs(math.log2(a / b)) for a, b in zip(cell, (fragment_bytes, fragments), strict=True))
            return size, count  # the size decides; the count flattens out

        speeds = cells[min(cells, key=distance)]
        best = max((method for method in speeds if method in allowed), key=speeds.__getitem__, default=Method.STAGED)
        staged = speeds.get(Method.STAGED, 0.0)
        return best if speeds.get(best, 0.0) > MARGIN * staged else Method.STAGED

    def to_json(self, machine: str) -> str:
        return json.dumps({"machine": machine, "measured": [asdict(one) for one in self.measured]}, indent=1)

    @classmethod
    def from_json(cls, text: str, machine: str) -> CopyPlan:
        """Raises ValueError, KeyError or TypeError if ``text`` is not what ``to_json`` gave for this machine."""
        content = json.loads(text)
        if content["machine"] != machine:
            raise ValueError(f"measured on {content['machine']!r}")
        return cls(
            [
                Measured(
                    Direction(one["direction"]),
                    Method(one["method"]),
                    int(one["fragment_bytes"]),
                    int(one["fragments"]),
                    float(one["gb_per_s"]),
                )
                for one in content["measured"]
            ]
        )


Measure = Callable[[Direction, Method, int, int], float]
"""Direction, method, fragment bytes, fragments; returns GB/s."""


def measure_plan(
    measure: Measure,
    known: CopyPlan | None = None,
    budget_s: float = BUDGET_S,
    now: Callable[[], float] = time.monotonic,
) -> CopyPlan:
    """Measures what ``known`` lacks, cell by cell, until another one may not fit. A cell is whole or absent.

    What the first use of a direction or method costs, compiling above all, is not of that time.
    """
    known = known or CopyPlan()
    for direction in Direction:
        for method in Method:
            measure(direction, method, *CELLS[-1])
    begin = before = now()
    longest_s = 0.0
    measured = list(known.measured)
    for fragment_bytes, fragments in known.missing:
        measured += [
            Measured(
                direction,
                method,
                fragment_bytes,
                fragments,
                round(measure(direction, method, fragment_bytes, fragments), 3),
            )
            for direction in Direction
            for method in Method
        ]
        ended = now()
        longest_s, before = max(longest_s, ended - before), ended
        if ended - begin + longest_s > budget_s:
            break
    return CopyPlan(measured)


def cached_plan(directory: Path, machine: str, measure: Callable[[CopyPlan], CopyPlan]) -> CopyPlan:
    """The plan that was measured here before, with what it lacked, written down.

    Args:
        machine: what the speeds depend on, in words; another text, another plan.
        measure: adds to the plan that it is given.
    """
    digest = hashlib.blake2b(machine.encode(), digest_size=8).hexdigest()
    path = directory / f"copy-plan-{digest}.json"
    known = CopyPlan()
    try:
        known = CopyPlan.from_json(path.read_text(encoding="utf-8"), machine)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the copy plan %s cannot be used (%s); it is measured again", path, error)
    if known.complete:
        return known
    plan = measure(known)
    if plan.measured == known.measured:
        return plan
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(plan.to_json(machine), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.warning("the copy plan was not written to %s (%s); the next start measures again", path, error)
    return plan
