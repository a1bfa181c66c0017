"""Making what was written survive a crash of the machine."""

from __future__ import annotations

import os


def sync(path: str | os.PathLike[str]) -> None:
    """Makes a file's content, or the entries of a directory (renames, removals), durable.

    Raises:
        OSError: it is not there, or cannot be written.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
