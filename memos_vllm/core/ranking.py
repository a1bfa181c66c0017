"""The scenes by value, coarsely sorted: an update costs a dictionary entry, a query looks at the top only."""

from __future__ import annotations

import math
from collections.abc import Iterator

_BUCKETS_PER_OCTAVE = 4
_WORTHLESS = -(10**6)


class Ranking:
    """Ids by value; equal values in the order of their ids, so that the order is the same in every process."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._buckets: dict[int, set[str]] = {}

    def set(self, key: str, value: float) -> None:
        old = self._values.get(key)
        if old == value:
            return
        before, after = None if old is None else _bucket(old), _bucket(value)
        if before != after:
            if before is not None:
                self._leave(before, key)
            self._buckets.setdefault(after, set()).add(key)
        self._values[key] = value

    def remove(self, key: str) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self._leave(_bucket(value), key)

    def best(self) -> Iterator[str]:
        """From the highest value on, down to the lowest above 0. Must not change meanwhile."""
        for index in sorted(self._buckets, reverse=True):
            if index != _WORTHLESS:
                yield from sorted(self._buckets[index], key=lambda key: (-self._values[key], key))

    def least(self) -> str:
        """An id of the lowest value, about; the ranking must not be empty."""
        return next(iter(self._buckets[min(self._buckets)]))

    def _leave(self, index: int, key: str) -> None:
        bucket = self._buckets[index]
        bucket.discard(key)
        if not bucket:
            del self._buckets[index]


def _bucket(value: float) -> int:
    return math.floor(math.log2(value) * _BUCKETS_PER_OCTAVE) if value > 0.0 else _WORTHLESS
