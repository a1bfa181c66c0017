"""The planner: what it takes of what was measured, its time, and its memory over restarts."""

import pytest

from memos_vllm.store.copy_planner import (
    BUDGET_S,
    CELLS,
    FRAGMENT_BYTES,
    FRAGMENTS,
    CopyPlan,
    Direction,
    Measured,
    cached_plan,
    measure_plan,
)
from memos_vllm.store.pipeline import Method

KIB = 2**10


def cell(direction, fragment_bytes, fragments, **speeds):
    return [Measured(direction, Method(method), fragment_bytes, fragments, speed) for method, speed in speeds.items()]


PLAN = CopyPlan(
    cell(Direction.LOAD, 4 * KIB, 512, staged=20.0, direct=40.0, dma=4.0)
    + cell(Direction.LOAD, 1024 * KIB, 8, staged=40.0, direct=30.0, dma=50.0)
    + cell(Direction.LOAD, 64 * KIB, 64, staged=50.0, direct=51.0, dma=30.0)
    + cell(Direction.SAVE, 4 * KIB, 512, staged=20.0, direct=10.0, dma=4.0)
)


WHOLE = CopyPlan([Measured(direction, Method.STAGED, *each, 1.0) for direction in Direction for each in CELLS])


@pytest.mark.parametrize(
    ("direction", "fragment_bytes", "fragments", "method"),
    [
        (Direction.LOAD, 4 * KIB, 512, Method.DIRECT),
        (Direction.LOAD, 5 * KIB, 3, Method.DIRECT),  # the size decides before the count
        (Direction.LOAD, 2048 * KIB, 1000, Method.DMA),
        (Direction.LOAD, 64 * KIB, 64, Method.STAGED),  # two per cent are no reason
        (Direction.SAVE, 4 * KIB, 512, Method.STAGED),
        (Direction.SAVE, 2048 * KIB, 8, Method.STAGED),
    ],
)
def test_the_fastest_of_the_nearest_cell_is_taken(direction, fragment_bytes, fragments, method):
    assert PLAN.choose(direction, fragment_bytes, fragments) is method


def test_what_is_not_allowed_is_not_taken():
    allowed = frozenset(Method) - {Method.DIRECT}
    assert PLAN.choose(Direction.LOAD, 4 * KIB, 512, allowed) is Method.STAGED
    assert PLAN.choose(Direction.LOAD, 1024 * KIB, 8, allowed) is Method.DMA


def test_nothing_measured_is_staged():
    assert CopyPlan().choose(Direction.LOAD, 4 * KIB, 512) is Method.STAGED
    assert PLAN.choose(Direction.LOAD, 4 * KIB, 0) is Method.STAGED


def test_the_measurement_ends_with_its_time_and_leaves_whole_cells():
    clock = iter(range(10**6))
    plan = measure_plan(lambda *_: 1.0, budget_s=3.5, now=lambda: float(next(clock)))
    assert not plan.complete
    cells = {(one.fragment_bytes, one.fragments) for one in plan.measured}
    assert len(cells) == 3 and len(plan.measured) == 3 * len(Direction) * len(Method)


def test_with_time_enough_every_size_is_measured_in_both_directions():
    plan = measure_plan(lambda *_: 1.0, now=lambda: 0.0)
    for direction in Direction:
        assert {one.fragment_bytes for one in plan.measured if one.direction is direction} == set(FRAGMENT_BYTES)
    assert {one.fragments for one in plan.measured} == set(FRAGMENTS)


def test_what_a_first_use_costs_is_not_of_the_time():
    """A clock that only a first use of a direction and method moves: Triton compiles."""
    seconds, used = [0.0], set()

    def measure(direction, method, fragment_bytes, fragments):
        seconds[0] += 0.0 if (direction, method) in used else 2.0
        used.add((direction, method))
        return 1.0

    plan = measure_plan(measure, now=lambda: seconds[0])
    assert plan.complete and len(plan.measured) == len(CELLS) * len(Direction) * len(Method)


def test_what_a_start_had_no_time_for_the_next_ones_measure(tmp_path):
    """No start measures longer than a second, and on a slow machine not every start measures the same again."""
    asked = []

    def start():
        seconds = iter(range(10**6))
        asked.clear()

        def measure(*what):
            asked.append(what)
            return 1.0

        return cached_plan(
            tmp_path, "m", lambda known: measure_plan(measure, known, budget_s=5.5, now=lambda: float(next(seconds)))
        )

    cells_before: set[tuple[int, int]] = set()
    for _ in range(len(CELLS)):
        plan = start()
        cells = {(one.fragment_bytes, one.fragments) for one in plan.measured}
        assert len(cells - cells_before) == min(5, len(CELLS) - len(cells_before)) and cells > cells_before
        assert {what[2:] for what in asked} <= (cells - cells_before) | {CELLS[-1]}, "CELLS[-1]: what a first use costs"
        cells_before = cells
        if plan.complete:
            break
    assert plan.complete and len(plan.measured) == len(CELLS) * len(Direction) * len(Method) and BUDGET_S <= 1.0
    assert start().measured == plan.measured and not asked


def test_a_plan_is_measured_once_per_machine(tmp_path):
    measured = []

    def plan_for(machine):
        return cached_plan(tmp_path, machine, lambda known: (measured.append(machine), WHOLE)[1])

    assert plan_for("H100, driver 1").measured == WHOLE.measured
    assert plan_for("H100, driver 1").measured == WHOLE.measured
    assert plan_for("H100, driver 2").measured == WHOLE.measured
    assert measured == ["H100, driver 1", "H100, driver 2"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": "other", "measured": []}', '{"machine": "m"}'])
def test_a_plan_that_cannot_be_read_is_measured_again(tmp_path, caplog, text):
    cached_plan(tmp_path, "m", lambda known: WHOLE)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert cached_plan(tmp_path, "m", lambda known: WHOLE).measured == WHOLE.measured
    assert "measured again" in caplog.text
    assert cached_plan(tmp_path, "m", lambda known: pytest.fail("it was written again")).measured == WHOLE.measured


def test_a_plan_that_cannot_be_written_is_used(tmp_path, caplog):
    assert cached_plan(tmp_path / "missing", "m", lambda known: WHOLE).measured == WHOLE.measured
    assert "not written" in caplog.text


def test_nothing_measured_is_not_kept(tmp_path):
    cached_plan(tmp_path, "m", lambda known: known)
    assert list(tmp_path.iterdir()) == []
