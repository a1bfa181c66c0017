"""Users who have as much as they may: what is logged of them. Every chat of theirs would be a line otherwise."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from memos_vllm.errors import LimitReached
from memos_vllm.types import Principal

logger = logging.getLogger(__name__)

REPEAT_S = 3600.0
MAX_USERS = 10_000
"""Whom one process remembers to have told of; beyond, those told of first are told of again."""


class OverLimit:
    """One per API process.

    Args:
        now: in seconds, never going back; tests set it.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._told: OrderedDict[Principal, float] = OrderedDict()

    def tell(self, who: Principal, error: LimitReached) -> None:
        """Once an hour for each user."""
        now = self._now()
        if who in self._told and now - self._told[who] < REPEAT_S:
            return
        self._told.pop(who, None)
        self._told[who] = now
        if len(self._told) > MAX_USERS:
            self._told.popitem(last=False)
        logger.warning("chats of %s are answered and not remembered, for the next hour without a word: %s", who, error)
