"""The engine's policy on traces of other characters than the one that it was watched on."""

from __future__ import annotations

import pytest

from benchmarks.trace_baselines import ARC, LRU, S3FIFO, Belady, Future
from benchmarks.trace_data import Request, Turn, turns
from benchmarks.trace_replay import Machine, OursReplay, Outcome, replay_baseline, replay_oracle
from tests.benchmarks.trace_factories import all_characters, loop, slow_chats, zipf

NOTABLY = 0.01
CAPACITIES = (60, 300)


def ours(trace: list[Turn], capacity: int, hint_lead_s: float | None = None, prefetch: bool = True) -> Outcome:
    return OursReplay(trace, capacity, Machine(), hint_lead_s, prefetch=prefetch).run()


def lru(trace: list[Turn], capacity: int) -> Outcome:
    return replay_baseline(trace, LRU(capacity))


@pytest.mark.parametrize("make", [make for _, make in all_characters()], ids=[name for name, _ in all_characters()])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_never_notably_below_lru(make, capacity: int) -> None:
    trace = make()
    reference = lru(trace, capacity).ready_share
    assert ours(trace, capacity).ready_share >= reference - NOTABLY
    assert ours(trace, capacity, prefetch=False).ready_share >= reference - NOTABLY


def test_ahead_of_all_where_conversations_return() -> None:
    trace = slow_chats()
    outcome = ours(trace, 300)
    for cache in (LRU(300), S3FIFO(300), ARC(300)):
        assert outcome.ready_share > replay_baseline(trace, cache).ready_share + 0.1


def test_a_loop_that_does_not_fit_is_followed() -> None:
    """LRU's worst case: what it drops is what comes next."""
    trace = loop()
    assert lru(trace, 150).ready_share == 0
    assert ours(trace, 150).ready_share > 0.5


def test_with_hints_nearly_all_is_ready() -> None:
    for trace in (slow_chats(), zipf()):
        assert ours(trace, 1000, hint_lead_s=1.0).ready_share > 0.95


def test_a_hint_that_comes_later_than_the_load_takes_is_too_late() -> None:
    trace = slow_chats()
    slow = Machine(link_gb_per_s=0.5)
    in_time = OursReplay(trace, 300, slow, 8.0).run()
    late = OursReplay(trace, 300, slow, 0.05).run()
    assert late.ready_share < in_time.ready_share


def test_the_link_bounds_what_is_moved() -> None:
    trace = slow_chats()
    machine = Machine(link_gb_per_s=0.1)
    outcome = OursReplay(trace, 300, machine).run()
    seconds = trace[-1].request.arrival_s - trace[0].request.arrival_s
    assert outcome.prefetched <= seconds * machine.blocks_per_s + 1


def test_a_prefetch_that_nobody_used_is_counted_as_wasted() -> None:
    trace = turns([Request(0.0, 1500, 10, (1, 2, 3)), *(Request(i, 512, 10, (100 + i,)) for i in range(1, 60))])
    outcome = ours(trace, 2)
    assert outcome.ready == outcome.reusable == 0
    assert outcome.wasted == outcome.prefetched


def test_the_oracle_has_everything_ready() -> None:
    outcome = replay_oracle(slow_chats(), 1000, Machine())
    assert outcome.ready_share > 0.99


def test_prefetch_can_beat_what_no_cache_without_it_can() -> None:
    trace = slow_chats()
    future = Future(turn.request.blocks for turn in trace)
    assert ours(trace, 300).ready_share > 0.95 * replay_baseline(trace, Belady(300, future)).ready_share
