"""Room on the disk that is kept for deletions, which need some before they free any."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from memos_vllm.durable import sync
from memos_vllm.errors import StoreFull

logger = logging.getLogger(__name__)

SIZE_BYTES = 4 * 2**20
"""LMDB writes a copy of each page that a deletion touches: 80 KiB for one memory and 0.3 MiB for a user of 10,000 in a
store of 50,000, where no page was free."""

T = TypeVar("T")


class Ballast:
    """A file that is given back when a deletion finds the disk full, and made again when there is room.

    Several processes may keep one file: whoever needs it removes it.
    """

    def __init__(self, path: Path, size_bytes: int = SIZE_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def keep(self) -> None:
        """Makes it, if it is missing and there is room for twice as much."""
        if self._path.exists() or shutil.disk_usage(self._path.parent).free < 2 * self._size_bytes:
            return
        work = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            handle = os.open(work, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(handle, 0, self._size_bytes)
            finally:
                os.close(handle)
            work.replace(self._path)
        except OSError as error:  # deletions then need what room there is
            logger.debug("no room can be kept for deletions: %s", error)
            work.unlink(missing_ok=True)

    def lend(self, remove: Callable[..., T], *args: object) -> T:
        """Runs a deletion that a full disk leaves undone as a whole; where it does, once more with the ballast's room.

        Raises:
            StoreFull: that is not enough, or was lent already.
        """
        try:
            return remove(*args)
        except StoreFull:
            if not self._give_back():
                raise
            logger.warning("the disk of %s is full: a deletion takes the room that was kept for it", self._path.parent)
            return remove(*args)

    def _give_back(self) -> bool:
        try:
            self._path.unlink()
            sync(self._path.parent)  # what a journal holds back is free from now on
        except OSError:
            return False
        return True
