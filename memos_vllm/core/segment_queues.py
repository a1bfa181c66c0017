"""Segments by value, from both ends: whose blocks are given up first, and whose are brought first.

Two heaps of entries, each with the value that its segment had. A change of a segment is a new entry, and one that
does not fit its segment any more is skipped when its turn comes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from memos_vllm.core.block_tree import BlockTree, Segment

_Low = tuple[float, float, int, int, Segment]
_High = tuple[float, int, int, Segment]


class SegmentQueues:
    """
    Args:
        tree: of the segments; how many it has bounds the entries.
        in_use_from: what is worth as much has no place among what is brought.
    """

    def __init__(self, tree: BlockTree, in_use_from: float = math.inf) -> None:
        self._tree, self._in_use_from = tree, in_use_from
        self._low: list[_Low] = []
        self._high: list[_High] = []

    def file(self, segment: Segment) -> None:
        """Its value, its last use or what there is to give up or to bring of it has changed."""
        if segment.num_evictable:
            heapq.heappush(self._low, (segment.value, segment.last_use, -segment.start, segment.serial, segment))
        if segment.num_absent and 0.0 < segment.value < self._in_use_from:
            heapq.heappush(self._high, (-segment.value, segment.start, segment.serial, segment))
        limit = 8 * self._tree.num_segments + 1024
        if len(self._low) > limit:
            self._low = list({each[4]: each for each in self._low if _low_valid(each)}.values())
            heapq.heapify(self._low)
        if len(self._high) > limit:
            self._high = list({each[3]: each for each in self._high if _high_valid(each)}.values())
            heapq.heapify(self._high)

    def lowest(self) -> Segment | None:
        """Of those with blocks to give up: the least valuable, among equals the least recently used."""
        while self._low:
            if _low_valid(self._low[0]):
                return self._low[0][4]
            heapq.heappop(self._low)
        return None

    def highest(self) -> Segment | None:
        """The most valuable of those that miss blocks."""
        while self._high:
            if _high_valid(self._high[0]):
                return self._high[0][3]
            heapq.heappop(self._high)
        return None

    def pass_lowest(self) -> None:
        """Takes out what ``lowest`` returned; ``file`` it again."""
        heapq.heappop(self._low)

    def pass_highest(self) -> None:
        """Takes out what ``highest`` returned; ``file`` it again."""
        heapq.heappop(self._high)

    def check_integrity(self, segments: Iterable[Segment]) -> None:
        """Asserts that each of them is found where it belongs."""
        low = {entry[4] for entry in self._low if _low_valid(entry)}
        high = {entry[3] for entry in self._high if _high_valid(entry)}
        for segment in segments:
            assert not segment.num_evictable or segment in low
            assert not (segment.num_absent and 0.0 < segment.value < self._in_use_from) or segment in high


def _low_valid(entry: _Low) -> bool:
    segment = entry[4]
    return segment.value == entry[0] and segment.last_use == entry[1] and segment.num_evictable > 0


def _high_valid(entry: _High) -> bool:
    segment = entry[3]
    return segment.value == -entry[0] and segment.num_absent > 0
