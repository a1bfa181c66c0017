"""The worker side's engine: does what the scheduler side says, reports when it is done.

    Load   host slots --link--> GPU
    Read   file --I/O threads, checksums--> host slots or staging --link--> GPU
           (past the slots and with blocks in CPU memory: straight into the blocks, if their fragments are long)
    Save   GPU --link--> host slots
    Write  host slots --I/O thread--> file

Everything moves in pieces. Between two pieces a Load or Read goes first, so it never waits for a
whole Save or Write. Memory beyond the host slots is bounded: the link's ring on the device and, for
Reads that go past the host slots, ``io_threads + 1`` pieces.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from functools import partial

from memos_vllm.store.host_memory import HostMemory, arrays, tensors
from memos_vllm.store.identity import KVIdentity
from memos_vllm.store.jobs import Copy, Job, Steps
from memos_vllm.store.kv_file import (
    ChunkReader,
    items_per_piece,
    items_per_step,
    parts_of,
    pieces,
    write_chunk_in_pieces,
)
from memos_vllm.store.layered_load import GroupTask, LayeredLoad
from memos_vllm.store.link import Link
from memos_vllm.store.ops import Load, Op, Read, Result, Save, Write, path_for_rank
from memos_vllm.store.pipeline import Event, Landed
from memos_vllm.store.staging import Staging
from memos_vllm.store.task_queue import Priority, TaskQueue

__all__ = ["Load", "Op", "Read", "Result", "Save", "TransferWorker", "Write"]

logger = logging.getLogger(__name__)

PREFETCH_SHARE = 0.05
"""Of a core's time, while requests run on the same cores: a prefetch is to make their steps no longer than by that."""

PREFETCH_PIECE_BYTES = 2**20
"""On the same cores too: a step that meets a piece waits until it has ended, a fraction of a millisecond."""


class TransferWorker:
    """Copies of one rank. Its methods are for one thread (vLLM's worker); they never wait for a copy.

    Args:
        link: to the KV cache; the worker closes it.
        num_slots: host slots; allocated as they are used.
        io_threads: for files. With two or more, one stays free of Writes.
        pin_memory: page-lock the host slots (with a GPU).
    """

    def __init__(
        self, link: Link, num_slots: int, identity: KVIdentity, rank: int, io_threads: int, pin_memory: bool
    ) -> None:
        self.identity, self.rank = identity, rank
        self.row_bytes = link.row_bytes
        self._link = link
        self._host = HostMemory(num_slots, self.row_bytes, pin_memory, link.device)
        piece_rows = items_per_piece(self.row_bytes)
        self._link_rows = link.piece_blocks or piece_rows  # of a piece that goes from or to the host slots
        staged_rows = min(piece_rows, items_per_step(self.row_bytes)) if link.in_place else piece_rows
        self._staging = Staging(io_threads + 1, staged_rows, self.row_bytes, pin_memory, link.device)
        self._results: deque[Result] = deque()
        self._in_flight = 0
        self._writes_in_flight = 0
        self._closed = False
        self._prefetches: dict[int, Job] = {}
        self._layered: dict[int, LayeredLoad] = {}
        self._begun: set[int] = set()
        self._changed = threading.Condition()  # of the seven above
        self._io_threads = io_threads
        shares = {Priority.PREFETCH: PREFETCH_SHARE} if link.in_place else {}
        self._loads = TaskQueue(f"memos-load-{rank}", 1, shares=shares)
        # One copy at a time where a copy is work for the cores that the forward pass needs. On a device
        # each direction has its own thread: a save that waits for a pass must not hold up a load.
        self._saves = self._loads if link.in_place else TaskQueue(f"memos-save-{rank}", 1)
        self._files = TaskQueue(f"memos-io-{rank}", io_threads, {Priority.WRITE: max(1, io_threads - 1)}, shares)

    def submit(self, ops: Sequence[Op], after: Event | None = None) -> None:
        """Starts operations; each yields one Result.

        Args:
            after: recorded behind the work that fills the blocks of Saves and that last used the
                blocks of Loads and Reads. Not needed on CPU.
        """
        layered = [op for op in ops if isinstance(op, Load) and op.in_groups and self._link.layers]
        for op in ops:
            with self._changed:
                assert not self._closed, "submit after shutdown"
                self._in_flight += 1
                self._writes_in_flight += isinstance(op, Write)
            match op:
                case Load() if op in layered:
                    pass
                case Load():
                    job = self._loading(op, num_tasks=1)
                    priority = Priority.PREFETCH if op.prefetch else Priority.LOAD
                    self._loads.put(priority, Steps(job, self._load(op, job, after)))
                case Save():
                    job = Job(op, self.row_bytes, 1, self._report)
                    self._saves.put(Priority.SAVE, Steps(job, self._save(op, job, after)))
                case Read():
                    self._start_read(op, after)
                case Write():
                    job = Job(op, self.row_bytes, 1, self._report)
                    self._files.put(Priority.WRITE, Steps(job, self._write(op, job)))

        if layered:
            self._start_layered(layered, after)

    def _start_layered(self, ops: Sequence[Load], after: Event | None) -> None:
        """The first layers of all these blocks, then the next, in pieces of as many bytes as those of whole blocks."""
        groups = self._link.layers
        num_blocks = sum(len(op.block_ids) for op in ops)
        loads = [
            LayeredLoad(
                op,
                Job(op, self.row_bytes, len(groups), self._report, len(groups), len(op.block_ids) / num_blocks),
                len(groups),
                partial(self._first_landed, op.op_id),
            )
            for op in ops
        ]
        with self._changed:
            self._layered.update((load.op.op_id, load) for load in loads)
        for number, group in enumerate(groups):
            piece_blocks = max(1, self._link_rows * self.row_bytes // group.row_bytes)
            issue = partial(self._issue_group, number, after)
            self._loads.put(Priority.LOAD, GroupTask(loads, number, piece_blocks, issue))

    def _issue_group(
        self, group: int, after: Event | None, slots: Sequence[int], block_ids: Sequence[int], landed: Landed
    ) -> Event | None:
        return self._link.load(self._host.groups(slots), block_ids, after, landed, group)

    def _first_landed(self, op_id: int) -> None:
        with self._changed:
            self._begun.add(op_id)
            self._changed.notify_all()

    def take_begun(self) -> set[int]:
        """Loads in groups of layers whose first group has landed since the last call.

        Their blocks may be used by a pass that asks ``wait_for_layers`` for each group before it needs it.
        """
        with self._changed:
            begun, self._begun = self._begun, set()
            return begun

    def wait_for_layers(self, op_id: int, group: int) -> list[Event]:
        """Blocks until a group of a load was given to the device; what a stream that needs it has to wait for.

        Nothing if the load has ended and ``drain`` has returned its Result.

        Raises:
            RuntimeError: the load has failed.
        """
        with self._changed:
            load = self._layered.get(op_id)
        return [] if load is None else load.wait(group)

    def _loading(self, op: Load | Read, num_tasks: int) -> Job:
        job = Job(op, self.row_bytes, num_tasks, self._report)
        if op.prefetch:
            with self._changed:
                self._prefetches[op.op_id] = job
        return job

    def hurry(self, op_ids: Collection[int]) -> None:
        """A request waits for these prefetches now: from their next piece on they go like what was asked for it."""
        with self._changed:
            for job in [self._prefetches[op_id] for op_id in op_ids if op_id in self._prefetches]:
                job.is_hurried = True
        self._files.hurry(op_ids, Priority.READ)
        self._loads.hurry(op_ids, Priority.LOAD)

    def pace(self, on: bool) -> None:
        """Whether requests are running, which prefetches are not to hold up where they share the cores."""
        for queue in (self._loads, self._files):
            queue.pace(on)

    def drain(self) -> list[Result]:
        """Results since the last call."""
        with self._changed:
            results = list(self._results)
            self._results.clear()
            for result in results:
                self._layered.pop(result.op_id, None)
            self._in_flight -= len(results)
            return results

    def wait(self, timeout_s: float) -> bool:
        """Until ``drain`` or ``take_begun`` has something to return.

        False after ``timeout_s``, or at once if nothing is in flight.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._results or self._begun or not self._in_flight, timeout_s)
            return bool(self._results or self._begun)

    @property
    def in_flight(self) -> int:
        """Operations whose Result ``drain`` has not returned yet."""
        with self._changed:
            return self._in_flight

    def shutdown(self, flush_timeout_s: float) -> None:
        """Finishes Writes for up to ``flush_timeout_s``, fails what is left, ends the threads. May be called twice.

        Results can still be drained.
        """
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._writes_in_flight, flush_timeout_s)
        self._staging.close()
        self._link.refuse()  # a device that does not answer keeps the threads of the queues in it
        ended = [queue.stop(timeout_s=5.0) for queue in {self._files, self._loads, self._saves}]
        ended.append(self._link.close(timeout_s=5.0))
        if all(ended):
            self._host.close()
            self._staging.unpin()
        else:
            logger.warning(
                "a copy did not end within 5 s of the shutdown; its memory is left to the end of the process"
            )

    # One generator per kind. Each `yield` lets others go first.

    def _load(self, op: Load, job: Job, after: Event | None) -> Generator[None, None, None]:
        step = self._most_rows(op) or self._link_rows
        for slots, block_ids in _slices(op, step):
            if job.failed:
                return
            copy = partial(self._link.load, self._host.groups(slots), block_ids, after)
            Copy(copy, job.piece(block_ids)).step()
            yield

    def _save(self, op: Save, job: Job, after: Event | None) -> Generator[None, None, None]:
        for slots, block_ids in _slices(op, self._link_rows):
            if job.failed:
                return
            copy = partial(self._link.save, block_ids, self._host.groups(slots), after)
            Copy(copy, job.piece(block_ids)).step()
            yield

    def _write(self, op: Write, job: Job) -> Generator[None, None, None]:
        rows = tensors(self._host.groups(op.slots))
        path = path_for_rank(op.path, self.rank)
        done = 0
        for count in write_chunk_in_pieces(path, rows, op.keys, self.identity, self.rank):
            job.moved(op.slots[done : done + count])
            done += count
            yield

    def _start_read(self, op: Read, after: Event | None) -> None:
        """Several threads share the pieces of a Read: one core cannot check as fast as a good disk reads."""
        slots = op.slots if op.slots is not None else (None,) * len(op.block_ids)
        rows = list(zip(op.positions, op.keys, op.block_ids, slots, strict=True))
        parts = list(pieces(rows, self.row_bytes, self._most_rows(op)))
        num_tasks = max(1, min(self._io_threads, len(parts)))
        job = self._loading(op, num_tasks)
        source = iter(parts)
        priority = Priority.PREFETCH if op.prefetch else Priority.READ
        for _ in range(num_tasks):
            self._files.put(priority, Steps(job, self._read(op, job, source, after)))

    def _most_rows(self, op: Load | Read) -> int | None:
        """In a piece, beyond what its bytes allow anyway."""
        if op.prefetch and self._link.in_place:
            return max(1, PREFETCH_PIECE_BYTES // self.row_bytes)
        return None

    def _read(self, op: Read, job: Job, source: Iterator, after: Event | None) -> Generator[None, None, None]:
        with ChunkReader(path_for_rank(op.path, self.rank), self.identity, self.rank) as reader:
            reader.check(op.positions, op.keys)
            # A list's iterator: `next` is atomic, each piece goes to one thread.
            for piece in source:
                if job.failed:
                    return
                self._read_piece(op, job, reader, piece, after)
                yield

    def _read_piece(self, op: Read, job: Job, reader: ChunkReader, piece: Sequence, after: Event | None) -> None:
        positions, keys, block_ids, slots = zip(*piece, strict=True)
        if op.slots is None and (memory := self._link.memory(block_ids)) is not None:
            # One pass. Nobody finds a block before the Result, and what a failed one holds is computed again.
            reader.read(positions, keys, memory)
            job.moved(block_ids)
            return
        if self._link.in_place:
            self._read_in_steps(op, job, reader, piece, after)
            return
        staged = self._staging.take(len(piece)) if op.slots is None else None
        try:
            groups = self._host.groups(slots) if staged is None else staged.groups
            reader.read(positions, keys, [[row] for row in arrays(groups)])
        except BaseException:
            if staged is not None:
                staged.free()
            raise
        # Verified: only from here on may the bytes reach a GPU block.
        landed = job.piece(block_ids, None if staged is None else staged.free)
        copy = Copy(partial(self._link.load, groups, block_ids, after), landed, op.op_id)
        self._loads.put(Priority.PREFETCH if op.prefetch else Priority.LOAD, copy)
        if job.is_hurried:  # asked now that it is in the queue, where a later ``hurry`` finds it
            self._loads.hurry((op.op_id,), Priority.LOAD)

    def _read_in_steps(self, op: Read, job: Job, reader: ChunkReader, piece: Sequence, after: Event | None) -> None:
        """In steps that stay in the core's cache from the read over the check to the copy, all in this thread: one
        that only hands on would be one more that wants a core."""
        step = items_per_step(self.row_bytes)
        staged = self._staging.take(min(step, len(piece))) if op.slots is None else None
        try:
            for rows in parts_of(piece, step):
                if job.failed:
                    return
                positions, keys, block_ids, slots = zip(*rows, strict=True)
                groups = self._host.groups(slots) if staged is None else staged.first(len(rows))
                reader.read(positions, keys, [[row] for row in arrays(groups)])
                Copy(partial(self._link.load, groups, block_ids, after), job.piece(block_ids)).step()
        finally:
            if staged is not None:
                staged.free()

    def _report(self, op: Op, result: Result) -> None:
        with self._changed:
            self._results.append(result)
            self._writes_in_flight -= isinstance(op, Write)
            self._prefetches.pop(op.op_id, None)
            self._begun.discard(op.op_id)
            self._changed.notify_all()


def _slices(op: Load | Save, step: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Slots and blocks, at most ``step`` of each."""
    assert len(op.slots) == len(op.block_ids)
    return zip(parts_of(op.slots, step), parts_of(op.block_ids, step), strict=True)
