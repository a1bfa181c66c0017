"""A device whose streams run in the worst order that the waits between them allow.

Work is queued and nothing runs by itself. ``synchronize`` runs what the event needs and no more: a wait
that is missing leaves the other stream's work undone. Streams in ``eager`` run all they can as soon as
it is queued: a wait that is missing lets them overwrite what others have not read yet.

Streams are named in the order in which a ``DeviceLink`` makes them; ``compute`` is the forward pass's.
"""

import threading
from collections import deque

import torch

from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.store.pipeline import Device, Method

NAMES = ("load copy", "load kernel", "save copy", "save kernel")


class SimulatedEvent:
    def __init__(self, stream):
        self.stream, self.done = stream, False

    def synchronize(self):
        self.stream.device.gate(self)
        with self.stream.device.lock:
            self.stream.run_until(self)


class SimulatedStream:
    def __init__(self, device, name):
        self.device, self.name = device, name
        self.queue = deque()

    def put(self, work):
        with self.device.lock:
            self.queue.append(work)
            self.device.run_eager()

    def wait(self, event):
        if (self.name, event.stream.name) not in self.device.removed:
            self.put(event)

    def record(self):
        event = SimulatedEvent(self)

        def reached():
            event.done = True

        self.put(reached)
        return event

    def run_until(self, event):
        while not event.done:
            work = self.queue[0]
            if isinstance(work, SimulatedEvent):
                work.stream.run_until(work)
                if self.queue[0] is not work:
                    continue  # running the other stream woke an eager one, which went past it
            self.run_first()

    def run_first(self):
        work = self.queue.popleft()
        if not isinstance(work, SimulatedEvent):
            work()

    def run_all_it_can(self):
        ran = False
        while self.queue and (not isinstance(self.queue[0], SimulatedEvent) or self.queue[0].done):
            self.run_first()
            ran = True
        return ran


class SimulatedDevice(Device):
    """Args:
    removed: pairs (stream that waits, stream it waits for) whose waits are left out.
    """

    methods = frozenset(Method)

    def __init__(self, planes, piece_blocks, eager=(), removed=(), layers=()):
        self.copier, self.piece_blocks = BlockCopier(planes), piece_blocks
        self.layer_copiers = [BlockCopier(planes[group.planes]) for group in layers]
        self.eager, self.removed = set(eager), set(removed)
        self.lock = threading.RLock()
        self.gate = lambda event: None  # called before anybody waits for an event
        self.streams = {}
        self._names = iter(NAMES)
        self.compute = self._add("compute")

    def _add(self, name):
        self.streams[name] = SimulatedStream(self, name)
        return self.streams[name]

    def run_eager(self):
        while any(self.streams[name].run_all_it_can() for name in self.eager if name in self.streams):
            pass

    def stream(self):
        return self._add(next(self._names))

    def buffer(self):
        return torch.full((self.piece_blocks, self.copier.block_bytes), 0xEE, dtype=torch.uint8)

    def loading(self, layers):
        return self.copier if layers is None else self.layer_copiers[layers]

    def copy_in(self, stream, groups, buffer):
        rows = buffer.view(-1).split(groups[0].matrix.shape[1])
        stream.put(lambda: self._each(groups, lambda row, done: rows[done].copy_(row)))

    def copy_out(self, stream, buffer, groups):
        stream.put(lambda: self._each(groups, lambda row, done: row.copy_(buffer[done])))

    def scatter(self, stream, buffer, block_ids, layers):
        copier = self.loading(layers)
        rows = buffer.view(-1)[: len(block_ids) * copier.row_bytes].view(-1, copier.row_bytes)
        stream.put(lambda: copier.scatter(rows, block_ids))

    def gather(self, stream, block_ids, buffer):
        stream.put(lambda: self.copier.gather(block_ids, buffer[: len(block_ids)]))

    def load_direct(self, stream, groups, block_ids, layers):
        def load():
            self._each(groups, lambda row, done: self.loading(layers).scatter(row[None], [block_ids[done]]))

        stream.put(load)

    def save_direct(self, stream, block_ids, groups):
        def save():
            self._each(groups, lambda row, done: self.copier.gather([block_ids[done]], row[None]))

        stream.put(save)

    load_fragments, save_fragments = load_direct, save_direct

    @staticmethod
    def _each(groups, copy):
        rows = [group.matrix[row] for group in groups for row in group.rows]
        for done, row in enumerate(rows):
            copy(row, done)
