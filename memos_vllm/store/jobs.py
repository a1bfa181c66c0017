"""An operation on its way: parts of it end on several threads, and the last one makes the Result."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence

from memos_vllm.errors import KVChecksumMismatch, KVFileError
from memos_vllm.store.ops import Load, Op, Read, Result
from memos_vllm.store.pipeline import Landed
from memos_vllm.store.task_queue import Task

logger = logging.getLogger(__name__)

_EXPECTED = (KVFileError, OSError, MemoryError)

_NOT_THE_FILE = {None, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN}
"""Of an OSError: this process ran short of something, or ends; the same file is as good as before."""


class Job:
    """Ends when each of its tasks has ended and each piece of it has landed or failed. Thread-safe.

    Args:
        num_tasks: how many tasks work on it.
        num_groups: in how many parts each block comes, all of which it needs (``layered_load``).
        share: of the time from the first piece to the last that counts as its own, where jobs share their pieces.
    """

    def __init__(
        self,
        op: Op,
        row_bytes: int,
        num_tasks: int,
        report: Callable[[Op, Result], None],
        num_groups: int = 1,
        share: float = 1.0,
    ) -> None:
        self.op = op
        self.is_hurried = False
        """Whether a request has begun to wait for a prefetch."""
        self._row_bytes, self._report, self._num_groups = row_bytes, report, num_groups
        self._share = share
        self._lock = threading.Lock()
        self._parts = num_tasks
        self._error: str | None = None
        self._corrupt = self._checksum_failed = self._no_space = self._unreadable = False
        self._landed: Counter[int] = Counter()
        self._blocks = 0
        self._started: float | None = None

    def start(self) -> None:
        with self._lock:
            if self._started is None:
                self._started = time.perf_counter()

    @property
    def failed(self) -> bool:
        """Whether something went wrong; what has not begun need not begin."""
        return self._error is not None

    def piece(self, block_ids: Sequence[int], free: Callable[[], None] | None = None) -> Landed:
        """A piece on its way to or from ``block_ids``; what is returned says how it ended, once.

        Args:
            free: called at its end, with or without an error.
        """
        with self._lock:
            self._parts += 1

        def landed(error: Exception | None) -> None:
            if free is not None:
                free()
            if error is None:
                self.moved(block_ids)
            self.end_part(error)

        return landed

    def moved(self, block_ids: Sequence[int]) -> None:
        """These blocks, or one part of each, arrived or left: counted, and with all parts not among the failed ones."""
        with self._lock:
            self._landed.update(block_ids)
            self._blocks += len(block_ids)

    def end_part(self, error: Exception | str | None) -> None:
        """A task or a piece ended."""
        corrupt = isinstance(error, KVFileError | FileNotFoundError)
        checksum_failed = isinstance(error, KVChecksumMismatch)
        no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        unreadable = isinstance(error, OSError) and error.errno not in _NOT_THE_FILE and not corrupt
        if isinstance(error, Exception):
            error = _describe(error, self.op)
        with self._lock:
            self._parts -= 1
            self._error = self._error or error
            self._corrupt |= corrupt
            self._checksum_failed |= checksum_failed
            self._no_space |= no_space
            self._unreadable |= unreadable
            if self._parts:
                return
        seconds = 0.0 if self._started is None else (time.perf_counter() - self._started) * self._share
        wanted = self.op.block_ids if isinstance(self.op, Load | Read) else ()
        failed = tuple(block for block in wanted if self._landed[block] < self._num_groups) if self._error else ()
        nbytes = self._blocks * self._row_bytes // self._num_groups
        ok = self._error is None
        causes = (self._corrupt, self._checksum_failed, self._no_space, self._unreadable)
        self._report(self.op, Result(self.op.op_id, ok, self._error, failed, nbytes, seconds, *causes))


class Steps(Task):
    """Runs a generator, one piece of work per step; whatever it raises becomes the job's error."""

    def __init__(self, job: Job, steps: Generator[None, None, None]) -> None:
        self._job, self._steps = job, steps
        self.op_id = job.op.op_id

    def step(self) -> bool:
        self._job.start()
        try:
            next(self._steps)
            return True
        except StopIteration:
            self._job.end_part(None)
        except Exception as error:
            self._job.end_part(error)
        return False

    def cancel(self) -> None:
        try:
            self._steps.close()
        except Exception as error:
            _describe(error, self._job.op)
        self._job.end_part("the transfer worker was shut down")


class Copy(Task):
    """One piece's way over the link, behind the read that brought it into host memory."""

    def __init__(self, copy: Callable[[Landed], None], landed: Landed, op_id: int | None = None) -> None:
        self._copy, self._landed, self.op_id = copy, landed, op_id

    def step(self) -> bool:
        try:
            self._copy(self._landed)
        except Exception as error:
            self._landed(error)
        return False

    def cancel(self) -> None:
        self._landed(InterruptedError("the transfer worker was shut down"))


def _describe(error: Exception, op: Op) -> str:
    """The error in words. Logged: a failing disk or file as a warning, a bug of ours with its traceback."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, _EXPECTED):
        logger.warning("%s %d failed: %s", type(op).__name__, op.op_id, text)
    else:
        logger.error("%s %d failed unexpectedly", type(op).__name__, op.op_id, exc_info=error)
    return text
