"""The files of a folder, and nothing outside it, whatever links there are."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memos_vllm.errors import DocumentError
from memos_vllm.memory.documents.formats import SUFFIXES


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    """Below the folder."""

    path: Path
    """Without symbolic links."""

    mtime_ns: int
    size_bytes: int


def files(root: Path) -> Iterator[Found]:
    """Readable formats, by name; hidden files and folders and links to folders are passed over.

    Raises:
        OSError: the folder itself cannot be read.
    """
    root = root.resolve(strict=True)
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            if folder == root:
                raise
            continue  # it went away, or may not be read
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif Path(entry.name).suffix.lower() in SUFFIXES and (found := _file(root, entry)):
                yield found


def _file(root: Path, entry: os.DirEntry[str]) -> Found | None:
    """None for what is no file, is gone, or is a link to outside."""
    try:
        path = Path(entry.path)
        if entry.is_symlink():
            path = path.resolve(strict=True)
        seen = path.stat(follow_symlinks=False)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return None
    if not stat.S_ISREG(seen.st_mode) or not path.is_relative_to(root):
        return None
    return Found(str(Path(entry.path).relative_to(root)), path, seen.st_mtime_ns, seen.st_size)


def read(root: Path, found: Found, max_bytes: int) -> bytes:
    """
    Raises:
        DocumentError: it is larger than ``max_bytes``.
        OSError: it cannot be read, or a link has taken its place since it was found.
    """
    with open(os.open(found.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        # A folder on the way to it may have been replaced by a link.
        opened = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
        if not opened.is_relative_to(root.resolve()):
            raise PermissionError(f"{found.path} leads outside {root}")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DocumentError(f"it has more than {max_bytes} bytes, which is memory.documents.max_bytes", status=413)
    return data
