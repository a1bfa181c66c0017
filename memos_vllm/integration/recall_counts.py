"""How often each memory is used, as far as one API process sees it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

MAX_MEMORIES = 100_000


class RecallCounts:
    """How often each memory stood in a prompt since this process started; bounded."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._counts: Counter[str] = Counter()

    def count(self, memory_ids: Iterable[str]) -> None:
        self._counts.update(memory_ids)
        if len(self._counts) > MAX_MEMORIES:
            self._counts = Counter(dict(self._counts.most_common(MAX_MEMORIES // 2)))

    def of(self, memory_id: str) -> int:
        return self._counts[memory_id]

    @property
    def observed_s(self) -> float:
        return time.monotonic() - self._since
