"""Cache policies to compare with, over single blocks: LRU, S3-FIFO and ARC; Belady knows the future.

None of them loads anything early.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol


class BlockCache(Protocol):
    def __contains__(self, block: int) -> bool: ...

    def access(self, blocks: Sequence[int]) -> None: ...


class LRU:
    """Least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def access(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):  # as vLLM frees a request's blocks: the last one goes first
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)


class S3FIFO:
    """Yang et al., SOSP 2023: a small queue for newcomers, a main queue, and ghosts of what the small one dropped."""

    def __init__(self, capacity: int, small_share: float = 0.1, promote_at: int = 1) -> None:
        self.capacity = capacity
        self._small_capacity = max(1, int(capacity * small_share))
        self._promote_at = promote_at
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._uses

    def access(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block in self._uses:
                self._uses[block] = min(3, self._uses[block] + 1)
                continue
            while len(self._uses) >= self.capacity:
                self._evict()
            if block in self._ghost:
                del self._ghost[block]
                self._main[block] = None
            else:
                self._small[block] = None
            self._uses[block] = 0

    def _evict(self) -> None:
        if len(self._small) >= self._small_capacity or not self._main:
            self._evict_small()
        else:
            self._evict_main()

    def _evict_small(self) -> None:
        while self._small:
            block, _ = self._small.popitem(last=False)
            if self._uses[block] >= self._promote_at:
                self._uses[block] = 0
                self._main[block] = None
            else:
                del self._uses[block]
                self._ghost[block] = None
                while len(self._ghost) > self.capacity - self._small_capacity:
                    self._ghost.popitem(last=False)
                return
        self._evict_main()

    def _evict_main(self) -> None:
        while True:
            block, _ = self._main.popitem(last=False)
            if not self._uses[block]:
                del self._uses[block]
                return
            self._uses[block] -= 1
            self._main[block] = None


class ARC:
    """Megiddo and Modha, FAST 2003: recency and frequency lists whose balance follows the ghosts that are hit."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._target = 0.0
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._frequent: OrderedDict[int, None] = OrderedDict()
        self._recent_ghosts: OrderedDict[int, None] = OrderedDict()
        self._frequent_ghosts: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._recent or block in self._frequent

    def access(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._access(block)

    def _access(self, block: int) -> None:
        if block in self._recent:
            del self._recent[block]
            self._frequent[block] = None
        elif block in self._frequent:
            self._frequent.move_to_end(block)
        elif block in self._recent_ghosts:
            step = max(1.0, len(self._frequent_ghosts) / len(self._recent_ghosts))
            self._target = min(self.capacity, self._target + step)
            self._replace(False)
            del self._recent_ghosts[block]
            self._frequent[block] = None
        elif block in self._frequent_ghosts:
            step = max(1.0, len(self._recent_ghosts) / len(self._frequent_ghosts))
            self._target = max(0.0, self._target - step)
            self._replace(True)
            del self._frequent_ghosts[block]
            self._frequent[block] = None
        else:
            self._miss()
            self._recent[block] = None

    def _miss(self) -> None:
        recent = len(self._recent) + len(self._recent_ghosts)
        total = recent + len(self._frequent) + len(self._frequent_ghosts)
        if recent == self.capacity:
            if len(self._recent) < self.capacity:
                self._recent_ghosts.popitem(last=False)
                self._replace(False)
            else:
                self._recent.popitem(last=False)
        elif total >= self.capacity:
            if total == 2 * self.capacity:
                self._frequent_ghosts.popitem(last=False)
            self._replace(False)

    def _replace(self, frequent_ghost_hit: bool) -> None:
        if len(self._recent) + len(self._frequent) < self.capacity:
            return
        over = len(self._recent) > self._target or (frequent_ghost_hit and len(self._recent) == self._target)
        if self._recent and (over or not self._frequent):
            block, _ = self._recent.popitem(last=False)
            self._recent_ghosts[block] = None
        else:
            block, _ = self._frequent.popitem(last=False)
            self._frequent_ghosts[block] = None


NEVER = 2**62


class Future:
    """When each block is used next, in requests. Advances with the replay."""

    def __init__(self, chains: Iterable[Sequence[int]]) -> None:
        self._uses: dict[int, deque[int]] = {}
        for index, chain in enumerate(chains):
            for block in chain:
                self._uses.setdefault(block, deque()).append(index)

    def next_use(self, block: int) -> int:
        uses = self._uses.get(block)
        return uses[0] if uses else NEVER

    def pass_request(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._uses[block].popleft()


class Belady:
    """Evicts what is used last, or never; brings only what is used. The best that a policy without prefetch can do."""

    def __init__(self, capacity: int, future: Future) -> None:
        self.capacity, self._future = capacity, future
        self._next: dict[int, int] = {}
        self._last: list[tuple[int, int]] = []

    def __contains__(self, block: int) -> bool:
        return block in self._next

    def __len__(self) -> int:
        return len(self._next)

    def access(self, blocks: Sequence[int]) -> None:
        self._future.pass_request(blocks)
        for block in blocks:
            self.insert(block)
        self.shrink()

    def insert(self, block: int) -> None:
        next_use = self._future.next_use(block)
        if self._next.get(block) != next_use:
            self._next[block] = next_use
            heapq.heappush(self._last, (-next_use, block))

    def farthest(self) -> int:
        """The next use of what would be evicted."""
        while self._next.get(self._last[0][1]) != -self._last[0][0]:
            heapq.heappop(self._last)
        return -self._last[0][0]

    def evict(self) -> int:
        self.farthest()
        _, block = heapq.heappop(self._last)
        del self._next[block]
        return block

    def shrink(self) -> list[int]:
        out = []
        while len(self._next) > self.capacity:
            out.append(self.evict())
        return out
