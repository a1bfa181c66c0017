"""Order of tasks, with gates instead of clocks."""

import threading

from memos_vllm.store import task_queue
from memos_vllm.store.task_queue import Priority, Task, TaskQueue

PATIENCE_S = 30.0  # ends a hung test; nothing waits this long


class Recorded(Task):
    """Appends its name once per piece; the first piece can be held at a gate."""

    def __init__(self, log, name, pieces=1, gate=None, op_id=None):
        self.log, self.name, self.left, self.gate, self.op_id = log, name, pieces, gate, op_id
        self.entered, self.ended = threading.Event(), threading.Event()

    def step(self):
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
            self.gate = None
        self.log.append(self.name)
        self.left -= 1
        if not self.left:
            self.ended.set()
        return self.left > 0

    def cancel(self):
        self.log.append(f"{self.name} cancelled")
        self.ended.set()


def test_more_urgent_tasks_overtake_at_the_next_piece():
    log, gate = [], threading.Event()
    queue = TaskQueue("t", 1)
    write = Recorded(log, "write", pieces=3, gate=gate)
    queue.put(Priority.WRITE, write)
    assert write.entered.wait(PATIENCE_S)
    for priority in (Priority.SAVE, Priority.READ, Priority.LOAD):
        queue.put(priority, Recorded(log, priority.name.lower(), pieces=2))
    queue.put(Priority.LOAD, Recorded(log, "load2"))
    gate.set()
    assert write.ended.wait(PATIENCE_S) and queue.stop(PATIENCE_S)
    assert log == ["write", "load", "load", "load2", "read", "read", "save", "save", "write", "write"]


def test_what_is_hurried_goes_behind_what_is_as_urgent_and_before_the_rest():
    log, gate = [], threading.Event()
    queue = TaskQueue("t", 1)
    running = Recorded(log, "running", pieces=2, gate=gate, op_id=1)
    queue.put(Priority.PREFETCH, running)
    assert running.entered.wait(PATIENCE_S)
    for op_id in (2, 3, 4):
        queue.put(Priority.PREFETCH, Recorded(log, f"prefetch {op_id}", op_id=op_id))
    queue.put(Priority.LOAD, Recorded(log, "load", op_id=5))
    last = Recorded(log, "save", op_id=6)
    queue.put(Priority.SAVE, last)
    queue.hurry({3, 5}, Priority.LOAD)
    queue.hurry({5, 99}, Priority.READ)
    gate.set()
    assert last.ended.wait(PATIENCE_S) and queue.stop(PATIENCE_S)
    assert log == ["running", "load", "prefetch 3", "running", "prefetch 2", "prefetch 4", "save"]


def test_a_task_that_is_hurried_while_a_piece_of_it_runs_goes_on_before_the_rest():
    log, gate = [], threading.Event()
    queue = TaskQueue("t", 1)
    running = Recorded(log, "running", pieces=2, gate=gate, op_id=1)
    queue.put(Priority.PREFETCH, running)
    assert running.entered.wait(PATIENCE_S)
    read = Recorded(log, "read")
    queue.put(Priority.READ, read)
    queue.hurry({1}, Priority.LOAD)
    gate.set()
    assert read.ended.wait(PATIENCE_S) and queue.stop(PATIENCE_S)
    assert log == ["running", "running", "read"]


def test_a_paced_priority_rests_after_each_piece_and_holds_nobody_up(monkeypatch):
    used_s = iter(range(10**9))
    monkeypatch.setattr(task_queue.time, "thread_time", lambda: float(next(used_s)))  # a second a piece
    log, gate = [], threading.Event()
    queue = TaskQueue("t", 1, shares={Priority.PREFETCH: 1e-6})
    queue.pace(True)
    prefetch = Recorded(log, "prefetch", pieces=3, gate=gate)
    queue.put(Priority.PREFETCH, prefetch)
    assert prefetch.entered.wait(PATIENCE_S)
    load = Recorded(log, "load", pieces=2)
    queue.put(Priority.LOAD, load)
    gate.set()
    assert load.ended.wait(PATIENCE_S)
    save = Recorded(log, "save")
    queue.put(Priority.SAVE, save)
    assert save.ended.wait(PATIENCE_S), "what is less urgent goes on, too"
    assert log == ["prefetch", "load", "load", "save"]
    queue.pace(False)
    assert prefetch.ended.wait(PATIENCE_S) and queue.stop(PATIENCE_S)
    assert log == ["prefetch", "load", "load", "save", "prefetch", "prefetch"]


def test_a_rest_ends_by_itself():
    log = []
    queue = TaskQueue("t", 1, shares={Priority.PREFETCH: 0.5})
    queue.pace(True)
    prefetch = Recorded(log, "prefetch", pieces=3)
    queue.put(Priority.PREFETCH, prefetch)
    assert prefetch.ended.wait(PATIENCE_S) and queue.stop(PATIENCE_S)


def test_a_limit_keeps_a_thread_for_reads():
    log, gate = [], threading.Event()
    queue = TaskQueue("t", 2, {Priority.WRITE: 1})
    first, second = (Recorded(log, f"write{i}", gate=gate) for i in range(2))
    queue.put(Priority.WRITE, first)
    assert first.entered.wait(PATIENCE_S)
    queue.put(Priority.WRITE, second)
    read = Recorded(log, "read")
    queue.put(Priority.READ, read)
    assert read.ended.wait(PATIENCE_S), "the read does not wait for any write"
    assert not second.entered.is_set()
    gate.set()
    assert second.ended.wait(PATIENCE_S) and queue.stop(PATIENCE_S)


def test_stop_lets_the_running_piece_end_and_cancels_the_rest():
    log, gate = [], threading.Event()
    queue = TaskQueue("t", 1)
    running, waiting = Recorded(log, "running", pieces=2, gate=gate), Recorded(log, "waiting")
    queue.put(Priority.SAVE, running)
    assert running.entered.wait(PATIENCE_S)
    queue.put(Priority.SAVE, waiting)
    stopper = threading.Thread(target=queue.stop, args=(PATIENCE_S,))
    stopper.start()
    assert waiting.ended.wait(PATIENCE_S)
    gate.set()
    stopper.join(PATIENCE_S)
    assert log == ["waiting cancelled", "running", "running cancelled"]
    late = Recorded(log, "late")
    queue.put(Priority.LOAD, late)
    assert log[-1] == "late cancelled"
