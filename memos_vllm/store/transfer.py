"""The worker side's engine: does what the scheduler side says, reports when it is done.

    Load   host slots --copy thread--> GPU
    Read   file --I/O thread, checksums--> host slots or staging --copy thread--> GPU
    Save   GPU --copy thread--> host slots
    Write  host slots --I/O thread--> file

Everything moves in pieces of about 8 MiB. Between two pieces a Load or Read goes first, so it never
waits for a whole Save or Write. Memory beyond the host slots is bounded: one staging buffer on the
device and, for Reads that go past the host slots, ``io_threads + 1`` pieces.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from memos_vllm.errors import KVChecksumMismatch, KVFileError
from memos_vllm.kernels.kv_copy import block_bytes
from memos_vllm.store.host_memory import HostMemory, tensors
from memos_vllm.store.identity import KVIdentity
from memos_vllm.store.kv_file import PIECE_BYTES, ChunkReader, pieces, write_chunk_in_pieces
from memos_vllm.store.link import link_for
from memos_vllm.store.ops import Load, Op, Read, Result, Save, Write, path_for_rank
from memos_vllm.store.staging import StagedRows, Staging
from memos_vllm.store.task_queue import Priority, Task, TaskQueue

__all__ = ["Load", "Op", "Read", "Result", "Save", "TransferWorker", "Write"]

logger = logging.getLogger(__name__)

_EXPECTED = (KVFileError, OSError, MemoryError)


class TransferWorker:
    """Copies of one rank. Its methods are for one thread (vLLM's worker); they never wait for a copy.

    Args:
        planes: KV cache views, see ``kv_copy.planes_of``.
        num_slots: host slots; allocated as they are used.
        io_threads: for files. With two or more, one stays free of Writes.
        pin_memory: page-lock the host slots (with a GPU).
    """

    def __init__(
        self,
        planes: Sequence[Tensor],
        num_slots: int,
        identity: KVIdentity,
        rank: int,
        io_threads: int,
        pin_memory: bool,
    ) -> None:
        self.identity, self.rank = identity, rank
        self.block_bytes = block_bytes(planes)
        piece_blocks = max(1, PIECE_BYTES // self.block_bytes)
        self._link = link_for(planes, piece_blocks)
        self._host = HostMemory(num_slots, self.block_bytes, pin_memory, self._link.device)
        self._staging = Staging(io_threads + 1, piece_blocks, self.block_bytes, pin_memory, self._link.device)
        self._results: deque[Result] = deque()
        self._in_flight = 0
        self._writes_in_flight = 0
        self._closed = False
        self._changed = threading.Condition()  # of the four above
        self._copies = TaskQueue(f"memos-copy-{rank}", 1)
        self._files = TaskQueue(f"memos-io-{rank}", io_threads, {Priority.WRITE: max(1, io_threads - 1)})

    def submit(self, ops: Sequence[Op], after: torch.cuda.Event | None = None) -> None:
        """Starts operations; each yields one Result.

        Args:
            after: recorded behind the work that fills the blocks of Saves and that last used the
                blocks of Loads and Reads. Not needed on CPU.
        """
        for op in ops:
            with self._changed:
                assert not self._closed, "submit after shutdown"
                self._in_flight += 1
                self._writes_in_flight += isinstance(op, Write)
            job = _Job(op, self.block_bytes, self._report)
            match op:
                case Load():
                    self._copies.put(
                        Priority.PREFETCH if op.prefetch else Priority.LOAD, _Steps(job, self._load(op, after))
                    )
                case Read():
                    self._files.put(
                        Priority.PREFETCH if op.prefetch else Priority.READ, _Steps(job, self._read(op, job, after))
                    )
                case Save():
                    self._copies.put(Priority.SAVE, _Steps(job, self._save(op, after)))
                case Write():
                    self._files.put(Priority.WRITE, _Steps(job, self._write(op)))

    def drain(self) -> list[Result]:
        """Results since the last call."""
        with self._changed:
            results = list(self._results)
            self._results.clear()
            self._in_flight -= len(results)
            return results

    def wait(self, timeout_s: float) -> bool:
        """Until ``drain`` has something to return; False after ``timeout_s``, or at once if nothing is in flight."""
        with self._changed:
            self._changed.wait_for(lambda: self._results or not self._in_flight, timeout_s)
            return bool(self._results)

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
        ended = [queue.stop(timeout_s=5.0) for queue in (self._files, self._copies)]
        if all(ended):
            self._host.close()
            self._staging.unpin()
        else:
            logger.warning(
                "a copy did not end within 5 s of the shutdown; its memory is left to the end of the process"
            )

    # One generator per kind. Each `yield` ends a piece and says how many blocks are through.

    def _load(self, op: Load, after: torch.cuda.Event | None) -> Generator[int, None, None]:
        for pairs in pieces(list(zip(op.slots, op.block_ids, strict=True)), self.block_bytes):
            slots, block_ids = zip(*pairs, strict=True)
            self._link.load(self._host.groups(slots), block_ids, after)
            yield len(block_ids)

    def _save(self, op: Save, after: torch.cuda.Event | None) -> Generator[int, None, None]:
        for pairs in pieces(list(zip(op.block_ids, op.slots, strict=True)), self.block_bytes):
            block_ids, slots = zip(*pairs, strict=True)
            self._link.save(block_ids, self._host.groups(slots), after)
            yield len(block_ids)

    def _write(self, op: Write) -> Generator[int, None, None]:
        rows = tensors(self._host.groups(op.slots))
        yield from write_chunk_in_pieces(path_for_rank(op.path, self.rank), rows, op.keys, self.identity, self.rank)

    def _read(self, op: Read, job: _Job, after: torch.cuda.Event | None) -> Generator[int, None, None]:
        slots = op.slots if op.slots is not None else (None,) * len(op.block_ids)
        with ChunkReader(path_for_rank(op.path, self.rank), self.identity, self.rank) as reader:
            for piece in pieces(list(zip(op.positions, op.keys, op.block_ids, slots, strict=True)), self.block_bytes):
                positions, keys, block_ids, piece_slots = zip(*piece, strict=True)
                staged = self._staging.take(len(piece)) if op.slots is None else None
                try:
                    groups = self._host.groups(piece_slots) if staged is None else staged.groups
                    reader.read(positions, keys, tensors(groups))
                except BaseException:
                    if staged is not None:
                        staged.free()
                    raise
                # Verified: only from here on may the bytes reach a GPU block.
                job.add_part()
                copy = partial(self._link.load, groups, block_ids, after)
                self._copies.put(
                    Priority.PREFETCH if op.prefetch else Priority.LOAD, _Scatter(job, block_ids, copy, staged)
                )
                yield len(block_ids)

    def _report(self, op: Op, result: Result) -> None:
        with self._changed:
            self._results.append(result)
            self._writes_in_flight -= isinstance(op, Write)
            self._changed.notify_all()


class _Job:
    """One operation on its way. Parts (a Read's disk side and its scatters) end on several threads."""

    def __init__(self, op: Op, block_bytes: int, report: Callable[[Op, Result], None]) -> None:
        self.op = op
        self._block_bytes, self._report = block_bytes, report
        self._lock = threading.Lock()
        self._parts = 1
        self._error: str | None = None
        self._corrupt = self._checksum_failed = False
        self._failed: set[int] = set()
        self._blocks = 0
        self._started: float | None = None

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def fail(self, error: Exception) -> str:
        """Takes down what went wrong; returns it in words."""
        if isinstance(error, (KVFileError, FileNotFoundError)):
            self._corrupt = True
            self._checksum_failed |= isinstance(error, KVChecksumMismatch)
        return _describe(error, self.op)

    def add_part(self) -> None:
        with self._lock:
            self._parts += 1

    def end_part(self, error: str | None, num_blocks: int, failed_blocks: Sequence[int]) -> None:
        with self._lock:
            self._parts -= 1
            self._error = self._error or error
            self._failed.update(failed_blocks)
            self._blocks += num_blocks
            if self._parts:
                return
        seconds = 0.0 if self._started is None else time.perf_counter() - self._started
        loaded = self.op.block_ids if isinstance(self.op, Load | Read) else ()
        failed = tuple(block for block in loaded if block in self._failed)
        nbytes = self._blocks * self._block_bytes
        ok, damage = self._error is None, (self._corrupt, self._checksum_failed)
        self._report(self.op, Result(self.op.op_id, ok, self._error, failed, nbytes, seconds, *damage))


class _Steps(Task):
    """Runs a generator piece by piece; whatever it raises becomes the end of the job."""

    def __init__(self, job: _Job, steps: Generator[int, None, None]) -> None:
        self._job, self._steps = job, steps
        self._blocks_done = 0

    def step(self) -> bool:
        self._job.start()
        try:
            self._blocks_done += next(self._steps)
            return True
        except StopIteration:
            self._end(None)
        except Exception as error:
            self._end(self._job.fail(error))
        return False

    def cancel(self) -> None:
        try:
            self._steps.close()
        except Exception as error:
            _describe(error, self._job.op)
        self._end("the transfer worker was shut down")

    def _end(self, error: str | None) -> None:
        op = self._job.op
        failed = op.block_ids[self._blocks_done :] if error and isinstance(op, Load | Read) else ()
        # What a Read has read counts when it is scattered.
        self._job.end_part(error, 0 if isinstance(op, Read) else self._blocks_done, failed)


class _Scatter(Task):
    """The last leg of one piece of a Read."""

    def __init__(
        self, job: _Job, block_ids: Sequence[int], copy: Callable[[], None], staged: StagedRows | None
    ) -> None:
        self._job, self._block_ids, self._copy, self._staged = job, block_ids, copy, staged

    def step(self) -> bool:
        try:
            self._copy()
        except Exception as error:
            self._end(self._job.fail(error))
        else:
            self._end(None)
        return False

    def cancel(self) -> None:
        self._end("the transfer worker was shut down")

    def _end(self, error: str | None) -> None:
        if self._staged is not None:
            self._staged.free()
        self._job.end_part(error, 0 if error else len(self._block_ids), self._block_ids if error else ())


def _describe(error: Exception, op: Op) -> str:
    """The error in words. Logged: a failing disk or file as a warning, a bug of ours with its traceback."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, _EXPECTED):
        logger.warning("%s %d failed: %s", type(op).__name__, op.op_id, text)
    else:
        logger.error("%s %d failed unexpectedly", type(op).__name__, op.op_id, exc_info=error)
    return text
