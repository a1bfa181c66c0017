"""Plaintext memory on disk: one LMDB environment, the single source of truth.

Any number of threads and processes may read and write. A write returns once its LMDB transaction is
synced; writes of several threads at the same time share a transaction (``group_commit``). The map
starts small and doubles when it is full, up to a maximum.

LMDB cannot resize its map while this process has transactions open, so transactions hold the
``Gate`` shared and a resize holds it alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from memos_vllm.core.lifecycle import Aging
from memos_vllm.errors import DataDirError, StoreError, StoreFull
from memos_vllm.memory import environment, migrations, records, tables
from memos_vllm.memory.gate import Gate
from memos_vllm.memory.group_commit import GroupCommit, Write
from memos_vllm.memory.transactions import Tables, UserReader, UserWriter
from memos_vllm.types import MemoryId, Principal

FIRST_MAP_BYTES = 64 * 2**20
MIN_MAP_BYTES = 2**20

DELETE_RESERVE_BYTES = 2**20
"""A deletion may go this far beyond the maximum: LMDB writes copies of pages before it frees any,
and a full store that cannot delete could never be anything else."""

LOW_DISK_BYTES = 2**20
T = TypeVar("T")


class MemoryStore:
    """Opens or creates the environment in a directory.

    Args:
        path: the directory, created if it is missing.
        max_map_bytes: how large the map may grow, at least ``MIN_MAP_BYTES``.
        aging: when time moves memories; what is stored already follows at its next use.

    Raises:
        DataDirError: no such directory can be made or written, this process has it open already,
            it is damaged, or a newer Memos wrote it.
    """

    def __init__(self, path: Path, max_map_bytes: int, aging: Aging | None = None):
        self._path = path
        self._max_map_bytes = max(max_map_bytes, MIN_MAP_BYTES)
        self.aging = aging or Aging()
        self._gate = Gate()
        self._writes = GroupCommit(self._commit)
        self._pid = os.getpid()
        self._env = environment.open_for_writing(path, min(FIRST_MAP_BYTES, self._max_map_bytes))
        try:
            self._env.reader_check()  # slots of processes that were killed
            self._dbs = self._open_tables()
        except StoreFull as error:
            self._env.close()
            raise DataDirError(f"the memory map of {path} is full; raise memory.max_map_bytes") from error
        except (lmdb.Error, OSError) as error:
            self._env.close()
            raise environment.unusable(path, error) from error
        except DataDirError:
            self._env.close()
            raise

    def close(self) -> None:
        """Waits for the transactions of other threads."""
        with self._gate.alone():
            self._env.close()

    @contextmanager
    def read(self, who: Principal) -> Iterator[UserReader]:
        """One user's memories as of now. A thread must not read or write within a read.

        Raises:
            StoreError: LMDB failed.
        """
        try:
            with self._begin() as txn:
                yield UserReader(txn, self._dbs, who)
        except lmdb.Error as error:
            raise StoreError(f"the memory store {self._path} cannot be read: {error}") from error

    def write(self, who: Principal, work: Callable[[UserWriter], T], *, frees: bool = False) -> T:
        """Runs ``work`` in a transaction; on return it is on disk, on any error none of it is.

        What ``work`` raises reaches this caller alone: other writes of the same commit stand.

        Args:
            work: may run in another writer's thread, and again where the map has to grow, so it must
                have no other effect.
            frees: it deletes, and may use ``DELETE_RESERVE_BYTES``.

        Raises:
            StoreFull: the map is at its maximum, or the disk is full.
            StoreError: LMDB failed otherwise.
        """
        limit_bytes = self._max_map_bytes + (DELETE_RESERVE_BYTES if frees else 0)
        try:
            result: T = self._writes.submit(Write(who, work, limit_bytes))
            return result
        finally:
            if frees:
                self._shrink_to_maximum()

    def stamp(self) -> int:
        """Another after every write, by whichever process."""
        with self._gate.shared():
            return self._env.info()["last_txnid"]

    def due(self, now: datetime, limit: int) -> dict[Principal, list[MemoryId]]:
        """The memories, of all users, that time moves by now; at most ``limit``, the longest overdue first."""
        found: dict[Principal, list[MemoryId]] = {}
        end = tables.moment_key(now)
        with self._begin() as txn, txn.cursor(db=self._dbs["due"]) as cursor:
            for key in islice(cursor.iternext(values=False), limit):
                if key[:8] > end:
                    break
                raw = txn.get(key[8:], db=self._dbs["records"])
                if raw is None:  # a damaged store, which ``memos doctor`` mends; the others must not wait for that
                    continue
                record = records.decode(raw)
                found.setdefault(Principal(record.tenant, record.user), []).append(record.id)
        return found

    def kv_removals(self) -> list[tuple[Principal, int]]:
        """Users and their past KV epochs whose KV may still be somewhere."""
        with self._begin() as txn:
            return [
                (tables.decode_principal(raw), int.from_bytes(key[8:], "big"))
                for key, raw in txn.cursor(db=self._dbs["kv_removals"])
            ]

    def unrefined(self, limit: int) -> dict[Principal, list[MemoryId]]:
        """The memories, of all users, that wait for the refiner; at most ``limit``, each user's oldest first."""
        found: dict[Principal, list[MemoryId]] = {}
        with self._begin() as txn, txn.cursor(db=self._dbs["unrefined"]) as cursor:
            for key in islice(cursor.iternext(values=False), limit):
                raw = txn.get(key, db=self._dbs["records"])
                if raw is None:  # a damaged store, which ``memos doctor`` mends
                    continue
                record = records.decode(raw)
                found.setdefault(Principal(record.tenant, record.user), []).append(record.id)
        return found

    def maintain(self, work: Callable[[lmdb.Transaction, Tables], T]) -> T:
        """Runs ``work`` on all users' tables in one transaction; errors as ``write``."""

        def attempt() -> T:
            with self._begin(write=True) as txn:
                return work(txn, self._dbs)

        try:
            return self._grown(self._max_map_bytes + DELETE_RESERVE_BYTES, attempt)
        except lmdb.Error as error:
            raise self._failed(error) from error

    def stats(self) -> dict[str, int]:
        """Entries, and bytes of the map and of the pages in use or freed for reuse."""
        with self._begin() as txn:
            entries = {name: txn.stat(db)["entries"] for name, db in self._dbs.items()}
            info = self._env.info()
            page_bytes = self._env.stat()["psize"]
        return {
            "users": entries["owners"],
            "memories": entries["records"],
            "versions": entries["versions"],
            "sessions": entries["sessions"],
            "links": entries["links"],
            "snapshots": entries["snapshots"],
            "kv_removals": entries["kv_removals"],
            "file_bytes": (info["last_pgno"] + 1) * page_bytes,
            "map_bytes": info["map_size"],
            "max_map_bytes": self._max_map_bytes,
        }

    def _commit(self, group: Sequence[Write]) -> None:
        """One transaction for all; where that fails, one for each, so that a failure has one owner."""
        if len(group) > 1:
            try:
                self._commit_together(group)
                return
            except (StoreError, lmdb.Error):
                pass  # said again below, to whom it belongs
        for write in group:
            try:
                write.finish(self._grown(write.limit_bytes, lambda write=write: self._try_write(write)))
            except lmdb.Error as error:
                failure = self._failed(error)
                failure.__cause__ = error
                write.finish(error=failure)
            except Exception as error:
                write.finish(error=error)

    def _commit_together(self, group: Sequence[Write]) -> None:
        """Each write in a child transaction, which its error takes back without the others."""

        def attempt() -> list[tuple[Any, Exception | None]]:
            outcomes: list[tuple[Any, Exception | None]] = []
            with self._begin(write=True) as txn:
                for write in group:
                    try:
                        with self._env.begin(write=True, parent=txn) as child:
                            outcomes.append((self._run(child, write), None))
                    except lmdb.Error:
                        raise
                    except Exception as error:
                        outcomes.append((None, error))
            return outcomes

        outcomes = self._grown(min(write.limit_bytes for write in group), attempt)
        for write, (result, error) in zip(group, outcomes, strict=True):
            write.finish(result, error)

    def _grown(self, limit_bytes: int, attempt: Callable[[], T]) -> T:
        """Attempts again with a larger map, as long as it may grow."""
        while True:
            try:
                return attempt()
            except lmdb.MapFullError as error:
                self._grow(limit_bytes, error)

    def _try_write(self, write: Write) -> Any:
        with self._begin(write=True) as txn:
            return self._run(txn, write)

    def _run(self, txn: lmdb.Transaction, write: Write) -> Any:
        user = UserWriter(txn, self._dbs, write.who, self.aging)
        result = write.work(user)
        user.finish()
        return result

    @contextmanager
    def _begin(self, *, write: bool = False) -> Iterator[lmdb.Transaction]:
        assert os.getpid() == self._pid, "an LMDB environment does not survive a fork; open the store in the child"
        while True:
            with self._gate.shared():
                try:
                    txn = self._env.begin(write=write)
                except lmdb.MapResizedError:
                    txn = None
                if txn is not None:
                    with txn:
                        yield txn
                    return
            with self._gate.alone():
                self._env.set_mapsize(0)  # another process grew the map: adopt its size

    def _grow(self, limit_bytes: int, error: lmdb.MapFullError) -> None:
        """Doubles the map, up to the limit."""
        with self._gate.alone():
            map_bytes = self._env.info()["map_size"]
            if map_bytes >= limit_bytes:
                raise StoreFull(
                    f"the memory store {self._path} is full at {self._max_map_bytes} bytes and nothing of this write "
                    "was stored; delete memories or raise memory.max_map_bytes"
                ) from error
            self._env.set_mapsize(environment.whole_pages(min(2 * map_bytes, limit_bytes)))

    def _shrink_to_maximum(self) -> None:
        """Takes the reserve back; LMDB keeps what is in use."""
        if self._env.info()["map_size"] > self._max_map_bytes:
            with self._gate.alone():
                self._env.set_mapsize(environment.whole_pages(self._max_map_bytes))

    def _failed(self, error: lmdb.Error) -> StoreError:
        # LMDB reports a disk that fills up within a write as an input/output error.
        if isinstance(error, lmdb.DiskError) or shutil.disk_usage(self._path).free < LOW_DISK_BYTES:
            return StoreFull(f"the disk of {self._path} is full and nothing of this write was stored; free some space")
        return StoreError(f"the memory store {self._path} failed and nothing of this write was stored: {error}")

    def _open_tables(self) -> dict[str, Any]:
        """Creates them on the first start, and brings those of an earlier version up to this one's schema."""
        return self._grown(self._max_map_bytes, self._try_open_tables)

    def _try_open_tables(self) -> dict[str, Any]:
        with self._begin(write=True) as txn:
            dbs = {
                name: self._env.open_db(name.encode(), txn, dupsort=name in tables.SEVERAL_VALUES)
                for name in tables.NAMES
            }
            migrations.migrate(txn, dbs, self._path, self.aging)
        return dbs
