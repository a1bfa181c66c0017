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
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

from memos_vllm.store import tags
from memos_vllm.store.copy_totals import TransferTotals
from memos_vllm.store.disk_index import DiskIndex
from memos_vllm.store.host_pool import SlotState, SlotTable
from memos_vllm.store.in_flight import InFlight, OpProgress
from memos_vllm.store.ops import Load, Op, Read, Result, Save, Write
from memos_vllm.types import BlockKey


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
        self.chunk_blocks = chunk_blocks
        self._block_bytes = block_bytes
        self._in_flight = InFlight(world_size, self.totals)
        self.copies = self._in_flight.copies
        self._host_tags: dict[BlockKey, bytes] = {}
        self._forgotten: set[bytes] = set()

    # -- lookup ---------------------------------------------------------------------------------

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """Longest prefix of ``keys`` in any tier. Changes nothing."""
        pending = self.pending(keys)
        if pending is Pending.LOAD:
            keys = keys[:1]
        num_blocks = num_host = 0
        for key in keys:
            if self.slots.lookup(key) is not None:
                num_host += 1
            elif self.disk is None or self.disk.lookup(key) is None:
                break
            num_blocks += 1
        return Match(num_blocks, num_host, pending)

    def pending(self, keys: Sequence[BlockKey]) -> Pending:
        """Whether the first of ``keys`` is on its way to the GPU, at the cost of one look whatever their number."""
        if keys and self._in_flight.is_loading(keys[0]):
            return Pending.LOAD
        if keys and self._in_flight.is_prefetching(keys[0]):
            return Pending.PREFETCH
        return Pending.NO

    def holds(self, key: BlockKey) -> bool:
        """Whether a tier has the block, ready to be loaded."""
        return self.match([key]).num_blocks == 1

    def is_on_its_way(self, key: BlockKey) -> bool:
        """Whether a copy of the block to the GPU is under way."""
        return self._in_flight.brings(key)

    def blocks_of(self, op_id: int) -> tuple[int, ...]:
        """The GPU blocks that a copy under way reads or writes."""
        return self._in_flight.blocks_of(op_id)

    def hurry(self, keys: Set[BlockKey]) -> list[int]:
        """Prefetches of these keys for which a request has begun to wait, each named once."""
        return self._in_flight.hurry(keys)

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

    def plan_load(
        self,
        keys: Sequence[BlockKey],
        block_ids: Sequence[int],
        *,
        prefetch: bool = False,
        in_groups: bool = False,
    ) -> list[Op]:
        """Copies ``keys``, all matched just now, into GPU blocks. The caller holds the blocks.

        Args:
            prefetch: no request waits for them; the copies go behind those that one waits for, and evict nothing
                from the host.
            in_groups: what comes from the host may come in groups of layers.
        """
        assert len(keys) == len(block_ids) and not (prefetch and in_groups)
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
                operations.append(self._plan_part(source, part_keys, part_blocks, prefetch, in_groups))
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

    def _plan_part(
        self, chunk: str, keys: tuple[BlockKey, ...], block_ids: tuple[int, ...], prefetch: bool, in_groups: bool
    ) -> Op:
        op_id = self._in_flight.new_id()
        operation: Op
        if not chunk:
            slots = tuple(slot for key in keys if (slot := self.slots.lookup(key)) is not None)
            operation = Load(op_id, slots, block_ids, prefetch=prefetch, in_groups=in_groups)
            self._in_flight.start(OpProgress(operation, keys))
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
        self._in_flight.start(OpProgress(operation, keys, tag=self.disk.tag_of(chunk), promoted=promoted is not None))
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
            operation = Save(
                op_id=self._in_flight.new_id(), block_ids=tuple(block for _, block in part), slots=tuple(slots)
            )
            self._in_flight.start(OpProgress(operation, part_keys, tag=tag))
            operations.append(operation)
        return operations

    # -- completion -----------------------------------------------------------------------------

    def complete(self, results: Iterable[Result]) -> tuple[Completion, list[Op]]:
        """Takes the workers' results; returns what they released and the operations that follow."""
        released: list[int] = []
        follow_up: list[Op] = []
        finished: set[int] = set()
        failed: set[int] = set()
        for ended in self._in_flight.take(results):
            finished.add(ended.operation.op_id)
            if ended.errors:
                failed.add(ended.operation.op_id)
            match ended.operation:
                case Save() as save:
                    released.extend(save.block_ids)
                    follow_up.extend(self._saved(ended, save))
                case Write():
                    self._written(ended)
                case Load():
                    self._loaded(ended)
                case Read() as read:
                    self._read(ended, read)
        return Completion(released, finished, failed), follow_up

    def _saved(self, ended: OpProgress, save: Save) -> list[Op]:
        if ended.errors or self.is_forgotten(ended.tag):
            self.slots.abort(ended.keys)
            return []
        self.slots.commit(ended.keys)
        self._tag_host_copies(ended.keys, ended.tag)
        self.totals.saved_blocks += len(ended.keys)
        if self.disk is None:
            return []
        size_bytes, last_use = len(ended.keys) * self._block_bytes, self.slots.last_use(ended.keys[0])
        planned = self.disk.plan_write(ended.keys, size_bytes, ended.tag, last_use)
        if planned is None:
            self.totals.skipped_blocks += len(ended.keys)
            return []
        self.slots.pin(ended.keys)
        write = Write(
            op_id=self._in_flight.new_id(), chunk=planned.chunk, path=planned.path, slots=save.slots, keys=ended.keys
        )
        self._in_flight.start(OpProgress(write, ended.keys, planned=planned, tag=ended.tag))
        return [write]

    def _written(self, ended: OpProgress) -> None:
        assert self.disk is not None and ended.planned is not None
        last_use = self.slots.last_use(ended.keys[0])
        self.slots.unpin(ended.keys)
        if ended.errors or self.is_forgotten(ended.tag):
            self.disk.abort(ended.planned.chunk, no_space=ended.no_space)
        else:
            self.disk.commit(ended.planned.chunk, last_use)
            self.totals.written_blocks += len(ended.keys)

    def _loaded(self, ended: OpProgress) -> None:
        self.slots.unpin(ended.keys)
        if ended.errors:
            self.slots.drop(ended.keys)
        else:
            self.totals.loaded_host_blocks += len(ended.keys)

    def _read(self, ended: OpProgress, read: Read) -> None:
        assert self.disk is not None
        self.disk.unpin(read.chunk)
        if ended.promoted:
            if ended.errors or self.is_forgotten(ended.tag):
                self.slots.abort(ended.keys)
            else:
                self.slots.commit(ended.keys)
                self._tag_host_copies(ended.keys, ended.tag)
        if ended.corrupt:
            self.disk.drop(read.chunk)  # it is built again
        elif ended.unreadable:
            self.disk.read_failed(read.chunk)
        elif not ended.errors:
            self.disk.read_succeeded(read.chunk)
            self.totals.loaded_disk_blocks += len(ended.keys)

    def _tag_host_copies(self, keys: Sequence[BlockKey], tag: bytes) -> None:
        self._host_tags.update(dict.fromkeys(keys, tag))
        if len(self._host_tags) > 2 * self.slots.num_slots:  # most of it was evicted since
            self._host_tags = {
                key: of for key, of in self._host_tags.items() if self.slots.state(key) is not SlotState.ABSENT
            }

    # -- control --------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Of one block over all ranks."""
        return self._block_bytes

    @property
    def num_in_flight(self) -> int:
        """Operations that some rank has not reported yet."""
        return len(self._in_flight)

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
        self._in_flight.check_integrity()


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """Blocks that a deletion removed, per tier."""

    host_blocks: int
    disk_blocks: int
    removal: Future[list[str]] | None = field(default=None, compare=False)
    """Done when the files are gone for good; None without a disk tier."""
