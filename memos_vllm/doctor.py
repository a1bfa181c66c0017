"""``memos doctor DATA_DIR``: whether what is stored agrees with itself.

    memos doctor DIR             looks at every entry of plaintext memory, at the index of KV files and their
                                 headers, and at every file of the adapters
    memos doctor DIR --repair    mends what can be mended; the server must not run
    memos doctor DIR --compact   rewrites the memory store without free pages; the server must not run
    memos doctor DIR --config FILE   the same where the server's configuration names a database

Exit status: 0 all is well (now), 1 something is wrong, 2 it could not be examined.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from memos_vllm import data_dir
from memos_vllm.adapters.examination import examine_adapters
from memos_vllm.config import MemoryConfig, MemosConfig, load
from memos_vllm.errors import DataDirError, DataDirInUse, MemosError
from memos_vllm.memory import maintenance
from memos_vllm.memory.checks import Problem, Report
from memos_vllm.memory.opening import open_store
from memos_vllm.store.examination import KVReport, examine_kv

CLEAN, PROBLEMS, FAILED = 0, 1, 2
_SHOWN = 20
"""Problems of one table that are printed; the rest is counted."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memos doctor")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="the server's data_dir")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the server's configuration; needed for a database")
    parser.add_argument("--repair", action="store_true", help="mend what can be mended")
    parser.add_argument("--compact", action="store_true", help="make the memory store as small as its content")


def run(arguments: argparse.Namespace) -> int:
    root = arguments.data_dir.expanduser().absolute()
    try:
        if not root.is_dir():
            raise DataDirError(f"there is no directory {root}; name the data_dir of a server")
        memory = load(arguments.config).memory
        if memory.store == "lmdb":
            maintenance.check_is_store(data_dir.memory_dir(root))
        if not (arguments.repair or arguments.compact):
            return _examine(root, memory)
        with data_dir.exclusive(root):
            status = _repair(root, memory) if arguments.repair else _examine(root, memory)
            if arguments.compact:
                _compact(root, memory, status)
            return status
    except DataDirInUse as error:
        print(f"memos doctor: {error}; only an examination may run beside it", file=sys.stderr)
    except MemosError as error:
        print(f"memos doctor: {error}", file=sys.stderr)
    return FAILED


def _examine(root: Path, memory: MemoryConfig) -> int:
    if memory.store == "lmdb":
        report = maintenance.examine(data_dir.memory_dir(root))
    else:
        with closing(_database(root, memory)) as store:
            report = maintenance.examine_open(store)
    return _show(root, report, examine_kv(root / "kv"))


def _repair(root: Path, memory: MemoryConfig) -> int:
    if memory.store == "lmdb":
        mended, report = maintenance.repair(data_dir.memory_dir(root), memory.max_map_bytes)
    else:
        with closing(_database(root, memory)) as store:
            mended, report = maintenance.repair_open(store, root)
    kv = examine_kv(root / "kv", repair=True)
    _print(mended, "mended: ")
    return _show(root, report, kv)


def _compact(root: Path, memory: MemoryConfig, status: int) -> None:
    if status != CLEAN:
        raise DataDirError("not compacted: something is wrong with the store; --repair it first")
    if memory.store == "lmdb":
        before, after = maintenance.compact(data_dir.memory_dir(root))
    else:
        with closing(_database(root, memory)) as store:
            before, after = store.compact()
    print(f"compacted: {before:,} bytes before, {after:,} now")


def _database(root: Path, memory: MemoryConfig) -> Any:
    return open_store(MemosConfig(data_dir=root, memory=memory), create=False)


def _show(root: Path, report: Report, kv: KVReport) -> int:
    adapters = examine_adapters(data_dir.adapters_dir(root))
    _print(report.problems)
    for line in kv.mended:
        print(f"mended: {line}")
    for line in kv.problems + adapters.problems:
        print(line)
    for line in kv.notes + adapters.notes:
        print(f"note: {line}")
    counts = ", ".join(f"{report.counts[table]:,} {table}" for table in sorted(report.counts))
    print(
        f"memory: {counts or 'nothing stored'}; kv: {kv.chunks:,} chunks, {kv.blocks:,} blocks; "
        f"adapters: {adapters.contents:,}"
    )
    num_problems = len(report.problems) + len(kv.problems) + len(adapters.problems)
    print("all is well" if not num_problems else f"{num_problems} problems")
    return PROBLEMS if num_problems else CLEAN


def _print(problems: Sequence[Problem], prefix: str = "") -> None:
    seen: Counter[str] = Counter()
    for problem in problems:
        seen[problem.table] += 1
        if seen[problem.table] <= _SHOWN:
            hint = "" if prefix else " (--repair can mend it)" if problem.repair else " (cannot be mended)"
            print(f"{prefix}{problem.table} {problem.where}: {problem.text}{hint}")
    for table, number in seen.items():
        if number > _SHOWN:
            print(f"{prefix}{table}: {number - _SHOWN} more")


if __name__ == "__main__":
    sys.exit(main())
