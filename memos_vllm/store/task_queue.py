"""Threads that run tasks piece by piece, the most urgent first.

After every piece a thread looks again for the most urgent task, so a task waits for at most one
piece of a less urgent one per thread. Tasks of one priority run in the order in which they came.

Where the threads share their cores with something that is not to be held up, a priority may be paced: it rests
after each piece for as long as its share of the time says. Others go on meanwhile.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Mapping
from enum import IntEnum


class Priority(IntEnum):
    """The lower value goes first."""

    LOAD = 0
    READ = 1
    PREFETCH = 2
    SAVE = 3
    WRITE = 4


class Task(ABC):
    """Run by one thread at a time, not always the same.

    Attributes:
        op_id: the operation that it is a part of, by which it can be hurried.
        priority: set by the queue.
    """

    op_id: int | None = None
    priority: Priority

    @abstractmethod
    def step(self) -> bool:
        """Runs one piece; True if there is more. Must not raise."""

    @abstractmethod
    def cancel(self) -> None:
        """Will never be stepped again: clean up and report."""


class TaskQueue:
    """``num_threads`` threads over one queue; thread-safe.

    Args:
        limits: how many tasks of a priority may be under way at most, from the first piece to the last.
            A limit below ``num_threads`` keeps a thread for what is more urgent, whose start
            would else wait for a piece of each thread (a sync of a slow disk, say).
        shares: of a core's time, that tasks of a priority take at most while they are paced.
    """

    def __init__(
        self,
        name: str,
        num_threads: int,
        limits: Mapping[Priority, int] | None = None,
        shares: Mapping[Priority, float] | None = None,
    ) -> None:
        self._waiting: dict[Priority, deque[Task]] = {priority: deque() for priority in sorted(Priority)}
        self._limits = dict(limits or {})
        self._shares = dict(shares or {})
        self._paced = False
        self._rests: dict[Priority, float] = {}
        """Until when, as ``time.monotonic`` has it."""
        self._running = dict.fromkeys(Priority, 0)
        self._under_way: set[Task] = set()
        """Those of which a piece runs right now."""
        self._changed = threading.Condition()
        self._stopped = False
        # Daemons: a disk that never answers must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, priority: Priority, task: Task) -> None:
        """Queues a task; after ``stop`` it is cancelled at once."""
        with self._changed:
            if not self._stopped:
                task.priority = priority
                self._waiting[priority].append(task)
                self._changed.notify()
                return
        task.cancel()

    def hurry(self, op_ids: Collection[int], priority: Priority) -> None:
        """Tasks of these operations that are less urgent have this priority from now on, behind those that have it."""
        with self._changed:
            for waiting in list(self._waiting.values()):
                for task in [each for each in waiting if each.op_id in op_ids and each.priority > priority]:
                    waiting.remove(task)
                    task.priority = priority
                    self._waiting[priority].append(task)
            for task in self._under_way:
                if task.op_id in op_ids:
                    task.priority = min(task.priority, priority)
            self._changed.notify_all()

    def pace(self, on: bool) -> None:
        """Holds priorities to their share from now on, or no longer."""
        with self._changed:
            if on != self._paced:
                self._paced = on
                self._rests.clear()
                self._changed.notify_all()

    def stop(self, timeout_s: float) -> bool:
        """Lets each running piece end, cancels all other tasks. False if a thread is stuck in a piece."""
        with self._changed:
            self._stopped = True
            rest = [task for tasks in self._waiting.values() for task in tasks]
            for tasks in self._waiting.values():
                tasks.clear()
            self._changed.notify_all()
        for task in rest:
            task.cancel()
        for thread in self._threads:
            thread.join(timeout_s / len(self._threads))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (priority := self._most_urgent()) is None:
                    self._changed.wait(self._rest_s())
                if self._stopped:
                    return
                task = self._waiting[priority].popleft()
                self._running[priority] += 1
                self._under_way.add(task)
            began_s = time.thread_time()  # of the core; a wait for the disk takes nothing from anybody
            more = task.step()
            took_s = time.thread_time() - began_s
            with self._changed:
                self._running[priority] -= 1
                self._under_way.remove(task)
                if self._paced and (share := self._shares.get(priority)):
                    self._rests[priority] = time.monotonic() + took_s * (1.0 / share - 1.0)
                stopped = self._stopped
                if more and not stopped:
                    self._waiting[task.priority].appendleft(task)
                self._changed.notify()
            if more and stopped:
                task.cancel()

    def _most_urgent(self) -> Priority | None:
        now = time.monotonic() if self._rests else 0.0
        for priority, tasks in self._waiting.items():
            is_free = self._running[priority] < self._limits.get(priority, len(self._threads))
            if tasks and is_free and self._rests.get(priority, 0.0) <= now:
                return priority
        return None

    def _rest_s(self) -> float | None:
        """Until a priority that has tasks may go on; None if none rests."""
        ends = [until for priority, until in self._rests.items() if self._waiting[priority]]
        return max(0.0, min(ends) - time.monotonic()) if ends else None
