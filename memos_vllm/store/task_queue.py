"""Threads that run tasks piece by piece, the most urgent first.

After every piece a thread looks again for the most urgent task, so a task waits for at most one
piece of a less urgent one per thread. Tasks of one priority run in the order in which they came.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from enum import IntEnum


class Priority(IntEnum):
    """The lower value goes first."""

    LOAD = 0
    READ = 1
    PREFETCH = 2
    SAVE = 3
    WRITE = 4


class Task(ABC):
    """Run by one thread at a time, not always the same."""

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
    """

    def __init__(self, name: str, num_threads: int, limits: Mapping[Priority, int] | None = None) -> None:
        self._waiting: dict[Priority, deque[Task]] = {priority: deque() for priority in sorted(Priority)}
        self._limits = dict(limits or {})
        self._running = dict.fromkeys(Priority, 0)
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
                self._waiting[priority].append(task)
                self._changed.notify()
                return
        task.cancel()

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
                    self._changed.wait()
                if self._stopped:
                    return
                task = self._waiting[priority].popleft()
                self._running[priority] += 1
            more = task.step()
            with self._changed:
                self._running[priority] -= 1
                stopped = self._stopped
                if more and not stopped:
                    self._waiting[priority].appendleft(task)
                self._changed.notify()
            if more and stopped:
                task.cancel()

    def _most_urgent(self) -> Priority | None:
        for priority, tasks in self._waiting.items():
            if tasks and self._running[priority] < self._limits.get(priority, len(self._threads)):
                return priority
        return None
