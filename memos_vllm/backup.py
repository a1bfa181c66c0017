"""``memos backup DATA_DIR TARGET``: a copy of what cannot be computed again; also beside a running server.

    memos backup DIR TARGET                 memories, adapters, the secret, what prediction has learned
    memos backup DIR TARGET --config FILE   where the server's configuration names a database: all but the memories

TARGET is a data_dir: 'memos doctor TARGET' examines it, and a server starts from it.

Exit status: 0 all is in the backup, 1 something is not (it says what), 2 there is no backup.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from memos_vllm import data_dir
from memos_vllm.adapters.backup import copy_registry
from memos_vllm.config import MemoryConfig, load
from memos_vllm.durable import sync
from memos_vllm.errors import DataDirError, MemosError
from memos_vllm.memory import maintenance

WHOLE, PARTIAL, FAILED = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memos backup")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="the server's data_dir")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the backup: a directory that is not there yet")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the server's configuration; needed for a database")


def run(arguments: argparse.Namespace) -> int:
    root, target = (path.expanduser().absolute() for path in (arguments.data_dir, arguments.target))
    try:
        left_out = back_up(root, target, load(arguments.config).memory)
    except MemosError as error:
        print(f"memos backup: {error}", file=sys.stderr)
        return FAILED
    for text in left_out:
        print(f"memos backup: {text}", file=sys.stderr)
    print(f"backed up to {target}" + (", but not all" if left_out else ""))
    return PARTIAL if left_out else WHOLE


def back_up(root: Path, target: Path, memory: MemoryConfig) -> list[str]:
    """Makes the whole of ``target``, or nothing.

    Returns:
        What is not in it, in sentences.

    Raises:
        DataDirError: there is nothing to back up, or no room, or ``target`` is there already.
    """
    _check(root, target, memory)
    work = None
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        left_out = _fill(root, work, memory)
        _sync_tree(work)
        os.rename(work, target)
        sync(target.parent)
    except BaseException as error:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise DataDirError(f"{root} cannot be backed up to {target}: {error}") from error
        raise
    return left_out


def _check(root: Path, target: Path, memory: MemoryConfig) -> None:
    if not data_dir.was_used(root):
        raise DataDirError(f"{root} is no data_dir; name one that a server has used")
    if memory.store == "lmdb":
        maintenance.check_is_store(data_dir.memory_dir(root))
    if target.exists():
        raise DataDirError(f"{target} is there already; name a directory that is not")
    if target.resolve().is_relative_to(root.resolve()):
        raise DataDirError(f"{target} lies in the directory that it would be a backup of; name another one")


def _fill(root: Path, work: Path, memory: MemoryConfig) -> list[str]:
    left_out: list[str] = []
    for file in data_dir.small_files(root):
        shutil.copy2(file, work / file.name)  # with its time, from which a predictor's age is told
    if memory.store == "lmdb":
        maintenance.copy(data_dir.memory_dir(root), data_dir.memory_dir(work))
    else:
        left_out.append(
            "the memories are in PostgreSQL and not in this backup; 'pg_dump --schema=memos --format=custom "
            "--file=FILE', with the connection string of memory.dsn, backs them up"
        )
    if data_dir.adapters_dir(root).is_dir():
        missing = copy_registry(data_dir.adapters_dir(root), data_dir.adapters_dir(work))
        left_out += [f"adapter {name} has no files and is not in this backup" for name in missing]
    return left_out


def _sync_tree(path: Path) -> None:
    for folder, _, names in os.walk(path):
        for name in [*names, "."]:
            sync(Path(folder) / name)


if __name__ == "__main__":
    sys.exit(main())
