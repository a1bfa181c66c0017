"""What every store of plaintext memory does the same, whichever engine keeps it; the promise is in ``contract``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from itertools import islice
from typing import Any, ClassVar, NamedTuple, TypeVar

from memos_vllm.core.lifecycle import Aging
from memos_vllm.errors import StoreError, StoreUncertain
from memos_vllm.memory import holdings, records, tables
from memos_vllm.memory.contract import Tables, Transaction
from memos_vllm.memory.group_commit import GroupCommit, Write
from memos_vllm.memory.holdings import Holdings
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.types import MemoryId, Principal

T = TypeVar("T")


class StoreSize(NamedTuple):
    used_bytes: int
    """On disk, with what deletions left in it to be used again."""

    limit_bytes: int | None
    """Beyond which writes fail; None where the store knows of none."""


class Store(ABC):
    """One store, open in this process; thread-safe.

    Args:
        aging: when time moves memories; what is stored already follows at its next use.
    """

    engine_error: ClassVar[type[Exception]]

    def __init__(self, aging: Aging | None = None):
        self.aging = aging or Aging()
        self._dbs: Tables = {}
        self._writes = GroupCommit(self._commit)

    @abstractmethod
    def close(self) -> None:
        """Waits for the transactions of other threads."""

    @abstractmethod
    def stamp(self) -> int:
        """Another after every write, by whichever process."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Entries by kind, and ``file_bytes``: what they take on disk."""

    @abstractmethod
    def size(self) -> StoreSize:
        """Without counting entries: cheap also where ``stats`` is not."""

    @contextmanager
    def read(self, who: Principal) -> Iterator[UserReader]:
        """One user's memories as of now. A thread must not read or write within a read.

        Raises:
            StoreError: the engine failed.
        """
        with self._reading() as txn:
            yield UserReader(txn, self._dbs, who)

    def write(self, who: Principal, work: Callable[[UserWriter], T], *, frees: bool = False) -> T:
        """Runs ``work`` in a transaction; on return it is on disk, on any error none of it is.

        What ``work`` raises reaches this caller alone: other writes of the same commit stand.

        Args:
            work: may run in another writer's thread, and again where the engine needs it, so it must have no
                other effect.
            frees: it deletes, and may go beyond the limit of the store's size for that.

        Raises:
            StoreFull: there is no room.
            StoreError: the engine failed otherwise.
        """
        result: T = self._writes.submit(Write(who, work, self._limit_bytes(frees)))
        return result

    def due(self, now: datetime, limit: int) -> dict[Principal, list[MemoryId]]:
        """The memories, of all users, that time moves by now; at most ``limit``, the longest overdue first."""
        found: dict[Principal, list[MemoryId]] = {}
        end = tables.moment_key(now)
        with self._reading() as txn, txn.cursor(db=self._dbs["due"]) as cursor:
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
        with self._reading() as txn:
            return [
                (tables.decode_principal(raw), int.from_bytes(key[8:], "big"))
                for key, raw in txn.cursor(db=self._dbs["kv_removals"])
            ]

    def unrefined(self, limit: int) -> dict[Principal, list[MemoryId]]:
        """The memories, of all users, that wait for the refiner; at most ``limit``, each user's oldest first."""
        found: dict[Principal, list[MemoryId]] = {}
        with self._reading() as txn, txn.cursor(db=self._dbs["unrefined"]) as cursor:
            for key in islice(cursor.iternext(values=False), limit):
                raw = txn.get(key, db=self._dbs["records"])
                if raw is None:  # a damaged store, which ``memos doctor`` mends
                    continue
                record = records.decode(raw)
                found.setdefault(Principal(record.tenant, record.user), []).append(record.id)
        return found

    def users(self, tenant: str | None, after: bytes, limit: int) -> list[tuple[bytes, Principal, Holdings]]:
        """Users who have anything, with their place in the table, from the first one after the place ``after``.

        Args:
            tenant: None for all. A tenant's users come in the order in which they were first seen, so that who
                comes meanwhile stands at the end, and nobody is listed twice.
        """
        prefix = b"" if tenant is None else holdings.tenant_key(tenant)
        found: list[tuple[bytes, Principal, Holdings]] = []
        with self._reading() as txn, txn.cursor(db=self._dbs["users"]) as cursor:
            is_there = cursor.set_range(max(prefix, after + b"\0" if after else b""))
            while is_there and len(found) < limit and cursor.key().startswith(prefix):
                with suppress(ValueError):  # a damaged store, which ``memos doctor`` mends
                    found.append((bytes(cursor.key()), *holdings.decode(cursor.value())))
                is_there = cursor.next()
        return found

    def examine(self, work: Callable[[Transaction, Tables], T]) -> T:
        """Runs ``work``, which changes nothing, on all users' tables as of now; errors as ``read``."""
        with self._reading() as txn:
            return work(txn, self._dbs)

    def maintain(self, work: Callable[[Transaction, Tables], T]) -> T:
        """Runs ``work`` on all users' tables in one transaction; errors as ``write``."""

        def attempt() -> T:
            with self._begin(write=True) as txn:
                return work(txn, self._dbs)

        try:
            return self._attempt(self._limit_bytes(frees=True), attempt)
        except self.engine_error as error:
            raise self._failed(error) from error

    @abstractmethod
    def _begin(self, *, write: bool = False) -> AbstractContextManager[Transaction]:
        """Commits at its end, on an error it takes all back. Raises ``engine_error``."""

    @abstractmethod
    def _child(self, txn: Transaction) -> AbstractContextManager[Transaction]:
        """A part of a write, which an error takes back without the rest."""

    @abstractmethod
    def _attempt(self, limit_bytes: int, attempt: Callable[[], T]) -> T:
        """Runs a write, again where that may help. Raises ``engine_error`` or ``StoreError``."""

    @abstractmethod
    def _limit_bytes(self, frees: bool) -> int:
        """How large the store may be after a write."""

    @abstractmethod
    def _failed(self, error: Exception, reading: bool = False) -> StoreError:
        """What to tell of an ``engine_error``."""

    @contextmanager
    def _reading(self) -> Iterator[Transaction]:
        try:
            with self._begin() as txn:
                yield txn
        except self.engine_error as error:
            raise self._failed(error, reading=True) from error

    def _commit(self, group: Sequence[Write]) -> None:
        """One transaction for all; where that fails, one for each, so that a failure has one owner."""
        if len(group) > 1:
            try:
                self._commit_together(group)
                return
            except StoreUncertain as error:  # again could be twice
                for write in group:
                    write.finish(error=error)
                return
            except (StoreError, self.engine_error):
                pass  # said again below, to whom it belongs
        for write in group:
            try:
                write.finish(self._attempt(write.limit_bytes, lambda write=write: self._try_write(write)))
            except self.engine_error as error:
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
                        with self._child(txn) as child:
                            outcome = self._run(child, write)
                        outcomes.append((outcome, None))
                    except self.engine_error:
                        raise
                    except Exception as error:
                        outcomes.append((None, error))
            return outcomes

        outcomes = self._attempt(min(write.limit_bytes for write in group), attempt)
        for write, (result, error) in zip(group, outcomes, strict=True):
            write.finish(result, error)

    def _try_write(self, write: Write) -> Any:
        with self._begin(write=True) as txn:
            return self._run(txn, write)

    def _run(self, txn: Transaction, write: Write) -> Any:
        user = UserWriter(txn, self._dbs, write.who, self.aging)
        result = write.work(user)
        user.finish()
        return result
