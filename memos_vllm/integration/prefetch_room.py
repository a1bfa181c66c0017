"""How many blocks prefetches may start now, so that they hold up no step and no request for long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memos_vllm.store.manager import TierManager

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

IN_FLIGHT_SHARE = 0.25
"""Share of the pool that prefetches may hold at a time."""

IN_FLIGHT_S = 0.1
"""How long what prefetches hold takes to arrive, by what copies have taken so far: a live request that needs the
blocks waits for no more than that."""

STARTED_BLOCKS = 128
"""Blocks that are started in one step. Planning one takes about 15 us of the engine's loop on a Xeon core of 2 GHz, so
that a step is made 2 ms longer at most; the next ones start when a copy ends."""


class PrefetchRoom:
    """Owned by the engine's loop.

    Args:
        chunk_blocks: blocks per copy.
    """

    def __init__(self, pool: BlockPool, tiers: TierManager, chunk_blocks: int) -> None:
        self._pool, self._tiers, self._chunk_blocks = pool, tiers, chunk_blocks
        self._is_starved = False
        self._num_started = 0
        """In this step."""

    def new_step(self, *, is_starved: bool) -> None:
        """The scheduler has planned a step.

        Args:
            is_starved: a request waits for blocks: nothing is started, so that what is under way frees them.
        """
        self._num_started, self._is_starved = 0, is_starved

    def started(self, num_blocks: int) -> None:
        self._num_started += num_blocks

    def num_startable(self, num_loading: int) -> int:
        """Blocks that may be started while prefetches hold ``num_loading``; below 1, none."""
        if self._is_starved:
            return 0
        in_flight = min(int(IN_FLIGHT_SHARE * self._pool.num_gpu_blocks), self._blocks_within(IN_FLIGHT_S))
        return min(STARTED_BLOCKS - self._num_started, in_flight - num_loading)

    def _blocks_within(self, seconds: float) -> int:
        """How many blocks prefetches bring in that time; at least two chunks, so that one can follow the other."""
        least = 2 * self._chunk_blocks
        totals = [self._tiers.copies[path, "prefetch"] for path in ("host_to_gpu", "disk_to_gpu")]
        took_s = sum(each.seconds for each in totals)
        if not took_s:
            return max(least, STARTED_BLOCKS)
        return max(least, int(seconds * sum(each.size_bytes for each in totals) / took_s / self._tiers.block_bytes))
