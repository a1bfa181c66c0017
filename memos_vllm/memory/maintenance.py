"""Work on a whole store: examine it, mend it, copy it, make its file as small as its content."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import lmdb

from memos_vllm.core.lifecycle import Aging
from memos_vllm.durable import sync
from memos_vllm.errors import DataDirError
from memos_vllm.memory import environment
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.checks import Problem, Report
from memos_vllm.memory.contract import Tables, Transaction
from memos_vllm.memory.integrity import Examination
from memos_vllm.memory.records import utc_now
from memos_vllm.memory.store import MemoryStore

_REPAIR_ROUNDS = 40
"""One table at a time, and then a new look: a record that is taken out leaves a session that holds it."""


def examine(path: Path) -> Report:
    """Looks at every entry; changes nothing, and may run beside a server.

    Raises:
        DataDirError: there is no store, or another version wrote it.
    """
    with closing(environment.open_for_reading(path)) as env:
        try:
            with env.begin() as txn:
                dbs = environment.tables_of(env, txn, path)
                return Examination(txn, dbs, _nothing_is_taken_out, Aging()).run()
        except lmdb.Error as error:
            raise environment.unusable(path, error) from error


def examine_open(store: Store) -> Report:
    """Like ``examine``, of a store that is open."""
    return store.examine(lambda txn, dbs: Examination(txn, dbs, _nothing_is_taken_out, store.aging).run())


def check_is_store(path: Path) -> None:
    """
    Raises:
        DataDirError: there is no store in the directory, not even a damaged one.
    """
    environment.check_is_store(path)


def repair(path: Path, max_map_bytes: int) -> tuple[list[Problem], Report]:
    """Mends what can be mended of the store in a directory; see ``repair_open``.

    Raises:
        DataDirError: there is none, or it cannot be opened.
    """
    environment.check_is_store(path)
    with closing(MemoryStore(path, max_map_bytes)) as store:
        return repair_open(store, path)


def repair_open(store: Store, aside: Path) -> tuple[list[Problem], Report]:
    """Mends what can be mended, a table in a transaction.

    What a record or a session held that cannot be read goes to ``taken-out-*.jsonl`` in the folder ``aside``.

    Returns:
        What was mended, and what an examination finds now.
    """
    mended: list[Problem] = []
    for _ in range(_REPAIR_ROUNDS):
        repaired = store.maintain(partial(_mend, aside, store.aging))
        mended += repaired
        if not repaired:
            break
    return mended, examine_open(store)


def _mend(aside: Path, aging: Aging, txn: Transaction, dbs: Tables) -> list[Problem]:
    taken_out: list[str] = []

    def keep_aside(table: str, key: bytes, raw: bytes) -> None:
        taken_out.append(json.dumps({"table": table, "key": key.hex(), "value": raw.decode("latin-1")}))

    problems = Examination(txn, dbs, keep_aside, aging).run().problems
    first = next((problem.table for problem in problems if problem.repair), None)
    repairable = [problem for problem in problems if problem.repair and problem.table == first]
    for problem in repairable:
        assert problem.repair
        problem.repair(txn)
    if taken_out:  # on disk before it leaves the store
        _write_synced(aside / f"taken-out-{utc_now():%Y%m%dT%H%M%S%f}.jsonl", taken_out)
    return repairable


def copy(path: Path, target: Path) -> Path:
    """The store as of one moment, without free pages; any version's, also beside a server, which may write.

    Args:
        target: a directory that is not there yet, and is not after an error.

    Returns:
        The new file, synced.

    Raises:
        DataDirError: no store, or no room for the copy.
    """
    with closing(environment.open_for_reading(path)) as env:
        try:
            target.mkdir(mode=0o700)
            env.copy(str(target), compact=True)
            new = target / environment.DATA_FILE
            os.chmod(new, 0o600)
            sync(new)
        except (lmdb.Error, OSError) as error:
            shutil.rmtree(target, ignore_errors=True)
            raise environment.unusable(path, error) from error
    return new


def compact(path: Path) -> tuple[int, int]:
    """Rewrites the file without free pages, and puts the new one in its place at once.

    Nobody else may have the store open: who has keeps the old file, and what he writes is lost.

    Returns:
        Bytes before and after.

    Raises:
        DataDirError: no store, or no room for the copy; the old file is then as it was.
    """
    data, work = path / environment.DATA_FILE, path / "compact.tmp"
    shutil.rmtree(work, ignore_errors=True)
    new = copy(path, work)
    try:
        before, after = data.stat().st_size, new.stat().st_size
        os.replace(new, data)
        sync(path)
    except OSError as error:
        raise DataDirError(f"the compacted copy could not be put in place of {data}: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return before, after


def _nothing_is_taken_out(table: str, key: bytes, raw: bytes) -> None:
    raise AssertionError("an examination changed something")


def _write_synced(path: Path, lines: list[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)
