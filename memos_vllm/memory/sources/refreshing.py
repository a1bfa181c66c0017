"""Folders are looked through by a thread, in one process of several; no request waits for it."""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from memos_vllm.memory.sources.folder import FolderSource

logger = logging.getLogger(__name__)


class Refresher:
    """
    Args:
        lock_path: who holds it refreshes; the others follow the store that it writes.
        monotonic_s: a clock that never goes back; tests set it.
    """

    def __init__(
        self,
        folders: Sequence[FolderSource],
        lock_path: Path,
        monotonic_s: Callable[[], float] = time.monotonic,
    ):
        self._folders = folders
        self._lock_path = lock_path
        self._monotonic_s = monotonic_s
        self._lock: IO[bytes] | None = None
        self._due_s = dict.fromkeys((folder.name for folder in folders), -1.0)

    def start(self) -> None:
        if self._folders:
            threading.Thread(target=self._run, name="memos-sources", daemon=True).start()

    def round(self) -> float:
        """Refreshes the folders that are due; in how many seconds the next one is."""
        leads = self._leads()
        for folder in self._folders:
            if self._due_s[folder.name] > self._monotonic_s():
                continue
            try:
                if leads:
                    folder.refresh()
                folder.load()
            except Exception:
                # The index stays as it is, and what was not taken in is found again.
                logger.exception("source %s was not refreshed; it is tried again", folder.name)
            self._due_s[folder.name] = self._monotonic_s() + folder.refresh_s
        return max(0.0, min(self._due_s.values()) - self._monotonic_s())

    def _run(self) -> None:
        wait = threading.Event().wait
        while True:
            wait(self.round())

    def _leads(self) -> bool:
        """Whether this process refreshes. The system gives the lock to another one when it ends."""
        if self._lock is None:
            lock = open(self._lock_path, "ab")  # noqa: SIM115 - held as long as the process lives
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                return False
            self._lock = lock
        return True
