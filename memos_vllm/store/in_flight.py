"""Operations that the workers have and some rank has not reported yet, and which blocks they bring to the GPU."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

from memos_vllm.store.copy_totals import ROUTES, CopyTotals, Route, TransferTotals, route_of
from memos_vllm.store.disk_index import PlannedChunk
from memos_vllm.store.ops import Load, Op, Read, Result, Write
from memos_vllm.types import BlockKey

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OpProgress:
    """One operation on all ranks: what was planned, and what the ranks have said of it."""

    operation: Op
    keys: tuple[BlockKey, ...]
    planned: PlannedChunk | None = None
    """Of a Write."""
    tag: bytes = b""
    promoted: bool = False
    """A Read that fills host slots too."""
    ranks_left: int = 0
    errors: list[str] = field(default_factory=list)
    corrupt: bool = False
    checksum_failed: bool = False
    no_space: bool = False
    unreadable: bool = False
    size_bytes: int = 0
    seconds: float = 0.0
    """Of the slowest rank so far."""
    is_hurried: bool = False

    @property
    def is_prefetch(self) -> bool:
        return isinstance(self.operation, Load | Read) and self.operation.prefetch

    def add(self, result: Result) -> None:
        """A rank reports."""
        self.ranks_left -= 1
        self.size_bytes += result.nbytes
        self.seconds = max(self.seconds, result.seconds)
        if not result.ok:
            self.errors.append(result.error or "unknown error")
            self.corrupt |= result.corrupt
            self.checksum_failed |= result.checksum_failed
            self.no_space |= result.no_space
            self.unreadable |= result.unreadable


class InFlight:
    """
    Args:
        world_size: how many ranks report each operation.
        totals: of the tier manager; what failed is counted here.
    """

    def __init__(self, world_size: int, totals: TransferTotals) -> None:
        self.copies: dict[Route, CopyTotals] = {route: CopyTotals() for route in ROUTES}
        self._world_size = world_size
        self._totals = totals
        self._op_ids = itertools.count(1)
        self._pending: dict[int, OpProgress] = {}
        self._loading: Counter[BlockKey] = Counter()
        self._prefetching: Counter[BlockKey] = Counter()

    def __len__(self) -> int:
        return len(self._pending)

    def brings(self, key: BlockKey) -> bool:
        """Whether a copy of the block to the GPU is under way."""
        return key in self._loading or key in self._prefetching

    def is_loading(self, key: BlockKey) -> bool:
        """Whether one is that a request waits for."""
        return key in self._loading

    def is_prefetching(self, key: BlockKey) -> bool:
        """Whether one is that no request waits for."""
        return key in self._prefetching

    def blocks_of(self, op_id: int) -> tuple[int, ...]:
        """The GPU blocks of a Load, Read or Save under way."""
        operation = self._pending[op_id].operation
        assert not isinstance(operation, Write)
        return operation.block_ids

    def new_id(self) -> int:
        """For an operation that is then started."""
        return next(self._op_ids)

    def start(self, progress: OpProgress) -> None:
        """The operation goes to every rank."""
        progress.ranks_left = self._world_size
        self._pending[progress.operation.op_id] = progress
        if isinstance(progress.operation, Load | Read):
            self._on_their_way(progress.operation).update(progress.keys)

    def hurry(self, keys: Set[BlockKey]) -> list[int]:
        """Prefetches of these keys for which a request has begun to wait, each named once."""
        hurried = [
            progress
            for progress in self._pending.values()
            if not progress.is_hurried and progress.is_prefetch and not keys.isdisjoint(progress.keys)
        ]
        for progress in hurried:
            progress.is_hurried = True
        return [progress.operation.op_id for progress in hurried]

    def take(self, results: Iterable[Result]) -> Iterator[OpProgress]:
        """The operations that have ended with these results on every rank, one after the other."""
        for result in results:
            progress = self._pending[result.op_id]
            progress.add(result)
            if progress.ranks_left:
                continue
            del self._pending[result.op_id]
            if isinstance(progress.operation, Load | Read):
                self._arrived(progress.operation, progress.keys)
            self._count(progress)
            if progress.errors:
                logger.warning("%s failed: %s", type(progress.operation).__name__, progress.errors[0])
            yield progress

    def check_integrity(self) -> None:
        """Asserts that blocks are on their way only with an operation."""
        if not self._pending:
            assert not self._loading and not self._prefetching

    def _on_their_way(self, operation: Load | Read) -> Counter[BlockKey]:
        return self._prefetching if operation.prefetch else self._loading

    def _arrived(self, operation: Load | Read, keys: Iterable[BlockKey]) -> None:
        on_their_way = self._on_their_way(operation)
        for key in keys:
            on_their_way[key] -= 1
            if not on_their_way[key]:
                del on_their_way[key]

    def _count(self, progress: OpProgress) -> None:
        copies = self.copies[route_of(progress.operation)]
        copies.size_bytes += progress.size_bytes
        copies.seconds += progress.seconds
        copies.failed_ops += bool(progress.errors)
        self._totals.failed_ops += bool(progress.errors)
        self._totals.corrupt_files += progress.corrupt
        self._totals.checksum_failures += progress.checksum_failed
