"""What the prefix cache of ordinary requests is worth: blocks that no predicted scene has, and somebody may use again.

A prefetch takes the place of such a block only if it is worth more. What is known of them is when they were last
used, and how often blocks like them were used again before they left. Waits between uses have no scale of their
own, so of blocks that will be used again, one that has waited ``a`` comes within the next ``h`` with probability
h / (h + a).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from memos_vllm.core.predictor import HORIZON_S
from memos_vllm.core.told_values import UNIT

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

MEMORY_BLOCKS = 10_000
"""Ends of waits that count fully; older ones count half, then a quarter, ..."""


class PlainCache:
    """Owned by the engine's loop.

    Args:
        now: seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._freed_at: dict[int, float] = {}
        """By block id, of blocks with content."""
        self._hits, self._ends = 1.0, 2.0

    @property
    def reuse(self) -> float:
        """How many of the blocks that were free with content were used again before they left."""
        return self._hits / self._ends

    def freed(self, block: KVCacheBlock) -> None:
        """A request let go of a block that nobody expects."""
        if block.block_hash is not None:
            self._freed_at[block.block_id] = self._now()

    def expected(self, block: KVCacheBlock) -> None:
        """Somebody expects it now."""
        self._freed_at.pop(block.block_id, None)

    def hit(self, block: KVCacheBlock) -> None:
        """A request uses it again."""
        if self._freed_at.pop(block.block_id, None) is not None:
            self._end(1, 1)

    def evicted(self, blocks: Iterable[KVCacheBlock]) -> None:
        """They leave; those with content were not used again."""
        num_lost = 0
        for block in blocks:
            num_lost += self._freed_at.pop(block.block_id, None) is not None and block.block_hash is not None
        if num_lost:
            self._end(0, num_lost)

    def worth(self, block: KVCacheBlock) -> float:
        """In the unit of ``ToldValues``; 0 if the block holds nothing."""
        if block.block_hash is None:
            return 0.0
        waited_s = max(0.0, self._now() - self._freed_at.get(block.block_id, -math.inf))
        return UNIT * self.reuse * HORIZON_S / (HORIZON_S + waited_s)

    def _end(self, num_hits: int, num_ends: int) -> None:
        self._hits, self._ends = self._hits + num_hits, self._ends + num_ends
        if self._ends > MEMORY_BLOCKS:
            self._hits, self._ends = self._hits / 2, self._ends / 2
