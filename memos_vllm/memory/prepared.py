"""Long-lived memory chosen ahead: what a session's first recall finds done if nothing changed since."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from memos_vllm.types import MemoryId, Principal

MAX_USERS = 10_000
"""Whose choice is kept; those asked for last. Ids only, a few kilobytes a user at most."""


class PreparedChoices:
    """Safe for threads. A choice holds for one state (``seq``) of the user's memories."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._choices: OrderedDict[Principal, tuple[int, tuple[MemoryId, ...]]] = OrderedDict()

    def get(self, who: Principal, seq: int) -> Sequence[MemoryId] | None:
        """The ids in order; None if there is no choice, or the user's memories have changed since."""
        with self._lock:
            made_at, ids = self._choices.get(who, (None, ()))
            if made_at != seq:
                return None
            self._choices.move_to_end(who)
            return ids

    def put(self, who: Principal, seq: int, ids: Sequence[MemoryId]) -> None:
        with self._lock:
            self._choices[who] = (seq, tuple(ids))
            self._choices.move_to_end(who)
            if len(self._choices) > MAX_USERS:
                self._choices.popitem(last=False)
