"""When each scene's probability is to be looked at again."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from memos_vllm.core.waiting import Wait


class Visits:
    """A heap by time. An entry is void once its wait has another one, or is gone.

    Args:
        waits: of all scenes, by id.
    """

    def __init__(self, waits: Mapping[str, Wait]) -> None:
        self._waits = waits
        self._due: list[tuple[float, str, int]] = []

    def schedule(self, wait: Wait, due: float | None) -> None:
        """In place of what was scheduled for it; None: never."""
        wait.due = due
        wait.version += 1
        if due is not None:
            heapq.heappush(self._due, (due, wait.scene.id, wait.version))
        if len(self._due) > 4 * len(self._waits) + 1024:
            self._due = [
                (each.due, each.scene.id, each.version) for each in self._waits.values() if each.due is not None
            ]
            heapq.heapify(self._due)

    def next_due(self, now: float) -> Wait | None:
        """Takes out the one that is due for longest, if any is."""
        while self._due and self._due[0][0] <= now:
            _, scene_id, version = heapq.heappop(self._due)
            wait = self._waits.get(scene_id)
            if wait is not None and wait.version == version:
                return wait
        return None
