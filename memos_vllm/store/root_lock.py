"""The lock of a KV directory: one index has it open at a time, and doctor changes it beside none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from memos_vllm.errors import DataDirError, DataDirInUse


class RootLock:
    """Held from the start until ``release``, or the end of the process. Creates the directory if it is missing.

    Raises:
        DataDirError: ``root`` cannot be used.
        DataDirInUse: another index has it open.
    """

    def __init__(self, root: Path) -> None:
        self._fd: int | None = _lock(root)

    @property
    def is_held(self) -> bool:
        return self._fd is not None

    def release(self) -> None:
        assert self._fd is not None
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # explicitly: a forked worker may still have the descriptor
        os.close(self._fd)
        self._fd = None


@contextlib.contextmanager
def if_unused(root: Path) -> Iterator[bool]:
    """Whether no server holds the directory; none can take it within the block."""
    try:
        fd = os.open(root / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(fd)


def _lock(root: Path) -> int:
    try:
        root.mkdir(parents=True, exist_ok=True)
        fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataDirError(f"the KV directory {root} is not a directory") from error
    except OSError as error:
        raise DataDirError(
            f"the KV directory {root} cannot be written: {error.strerror}; choose another data_dir"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise DataDirInUse(f"another server uses the KV directory {root}; give each its own data_dir") from error
        raise DataDirError(f"the KV directory {root} cannot be locked: {error.strerror}") from error
    return fd
