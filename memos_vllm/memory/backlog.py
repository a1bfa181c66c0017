"""Users of whom something is still to be done that no request should wait for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from memos_vllm.types import Principal

logger = logging.getLogger(__name__)


class Backlog:
    """A thread that does a piece of each user's work in turn, and ends when there is none. Thread-safe.

    Args:
        work: one piece of a user's; whether more is left. What it raises is logged, and the user goes out.
    """

    def __init__(self, name: str, work: Callable[[Principal], bool]):
        self._name = name
        self._work = work
        self._lock = threading.Lock()
        self._waiting: dict[Principal, None] = {}
        """In the order of their turns; the first one's is now."""

        self._thread: threading.Thread | None = None

    def __contains__(self, who: Principal) -> bool:
        return who in self._waiting

    def add(self, who: Principal) -> None:
        with self._lock:
            self._waiting.setdefault(who)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Returns once nothing is left."""
        while (thread := self._thread) is not None:
            thread.join()

    def _run(self) -> None:
        while (who := self._next()) is not None:
            try:
                is_left = self._work(who)
            except Exception:
                logger.exception("%s: the rest of %s is left undone", self._name, who)
                is_left = False
            with self._lock:
                del self._waiting[who]
                if is_left:
                    self._waiting[who] = None

    def _next(self) -> Principal | None:
        """Whose turn it is; where nobody waits, the thread has ended."""
        with self._lock:
            who = next(iter(self._waiting), None)
            if who is None:
                self._thread = None
            return who
