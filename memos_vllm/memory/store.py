"""Plaintext memory on disk: one LMDB environment, the single source of truth; see ``contract`` for what it promises.

Any number of threads and processes may read and write. A write returns once its LMDB transaction is
synced; writes of several threads at the same time share a transaction (``group_commit``). The map
starts small and doubles when it is full, up to a maximum.

LMDB cannot resize its map while this process has transactions open, so transactions hold the
``Gate`` shared and a resize holds it alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from memos_vllm.core.lifecycle import Aging
from memos_vllm.errors import DataDirError, StoreError, StoreFull
from memos_vllm.memory import environment, migrations, tables
from memos_vllm.memory.abstract_store import Store, StoreSize
from memos_vllm.memory.gate import Gate
from memos_vllm.memory.transactions import UserWriter
from memos_vllm.types import Principal

FIRST_MAP_BYTES = 64 * 2**20
MIN_MAP_BYTES = 2**20

DELETE_RESERVE_BYTES = 2**20
"""A deletion may go this far beyond the maximum: LMDB writes copies of pages before it frees any,
and a full store that cannot delete could never be anything else."""

LOW_DISK_BYTES = 2**20
T = TypeVar("T")


class MemoryStore(Store):
    """Opens or creates the environment in a directory.

    Args:
        path: the directory, created if it is missing.
        max_map_bytes: how large the map may grow, at least ``MIN_MAP_BYTES``.
        aging: when time moves memories; what is stored already follows at its next use.

    Raises:
        DataDirError: no such directory can be made or written, this process has it open already,
            it is damaged, or a newer Memos wrote it.
    """

    engine_error = lmdb.Error

    def __init__(self, path: Path, max_map_bytes: int, aging: Aging | None = None):
        super().__init__(aging)
        self._path = path
        self._max_map_bytes = max(max_map_bytes, MIN_MAP_BYTES)
        self._gate = Gate()
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
        with self._gate.alone():
            self._env.close()

    def write(self, who: Principal, work: Callable[[UserWriter], T], *, frees: bool = False) -> T:
        try:
            return super().write(who, work, frees=frees)
        finally:
            if frees:
                self._shrink_to_maximum()

    def stamp(self) -> int:
        with self._gate.shared():
            return self._env.info()["last_txnid"]

    def stats(self) -> dict[str, int]:
        """Entries, and bytes of the map and of the pages in use or freed for reuse."""
        with self._begin() as txn:
            entries = {name: txn.stat(db)["entries"] for name, db in self._dbs.items()}
            map_bytes = self._env.info()["map_size"]
        return {
            "users": entries["owners"],
            "memories": entries["records"],
            "versions": entries["versions"],
            "sessions": entries["sessions"],
            "links": entries["links"],
            "snapshots": entries["snapshots"],
            "kv_removals": entries["kv_removals"],
            "file_bytes": self.size().used_bytes,
            "map_bytes": map_bytes,
            "max_map_bytes": self._max_map_bytes,
        }

    def size(self) -> StoreSize:
        with self._gate.shared():
            used_bytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        return StoreSize(used_bytes, self._max_map_bytes)

    def _attempt(self, limit_bytes: int, attempt: Callable[[], T]) -> T:
        """Attempts again with a larger map, as long as it may grow."""
        while True:
            try:
                return attempt()
            except lmdb.MapFullError as error:
                self._grow(limit_bytes, error)

    def _child(self, txn: lmdb.Transaction) -> lmdb.Transaction:
        return self._env.begin(write=True, parent=txn)

    def _limit_bytes(self, frees: bool) -> int:
        return self._max_map_bytes + (DELETE_RESERVE_BYTES if frees else 0)

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

    def _failed(self, error: Exception, reading: bool = False) -> StoreError:
        if reading:
            return StoreError(f"the memory store {self._path} cannot be read: {error}")
        # LMDB reports a disk that fills up within a write as an input/output error.
        if isinstance(error, lmdb.DiskError) or shutil.disk_usage(self._path).free < LOW_DISK_BYTES:
            return StoreFull(f"the disk of {self._path} is full and nothing of this write was stored; free some space")
        return StoreError(f"the memory store {self._path} failed and nothing of this write was stored: {error}")

    def _open_tables(self) -> dict[str, Any]:
        """Creates them on the first start, and brings those of an earlier version up to this one's schema."""
        return self._attempt(self._max_map_bytes, self._try_open_tables)

    def _try_open_tables(self) -> dict[str, Any]:
        with self._begin(write=True) as txn:
            dbs = {
                name: self._env.open_db(name.encode(), txn, dupsort=name in tables.SEVERAL_VALUES)
                for name in tables.NAMES
            }
            migrations.migrate(txn, dbs, self._path, self.aging)
        return dbs
