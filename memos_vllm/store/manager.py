"""The tier manager: which KV block is where off the GPU, and which copies are under way.

It lives in the scheduler process, is called from the engine's loop only, and knows neither vLLM nor
memory contents: it turns "these keys are in these GPU blocks" into operations for the workers
(``store.transfer``) and their results into state. The algorithm, in the order of a block's life:

    match      longest prefix of keys that some tier holds
    plan_load  pin the copies, emit Load / Read                (state: loading)
    plan_save  reserve host slots, emit Save                   (state: WRITING in the host table)
    complete   of a Save: host READY, emit Write to disk; of a Write: on disk; of a Load: unpin

Planning a load or a save is a use of all its blocks, also of those that a tier has already, and of a prefix the last
block counts as used first. So eviction shortens a prefix from its end, in whatever order the copies end.

Invariants: a copy that is being read or written is never reused; a block is visible to ``match``
only after its copy finished on every rank; results are counted to ``world_size``.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

from memos_vllm.store import tags
from memos_vllm.store.copy_totals import ROUTES, CopyTotals, Route, route_of
from memos_vllm.store.disk_index import DiskIndex, PlannedChunk
from memos_vllm.store.host_pool import SlotState, SlotTable
from memos_vllm.store.ops import Load, Op, Read, Result, Save, Write
from memos_vllm.types import BlockKey

logger = logging.getLogger(__name__)


class Pending(Enum):
    NO = auto()
    LOAD = auto()
    """For a request; it will be in the GPU's prefix cache soon."""
    PREFETCH = auto()
    """For no request; others may overtake it."""


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a list of keys is off the GPU and ready, counted in blocks from the first key.

    While a request loads the first key (``Pending.LOAD``), that one alone is counted: whoever asks has to wait, and
    asks again in every step.
    """

    num_blocks: int
    num_host_blocks: int
    pending: Pending
    """Whether the first key is on its way to the GPU already."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a batch of results released."""

    released_blocks: list[int]
    """GPU block ids that a finished Save no longer reads."""

    finished_ops: set[int]
    """Operations that ended on every rank, well or not."""

    failed_ops: set[int]
    """Those of them that failed on some rank."""


@dataclass(slots=True)
class _Pending:
    """One operation on all ranks."""

    operation: Op
    keys: tuple[BlockKey, ...]
    planned: PlannedChunk | None = None
    tag: bytes = b""
    promoted: bool = False
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


@dataclass(slots=True)
class TransferTotals:
    """Counters since the start, summed over ranks."""

    saved_blocks: int = 0
    loaded_host_blocks: int = 0
    loaded_disk_blocks: int = 0
    written_blocks: int = 0
    failed_ops: int = 0
    skipped_blocks: int = 0
    """Blocks that were not saved because no tier had room for them."""
    corrupt_files: int = 0
    """Chunks whose file was damaged, foreign or gone on some rank."""
    checksum_failures: int = 0
    """Those of them in which a block's checksum did not match."""


class TierManager:
    """See the module's docstring.

    Args:
        slots: host tier.
        disk: disk tier, or None if it is switched off.
        chunk_blocks: blocks per chunk, at least 1.
        block_bytes: bytes of one block over all ranks, for the disk budget.
        world_size: how many ranks report each operation.
    """

    def __init__(
        self, slots: SlotTable, disk: DiskIndex | None, chunk_blocks: int, block_bytes: int, world_size: int
    ) -> None:
        assert chunk_blocks >= 1 and world_size >= 1
        self.slots = slots
        self.disk = disk
        if disk is not None:  # a chunk is as old as the host copies that it was written from
            slots.clock = disk.clock
        self.totals = TransferTotals()
        self.copies: dict[Route, CopyTotals] = {route: CopyTotals() for route in ROUTES}
        self.chunk_blocks = chunk_blocks
        self._block_bytes = block_bytes
        self._world_size = world_size
        self._op_ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._loading: Counter[BlockKey] = Counter()
        self._prefetching: Counter[BlockKey] = Counter()
        self._host_tags: dict[BlockKey, bytes] = {}
        self._forgotten: set[bytes] = set()

    # -- lookup ---------------------------------------------------------------------------------

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """Longest prefix of ``keys`` in any tier. Changes nothing."""
        pending = Pending.NO
        if keys and keys[0] in self._loading:
            pending = Pending.LOAD
            keys = keys[:1]
        elif keys and keys[0] in self._prefetching:
            pending = Pending.PREFETCH
        num_blocks = num_host = 0
        for key in keys:
            if self.slots.lookup(key) is not None:
                num_host += 1
            elif self.disk is None or self.disk.lookup(key) is None:
                break
            num_blocks += 1
        return Match(num_blocks, num_host, pending)

    def holds(self, key: BlockKey) -> bool:
        """Whether a tier has the block, ready to be loaded."""
        return self.match([key]).num_blocks == 1

    def is_on_its_way(self, key: BlockKey) -> bool:
        """Whether a copy of the block to the GPU is under way."""
        return key in self._loading or key in self._prefetching

    def hurry(self, keys: Iterable[BlockKey]) -> list[int]:
        """Prefetches of these keys for which a request has begun to wait, each named once."""
        keys = set(keys)
        hurried = [
            pending
            for pending in self._pending.values()
            if not pending.is_hurried and pending.is_prefetch and not keys.isdisjoint(pending.keys)
        ]
        for pending in hurried:
            pending.is_hurried = True
        return [pending.operation.op_id for pending in hurried]

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Counts as one use of a prefix, in every tier, the first block as the latest."""
        touched = None
        for key in reversed(keys):
            self.slots.touch((key,))
            location = None if self.disk is None else self.disk.lookup(key)
            if self.disk is not None and location is not None and location.chunk != touched:
                touched = location.chunk
                self.disk.touch(touched)

    # -- load -----------------------------------------------------------------------------------

    @contextmanager
    def keeping(self, keys: Iterable[BlockKey]) -> Iterator[None]:
        """Host copies of these keys stay until the end of the block.

        For several loads that were matched together: a ``Read`` of the first makes room in the host for its own
        blocks, and could take it from the second. They are one use, too, not one after the other.
        """
        keys = list(keys)
        with self._pinned(keys):
            yield
        self.touch(keys)

    @contextmanager
    def _pinned(self, keys: Iterable[BlockKey]) -> Iterator[None]:
        held = [key for key in keys if self.slots.lookup(key) is not None]
        self.slots.pin(held)
        try:
            yield
        finally:
            self.slots.unpin(held)

    def plan_load(self, keys: Sequence[BlockKey], block_ids: Sequence[int], *, prefetch: bool = False) -> list[Op]:
        """Copies ``keys``, all matched just now, into GPU blocks. The caller holds the blocks.

        Args:
            prefetch: no request waits for them; the copies go behind those that one waits for, and evict nothing
                from the host.
        """
        assert len(keys) == len(block_ids)
        operations: list[Op] = []
        sources = [(self._source(key), key, block) for key, block in zip(keys, block_ids, strict=True)]
        # All of them before the first Read makes room in the host for its own blocks.
        self.slots.pin([key for source, key, _ in sources if not source])
        for source, group in itertools.groupby(sources, lambda item: item[0]):
            pairs = [(key, block) for _, key, block in group]
            for start in range(0, len(pairs), self.chunk_blocks):
                part = pairs[start : start + self.chunk_blocks]
                part_keys = tuple(key for key, _ in part)
                part_blocks = tuple(block for _, block in part)
                operations.append(self._plan_part(source, part_keys, part_blocks, prefetch))
        (self._prefetching if prefetch else self._loading).update(keys)
        self.touch(keys)
        return operations

    def _source(self, key: BlockKey) -> str:
        """A chunk's id, or "" for the host tier."""
        if self.slots.lookup(key) is not None:
            return ""
        assert self.disk is not None
        location = self.disk.lookup(key)
        assert location is not None, "a key must be matched in the same step in which it is loaded"
        return location.chunk

    def _plan_part(self, chunk: str, keys: tuple[BlockKey, ...], block_ids: tuple[int, ...], prefetch: bool) -> Op:
        op_id = next(self._op_ids)
        operation: Op
        if not chunk:
            slots = tuple(slot for key in keys if (slot := self.slots.lookup(key)) is not None)
            operation = Load(op_id=op_id, slots=slots, block_ids=block_ids, prefetch=prefetch)
            self._start(_Pending(operation, keys))
            return operation
        assert self.disk is not None
        self.disk.pin(chunk)
        locations = [self.disk.lookup(key) for key in keys]
        positions = tuple(location.position for location in locations if location is not None)
        # A key of an earlier part of this load may be on its way into the host already.
        absent = all(self.slots.state(key) is SlotState.ABSENT for key in keys)
        # A guess takes free slots only: what is in the others may be what requests are about to load.
        promoted = self.slots.reserve(keys, evict=not prefetch) if absent else None
        operation = Read(
            op_id=op_id,
            chunk=chunk,
            path=self.disk.path_of(chunk),
            positions=positions,
            keys=keys,
            block_ids=block_ids,
            slots=None if promoted is None else tuple(promoted),
            prefetch=prefetch,
        )
        self._start(_Pending(operation, keys, tag=self.disk.tag_of(chunk), promoted=promoted is not None))
        return operation

    # -- save -----------------------------------------------------------------------------------

    def plan_save(self, keys: Sequence[BlockKey], block_ids: Sequence[int], tag: bytes) -> list[Op]:
        """Copies GPU blocks to the host, in prefix order, as far as there is room.

        What a tier already holds is left out, and was used: requests find it on the GPU and ask no tier for it. The
        caller must hold the GPU blocks named by the operations until ``complete`` releases them.
        """
        if self.disk is not None:
            self.disk.keep_reserve()
        if self.is_forgotten(tag):
            return []
        self.touch(keys)  # what is held of the prefix leaves last when room is made for the rest
        with self._pinned(key for key in keys if self.disk is None or self.disk.lookup(key) is None):
            operations = self._plan_saves(keys, block_ids, tag)
        if operations:
            self.touch(keys)
        return operations

    def _plan_saves(self, keys: Sequence[BlockKey], block_ids: Sequence[int], tag: bytes) -> list[Op]:
        fresh = [
            (key, block)
            for key, block in dict(zip(keys, block_ids, strict=True)).items()
            if self.slots.state(key) is SlotState.ABSENT and (self.disk is None or key not in self.disk)
        ]
        operations: list[Op] = []
        for start in range(0, len(fresh), self.chunk_blocks):
            part = fresh[start : start + self.chunk_blocks]
            part_keys = tuple(key for key, _ in part)
            slots = self.slots.reserve(part_keys)
            if slots is None:
                self.totals.skipped_blocks += len(fresh) - start
                break
            operation = Save(op_id=next(self._op_ids), block_ids=tuple(block for _, block in part), slots=tuple(slots))
            self._start(_Pending(operation, part_keys, tag=tag))
            operations.append(operation)
        return operations

    # -- completion -----------------------------------------------------------------------------

    def complete(self, results: Iterable[Result]) -> tuple[Completion, list[Op]]:
        """Takes the workers' results; returns what they released and the operations that follow."""
        released: list[int] = []
        follow_up: list[Op] = []
        finished: set[int] = set()
        failed: set[int] = set()
        for result in results:
            pending = self._pending[result.op_id]
            pending.ranks_left -= 1
            pending.size_bytes += result.nbytes
            pending.seconds = max(pending.seconds, result.seconds)
            if not result.ok:
                pending.errors.append(result.error or "unknown error")
                pending.corrupt |= result.corrupt
                pending.checksum_failed |= result.checksum_failed
                pending.no_space |= result.no_space
                pending.unreadable |= result.unreadable
            if pending.ranks_left:
                continue
            del self._pending[result.op_id]
            finished.add(result.op_id)
            self._count_copy(pending)
            if pending.errors:
                failed.add(result.op_id)
                self.totals.failed_ops += 1
                logger.warning("%s failed: %s", type(pending.operation).__name__, pending.errors[0])
            match pending.operation:
                case Save() as save:
                    released.extend(save.block_ids)
                    follow_up.extend(self._saved(pending, save))
                case Write():
                    self._written(pending)
                case Load() as load:
                    self._loaded(pending, load)
                case Read() as read:
                    self._read(pending, read)
        return Completion(released, finished, failed), follow_up

    def _count_copy(self, pending: _Pending) -> None:
        copies = self.copies[route_of(pending.operation)]
        copies.size_bytes += pending.size_bytes
        copies.seconds += pending.seconds
        copies.failed_ops += bool(pending.errors)
        self.totals.corrupt_files += pending.corrupt
        self.totals.checksum_failures += pending.checksum_failed

    def _saved(self, pending: _Pending, save: Save) -> list[Op]:
        if pending.errors or self.is_forgotten(pending.tag):
            self.slots.abort(pending.keys)
            return []
        self.slots.commit(pending.keys)
        self._tag_host_copies(pending.keys, pending.tag)
        self.totals.saved_blocks += len(pending.keys)
        if self.disk is None:
            return []
        size_bytes, last_use = len(pending.keys) * self._block_bytes, self.slots.last_use(pending.keys[0])
        planned = self.disk.plan_write(pending.keys, size_bytes, pending.tag, last_use)
        if planned is None:
            self.totals.skipped_blocks += len(pending.keys)
            return []
        self.slots.pin(pending.keys)
        write = Write(
            op_id=next(self._op_ids), chunk=planned.chunk, path=planned.path, slots=save.slots, keys=pending.keys
        )
        self._start(_Pending(write, pending.keys, planned=planned, tag=pending.tag))
        return [write]

    def _written(self, pending: _Pending) -> None:
        assert self.disk is not None and pending.planned is not None
        last_use = self.slots.last_use(pending.keys[0])
        self.slots.unpin(pending.keys)
        if pending.errors or self.is_forgotten(pending.tag):
            self.disk.abort(pending.planned.chunk, no_space=pending.no_space)
        else:
            self.disk.commit(pending.planned.chunk, last_use)
            self.totals.written_blocks += len(pending.keys)

    def _loaded(self, pending: _Pending, load: Load) -> None:
        self.slots.unpin(pending.keys)
        self._not_loading(pending.keys, prefetch=load.prefetch)
        if pending.errors:
            self.slots.drop(pending.keys)
        else:
            self.totals.loaded_host_blocks += len(pending.keys)

    def _read(self, pending: _Pending, read: Read) -> None:
        assert self.disk is not None
        self.disk.unpin(read.chunk)
        self._not_loading(pending.keys, prefetch=read.prefetch)
        if pending.promoted:
            if pending.errors or self.is_forgotten(pending.tag):
                self.slots.abort(pending.keys)
            else:
                self.slots.commit(pending.keys)
                self._tag_host_copies(pending.keys, pending.tag)
        if pending.corrupt:
            self.disk.drop(read.chunk)  # it is built again
        elif pending.unreadable:
            self.disk.read_failed(read.chunk)
        elif not pending.errors:
            self.disk.read_succeeded(read.chunk)
            self.totals.loaded_disk_blocks += len(pending.keys)

    def _tag_host_copies(self, keys: Sequence[BlockKey], tag: bytes) -> None:
        self._host_tags.update(dict.fromkeys(keys, tag))
        if len(self._host_tags) > 2 * self.slots.num_slots:  # most of it was evicted since
            self._host_tags = {
                key: of for key, of in self._host_tags.items() if self.slots.state(key) is not SlotState.ABSENT
            }

    def _not_loading(self, keys: Sequence[BlockKey], *, prefetch: bool) -> None:
        loading = self._prefetching if prefetch else self._loading
        for key in keys:
            loading[key] -= 1
            if not loading[key]:
                del loading[key]

    def _start(self, pending: _Pending) -> None:
        pending.ranks_left = self._world_size
        self._pending[pending.operation.op_id] = pending

    # -- control --------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Of one block over all ranks."""
        return self._block_bytes

    @property
    def num_in_flight(self) -> int:
        """Operations that some rank has not reported yet."""
        return len(self._pending)

    def drop_host(self) -> None:
        """Empties the host tier of all that is not being copied."""
        self.slots.clear()

    def forget(self, tag: bytes) -> ForgetReport:
        """Removes every copy with this tag from host and disk, and refuses later ones. Files go in a thread.

        Copies under way are removed when they end. The tag belongs to a salt that is never used
        again, so remembering it costs 32 bytes per deletion until the server restarts.
        """
        self._forgotten.add(tag)
        gone = tags.with_part(self._host_tags.values(), tag)
        dropped = self.slots.drop([key for key, of in self._host_tags.items() if of in gone])
        on_disk = self.disk.drop_tag(tag) if self.disk is not None else None
        num_host_blocks = dropped.freed + dropped.doomed
        if on_disk is None:
            return ForgetReport(num_host_blocks, 0, None)
        return ForgetReport(num_host_blocks, on_disk.blocks, on_disk.removal)

    def is_forgotten(self, tag: bytes) -> bool:
        """Whether a deletion named this tag; a request that still runs under it leaves nothing behind."""
        return not tags.parts(tag).isdisjoint(self._forgotten)

    def check_integrity(self) -> None:
        """Asserts conservation; at idle nothing is pinned and nothing is being written."""
        self.slots.check_integrity()
        if not self._pending:
            assert not self._loading and not self._prefetching


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """Blocks that a deletion removed, per tier."""

    host_blocks: int
    disk_blocks: int
    removal: Future[list[str]] | None = field(default=None, compare=False)
    """Done when the files are gone for good; None without a disk tier."""
