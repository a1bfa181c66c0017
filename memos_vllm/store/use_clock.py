"""The order of uses, over all tiers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class UseClock:
    """Counts uses; no two have the same number, a later one has a higher."""

    now: int = 0

    def tick(self) -> int:
        self.now += 1
        return self.now
