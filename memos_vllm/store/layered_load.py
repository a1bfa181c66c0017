"""Loads in groups of layers: a forward pass may begin when the first layers' KV is there.

The loads of a step copy the first group of all their blocks, then the second. Everything of them is in host memory from
the beginning, and was verified there if it came from a file: what is left to go wrong is the device.

The pass asks for a group before its first layer that needs it: ``LayeredLoad.wait`` gives the events that the stream
of the pass has to wait for, once all copies of the group have been issued.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from memos_vllm.store.jobs import Job
from memos_vllm.store.kv_file import parts_of
from memos_vllm.store.ops import Load
from memos_vllm.store.pipeline import Event, Landed
from memos_vllm.store.task_queue import Task

Issue = Callable[[Sequence[int], Sequence[int], Landed], Event | None]
"""Slots and blocks of a piece, and what is called when it has landed; returns the event behind it, None if it has.

An error is raised with nothing under way."""


class LayeredLoad:
    """How far one Load is, group by group. Thread-safe.

    Args:
        job: with a task per group.
        first_landed: called once, from any thread, when the first group is in all blocks.
    """

    def __init__(self, op: Load, job: Job, num_groups: int, first_landed: Callable[[], None]) -> None:
        self.op, self.job = op, job
        self._changed = threading.Condition()
        self._issued = [False] * num_groups
        self._events: list[list[Event]] = [[] for _ in range(num_groups)]
        self._first_parts = 1  # of the first group: pieces that have not landed, and its task
        self._failed = False
        self._first_landed = first_landed

    def piece(self, group: int, block_ids: Sequence[int]) -> Landed:
        """A piece of a group is about to be issued; what is returned says how it ended, once."""
        ended = self.job.piece(block_ids)
        with self._changed:
            self._first_parts += group == 0

        def landed(error: Exception | None) -> None:
            with self._changed:
                self._failed |= error is not None
            ended(error)
            if group == 0:
                self._end_first_part()

        return landed

    def issued(self, group: int, event: Event | None) -> None:
        """A piece was given to the device, and is in its blocks behind the event; None: it is there."""
        if event is not None:
            with self._changed:
                self._events[group].append(event)

    def end(self, group: int, error: str | None = None) -> None:
        """No more pieces of the group are issued."""
        with self._changed:
            self._failed |= error is not None
            self._issued[group] = True
            self._changed.notify_all()
        if group == 0:
            self._end_first_part()
        self.job.end_part(error)

    def wait(self, group: int) -> list[Event]:
        """Blocks until the copies of a group have been issued; the events behind them.

        Raises:
            RuntimeError: the device has refused one, so these blocks never get their KV.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._issued[group])
            if self._failed:
                raise RuntimeError("the KV of a running request did not arrive: the device refused a copy")
            return self._events[group]

    def _end_first_part(self) -> None:
        with self._changed:
            self._first_parts -= 1
            landed = not self._first_parts and not self._failed
        if landed:
            self._first_landed()


class GroupTask(Task):
    """Copies one group of layers of all loads of a step, in pieces that may hold blocks of several.

    Args:
        piece_blocks: the most blocks of a piece.
    """

    def __init__(self, loads: Sequence[LayeredLoad], group: int, piece_blocks: int, issue: Issue) -> None:
        self._loads, self._group, self._issue = loads, group, issue
        moves = [
            (load, slot, block) for load in loads for slot, block in zip(load.op.slots, load.op.block_ids, strict=True)
        ]
        self._pieces = parts_of(moves, piece_blocks)

    def step(self) -> bool:
        for load in self._loads:
            load.job.start()
        piece = next(self._pieces, None)
        if piece is None:
            self._end(None)
            return False
        moves = [move for move in piece if not move[0].job.failed]
        if moves:
            self._copy(moves)
        return True

    def cancel(self) -> None:
        self._end("the transfer worker was shut down")

    def _copy(self, moves: Sequence[tuple[LayeredLoad, int, int]]) -> None:
        blocks: dict[LayeredLoad, list[int]] = {}
        for load, _, block in moves:
            blocks.setdefault(load, []).append(block)
        parts = [load.piece(self._group, of_load) for load, of_load in blocks.items()]

        def landed(error: Exception | None) -> None:
            for part in parts:
                part(error)

        _, slots, block_ids = zip(*moves, strict=True)
        try:
            event = self._attempt(slots, block_ids, landed)
        except Exception as error:
            landed(error)
        else:
            for load in blocks:
                load.issued(self._group, event)

    def _attempt(self, slots: Sequence[int], block_ids: Sequence[int], landed: Landed) -> Event | None:
        """Twice: the requests may run, and a GPU that was short of memory for a moment is no reason to end them."""
        try:
            return self._issue(slots, block_ids, landed)
        except Exception:
            return self._issue(slots, block_ids, landed)

    def _end(self, error: str | None) -> None:
        for load in self._loads:
            load.end(self._group, error)
