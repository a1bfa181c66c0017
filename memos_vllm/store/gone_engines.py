"""KV directories of data-parallel engines that are gone: after a restart with fewer of them nobody counts or evicts
what is there, so it would take room beside the budget for ever."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from memos_vllm.store import chunk_files
from memos_vllm.store.root_lock import if_unused

logger = logging.getLogger(__name__)

_ENGINE = re.compile(r"dp(0|[1-9]\d*)")
_OURS = re.compile(rf"lock|index\.opening|index(\.damaged-\d+)?(/(data|lock)\.mdb)?|{chunk_files.PATHS}")
"""What ``disk_index`` leaves in a directory; paths below it."""


def remove_gone(kv_dir: Path, num_engines: int) -> None:
    """Removes the directories of engines from this number on; who calls it holds the data directory.

    One that a process still has open, or with anything in it that is not of ``disk_index``, is left alone with a
    warning. What cannot be removed is tried again at the next start.
    """
    for root in sorted(kv_dir.glob("dp*")):
        match = _ENGINE.fullmatch(root.name)
        if match is None or int(match[1]) < num_engines or root.is_symlink() or not root.is_dir():
            continue
        try:
            _remove(root)
        except OSError as error:
            logger.warning("the KV of an engine that is gone could not be removed: %s", error)


def _remove(root: Path) -> None:
    if not (root / "lock").is_file() or os.path.ismount(root):
        logger.warning("%s is not removed, for it is no KV directory of an engine", root)
        return
    with if_unused(root) as is_unused:
        if not is_unused:
            logger.warning("%s is not removed, for a process has it open", root)
            return
        size_bytes = 0
        for path in _entries(root):
            name = path.relative_to(root).as_posix()
            if path.is_symlink() or not _OURS.fullmatch(name) or (path.is_dir() and os.path.ismount(path)):
                logger.warning("%s is not removed, for %s in it is no KV of ours", root, name)
                return
            size_bytes += 0 if path.is_dir() else path.stat().st_size
        for each in root.iterdir():
            if each.name == "lock":  # last: by it a directory that is partly removed is known again
                continue
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        (root / "lock").unlink()
        root.rmdir()
    logger.info("%s was removed, %d bytes: there is no engine of this number any more", root, size_bytes)


def _entries(root: Path) -> list[Path]:
    return [Path(folder) / name for folder, folders, files in os.walk(root) for name in (*folders, *files)]
