"""The cache policies that the trace benchmark compares with, on sequences that can be followed by hand."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.trace_baselines import ARC, LRU, S3FIFO, Belady, BlockCache, Future
from benchmarks.trace_data import Request, rekeyed, turns
from benchmarks.trace_replay import Machine, OursReplay, replay_baseline, replay_oracle


def hits(cache: BlockCache, blocks: Sequence[int]) -> list[bool]:
    out = []
    for block in blocks:
        out.append(block in cache)
        cache.access([block])
    return out


def belady(capacity: int, blocks: Sequence[int]) -> Belady:
    return Belady(capacity, Future([block] for block in blocks))


def test_lru_drops_the_least_recently_used() -> None:
    assert hits(LRU(2), [1, 2, 1, 3, 1, 2]) == [False, False, True, False, True, False]


def test_lru_drops_the_end_of_a_request_first() -> None:
    cache = LRU(3)
    cache.access([1, 2, 3])
    cache.access([1, 4])
    assert [block in cache for block in (1, 2, 3, 4)] == [True, True, False, True]


def test_belady_drops_what_is_used_last() -> None:
    blocks = [1, 2, 3, 1, 2, 3, 1]
    assert hits(belady(2, blocks), blocks) == [False, False, False, True, True, False, True]


def test_belady_does_not_keep_what_is_never_used_again() -> None:
    blocks = [1, 2, 3, 4, 1]
    assert hits(belady(1, blocks), blocks)[-1]


def test_s3fifo_keeps_the_main_queue_through_a_scan() -> None:
    cache = S3FIFO(10)
    used = [1, 2, 3, 4]
    for _ in range(2):
        hits(cache, used)
    hits(cache, range(100, 200))
    assert all(block in cache for block in used)


def test_s3fifo_drops_what_was_used_once_and_takes_it_back_from_the_ghosts() -> None:
    cache = S3FIFO(10)
    hits(cache, range(10))
    assert hits(cache, [10]) == [False] and 0 not in cache  # 0 was the oldest of the small queue
    assert hits(cache, [0]) == [False] and 0 in cache  # from the ghosts, now in the main queue
    hits(cache, range(100, 120))
    assert 0 in cache


def test_s3fifo_never_holds_more_than_its_capacity() -> None:
    cache = S3FIFO(7)
    for block in [*range(20), *range(15), *range(30), 3, 3, 3, *range(40)]:
        cache.access([block])
        assert sum(each in cache for each in range(40)) <= 7


def test_arc_keeps_what_is_used_often_through_a_scan() -> None:
    cache = ARC(4)
    hits(cache, [1, 2, 1, 2])
    hits(cache, range(100, 150))
    assert hits(cache, [1, 2]) == [True, True]


def test_arc_adapts_to_recency() -> None:
    cache = ARC(4)
    hits(cache, [1, 2, 3, 4, 1, 2, 3, 4])  # all in the frequent list
    hits(cache, [5, 6, 5, 6, 5, 6])
    assert hits(cache, [5, 6]) == [True, True]


requests = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=60)


@settings(max_examples=200)
@given(requests, st.integers(1, 12))
def test_nothing_that_loads_on_demand_beats_belady(chains, capacity) -> None:
    trace = turns(rekeyed([Request(3.0 * i, 512 * len(c), 10, tuple(c)) for i, c in enumerate(chains)]))
    best = replay_baseline(trace, Belady(capacity, Future(turn.request.blocks for turn in trace)))
    for cache in (LRU(capacity), S3FIFO(capacity), ARC(capacity)):
        assert replay_baseline(trace, cache).ready <= best.ready
    ours = OursReplay(trace, capacity, Machine(), prefetch=False).run()
    assert ours.ready <= best.ready and ours.prefetched == 0
    oracle = replay_oracle(trace, capacity, Machine())
    assert oracle.ready <= oracle.reusable == best.reusable
    for outcome in (best, ours, oracle):
        assert outcome.reusable == outcome.ready + outcome.on_demand + outcome.late
        assert 0 <= outcome.wasted <= outcome.prefetched
