"""Writes that come at the same time share one commit, for a commit costs a sync of the disk.

There is no writer thread. Whoever finds nobody committing leads: it takes all that has queued up,
commits it, and wakes the others. So a lone write pays nothing for the queue, and the more writers
there are, the larger the groups become (the "leader and followers" of write-ahead logs: LevelDB's
``DBImpl::Write``, PostgreSQL's ``XLogFlush``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memos_vllm.errors import StoreError
from memos_vllm.types import Principal


@dataclass(eq=False, slots=True)
class Write:
    """One caller's write, and what became of it."""

    who: Principal
    work: Callable[[Any], Any]
    limit_bytes: int
    """How large the map may grow for it."""

    result: Any = None
    error: BaseException | None = None
    done: bool = False

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        self.result, self.error, self.done = result, error, True


class GroupCommit:
    """
    Args:
        commit: finishes every write that it is given. Runs in one thread at a time.
    """

    def __init__(self, commit: Callable[[Sequence[Write]], None]):
        self._commit = commit
        self._changed = threading.Condition()
        self._queue: list[Write] = []
        self._leading = False

    def submit(self, write: Write) -> Any:
        """Returns the write's result once its group is committed, or raises its error."""
        with self._changed:
            self._queue.append(write)
            self._changed.wait_for(lambda: write.done or not self._leading)
            if not write.done:
                self._leading = True
                group, self._queue = self._queue, []
        if not write.done:
            self._lead(group)
        if write.error is not None:
            raise write.error
        return write.result

    def _lead(self, group: Sequence[Write]) -> None:
        try:
            self._commit(group)
        finally:
            with self._changed:
                for write in group:
                    if not write.done:  # the leader was interrupted; whether it is stored is not known
                        write.finish(error=StoreError("the write was interrupted; look whether it is there"))
                self._leading = False
                self._changed.notify_all()
