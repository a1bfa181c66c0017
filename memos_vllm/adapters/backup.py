"""A copy of the registry, also beside a running server."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lmdb

from memos_vllm.adapters import served_model
from memos_vllm.adapters.examination import open_for_reading, owners_of_contents
from memos_vllm.adapters.files import AdapterFiles
from memos_vllm.errors import DataDirError

_ROUNDS = 5


def copy_registry(root: Path, target: Path) -> list[str]:
    """Copies the index, as of one moment, and every content that it names.

    Contents never change, but they go: if one does while it is its turn, the index is copied anew.

    Args:
        target: not there yet.

    Returns:
        What the index names and has no files for.

    Raises:
        DataDirError: the index cannot be read, or the copy not be written.
    """
    files = AdapterFiles(root)
    objects = target / "objects"
    missing: dict[str, list[str]] = {}
    try:
        objects.mkdir(mode=0o700, parents=True)
        for _ in range(_ROUNDS):
            known = _copy_index(root / "index", target / "index")
            missing = {digest: names for digest, names in known.items() if not _copy_content(files, digest, objects)}
            if not missing:
                break
        for folder in objects.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder)
        served_model.copy(root, target)
    except (lmdb.Error, OSError, ValueError) as error:
        raise DataDirError(f"the adapters in {root} cannot be copied: {error}") from error
    return [name for names in missing.values() for name in names]


def _copy_index(index: Path, target: Path) -> dict[str, list[str]]:
    """What it names, by digest; see ``owners_of_contents``."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(mode=0o700)
    with open_for_reading(index) as env:
        env.copy(str(target), compact=True)
    os.chmod(target / "data.mdb", 0o600)
    return owners_of_contents(target)


def _copy_content(files: AdapterFiles, digest: str, objects: Path) -> bool:
    """False if there is none."""
    if (objects / digest).exists():
        return True
    with files.locked():  # it does not go meanwhile
        if not files.folder(digest).is_dir():
            return False
        shutil.copytree(files.folder(digest), objects / digest)
    return True
