"""How much KV the disk has room for: the configured limit, or less where the file system has less.

Memories are on the same file system, usually, and they cannot be computed again. So a reserve stays free, and
the limit is lowered as others take space and rises again as they give it back.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

RESERVE_SHARE = 0.05
MIN_RESERVE_BYTES = 512 * 2**20
MAX_RESERVE_BYTES = 16 * 2**30
"""Of the default: 5 % of a file system of 10 TB would be more than most servers keep of KV."""

LOOK_INTERVAL_S = 2.0
"""Between two looks, unless a quarter of the reserve is planned sooner. A look is one ``statvfs``."""

FULL_HOLD_S = 60.0
"""How long a full disk counts as full, whatever ``statvfs`` says: it does not know every kind of quota."""

LOG_INTERVAL_S = 600.0


class Space(Protocol):
    """What ``os.statvfs`` returns, as far as it is used."""

    @property
    def f_frsize(self) -> int: ...

    @property
    def f_blocks(self) -> int: ...

    @property
    def f_bavail(self) -> int: ...


class DiskRoom:
    """
    Args:
        path: a directory on the file system, there already.
        limit_bytes: KV bytes, however much is free.
        reserve_bytes: of the file system, to be left free; None: ``RESERVE_SHARE``, within its bounds.
    """

    def __init__(
        self,
        path: Path,
        limit_bytes: int,
        reserve_bytes: int | None,
        statvfs: Callable[[Path], Space] = os.statvfs,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit_bytes = self.budget_bytes = limit_bytes
        self._path, self._reserve_bytes = path, reserve_bytes
        self._statvfs, self._now = statvfs, now
        self._next_look = self._full_until = self._next_log = float("-inf")
        self._full_budget_bytes = limit_bytes
        self._planned_bytes = 0

    def look(self, held_bytes: int, planned_bytes: int = 0) -> None:
        """Brings ``budget_bytes`` up to date, if it is time.

        Args:
            held_bytes: of KV that is on the disk.
            planned_bytes: of KV that is going to be written now.
        """
        self._planned_bytes += planned_bytes
        now = self._now()
        if now < self._next_look and self._planned_bytes < (self._reserve_bytes or MIN_RESERVE_BYTES) // 4:
            return
        self._next_look, self._planned_bytes = now + LOOK_INTERVAL_S, 0
        try:
            space = self._statvfs(self._path)
        except OSError as error:
            logger.warning("cannot tell how much is free on the file system of %s: %s", self._path, error)
            return
        if self._reserve_bytes is None:
            self._reserve_bytes = default_reserve(space.f_blocks * space.f_frsize)
        room_bytes = held_bytes + space.f_bavail * space.f_frsize - self._reserve_bytes
        budget_bytes = self._full_budget_bytes if now < self._full_until else self.limit_bytes
        self.budget_bytes = max(0, min(budget_bytes, room_bytes))
        if self.budget_bytes < self.limit_bytes and now >= self._next_log:
            self._next_log = now + LOG_INTERVAL_S
            logger.warning(
                "kv.disk_bytes allows this engine %d bytes of KV on disk, but the file system of %s has room for %d, "
                "with %d left free for other data (kv.disk_reserve_bytes); what is beyond that is evicted",
                self.limit_bytes, self._path, self.budget_bytes, self._reserve_bytes,
            )  # fmt: skip

    def ran_full(self, held_bytes: int) -> None:
        """A write found no space: nothing is free, for a while."""
        self._full_until = self._now() + FULL_HOLD_S
        self._full_budget_bytes = max(0, min(self.budget_bytes, held_bytes - (self._reserve_bytes or 0)))
        self.budget_bytes = self._full_budget_bytes
        logger.warning(
            "the file system of %s is full: the KV on disk is held to %d bytes", self._path, self.budget_bytes
        )


def default_reserve(file_system_bytes: int) -> int:
    """Bytes of a file system that KV leaves free unless the configuration says otherwise."""
    return min(max(int(RESERVE_SHARE * file_system_bytes), MIN_RESERVE_BYTES), MAX_RESERVE_BYTES)
