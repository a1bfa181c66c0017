"""Work that only the latest word counts for, in a task of its own, so that nobody waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class LatestOnly(Generic[_T]):
    """Owned by an event loop.

    Args:
        work: runs once at a time; what is asked for meanwhile replaces what was asked for before and was not begun.
        name: of the task.
    """

    def __init__(self, work: Callable[[_T], Awaitable[None]], name: str) -> None:
        self._work, self._name = work, name
        self._asked: list[_T] = []
        """At most one."""
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return self._task is not None

    def ask(self, what: _T) -> None:
        self._asked = [what]
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    async def _run(self) -> None:
        try:
            while self._asked:
                try:
                    await self._work(self._asked.pop())
                except Exception:
                    logger.exception("%s failed; it is tried again when it is asked for anew", self._name)
        finally:
            self._task = None
