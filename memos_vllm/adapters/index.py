"""The index of adapters, in LMDB: one file for all tables, so that what belongs together is written together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lmdb

from memos_vllm.adapters import names, numbers, profiles, provenance
from memos_vllm.adapters.names import Names
from memos_vllm.adapters.numbers import Numbers
from memos_vllm.adapters.profiles import Profiles
from memos_vllm.adapters.provenance import Provenance
from memos_vllm.errors import StoreError

_MAP_BYTES = 2**30
_TABLES = (names.TABLE, numbers.TABLE, profiles.TABLE, provenance.TABLE)
_T = TypeVar("_T")


class Index:
    """Any number of processes may have it open. ``lmdb.Error`` and ``OSError`` where it cannot be opened."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._env = lmdb.open(str(folder), map_size=_MAP_BYTES, max_dbs=len(_TABLES), mode=0o600)
        self.names = Names(self._env)
        self.numbers = Numbers(self._env)
        self.profiles = Profiles(self._env)
        self.provenance = Provenance(self._env)

    def read(self) -> lmdb.Transaction:
        """A context manager."""
        return self._env.begin()

    def write(self, work: Callable[[lmdb.Transaction], _T]) -> _T:
        """All that ``work`` writes is synced on return, or nothing of it is there.

        Raises:
            StoreError: it was not written.
        """
        try:
            with self._env.begin(write=True) as txn:
                return work(txn)
        except lmdb.Error as error:
            raise StoreError(f"the index of adapters {self._folder} was not written: {error}") from error

    def stamp(self) -> int:
        """Changes whenever any process has written."""
        return int(self._env.info()["last_txnid"])

    def close(self) -> None:
        self._env.close()
