"""Saves, loads, reads and writes under a forward pass that goes on, with a hash of every block ever written.

The harness plays vLLM: it hands out blocks and slots, lets the pass write what it then saves, gives a
block to the next user as soon as the Result says so, and has the pass write once more to a block that
was given back (as a pass does that asynchronous scheduling queued before). Whoever reads a block or a
slot checks it against the hash of what was put there (the way of SGLang's KV canary); the answer is a
list of mismatches.
"""

import queue
import random
import threading

import torch
from xxhash import xxh3_64_digest

from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.store.host_memory import tensors
from memos_vllm.store.transfer import Load, Read, Save, Write
from tests.store.store_factories import make_keys

PATIENCE_S = 60.0
LIVE_BLOCKS = 4
"""Blocks of requests that only decode: rewritten and checked beside all copies."""


def stamp(mark, width):
    """The bytes of a block, different for every mark."""
    return torch.randint(0, 256, (1, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(mark))


class Pass:
    """What a forward pass does to blocks."""

    def __init__(self, planes):
        self.copier = BlockCopier(planes)
        self.hashes = {}
        """Mark to the hash of its block."""
        self.mismatches = []

    def _write(self, block, mark):
        row = stamp(mark, self.copier.block_bytes)
        self.hashes[mark] = xxh3_64_digest(row.numpy())
        self.copier.scatter(row, [block])

    def _check(self, block, mark, what):
        row = torch.empty(1, self.copier.block_bytes, dtype=torch.uint8)
        self.copier.gather([block], row)
        self.compare(row, mark, what)

    def compare(self, row, mark, what):
        if xxh3_64_digest(row.numpy()) != self.hashes.get(mark):  # none: nothing was written yet
            self.mismatches.append(what)


class ThreadPass(Pass):
    """In CPU memory: a thread. What the pass does before a copy is over when the copy is submitted."""

    def __init__(self, planes):
        super().__init__(planes)
        self._work = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while (work := self._work.get()) is not None:
            work()
            self._work.task_done()

    def write(self, block, mark):
        self._work.put(lambda: self._write(block, mark))

    def check(self, block, mark, what):
        self._work.put(lambda: self._check(block, mark, what))

    def wait(self, event):
        """What is given from now on comes behind the event; None would be one that is past."""
        assert event is None

    def behind(self):
        self._work.join()

    def finish(self):
        self._work.join()
        self._work.put(None)


class StreamPass(Pass):
    """On a simulated device: its compute stream."""

    def __init__(self, planes, device):
        super().__init__(planes)
        self._stream = device.compute

    def write(self, block, mark):
        self._stream.put(lambda: self._write(block, mark))

    def check(self, block, mark, what):
        self._stream.put(lambda: self._check(block, mark, what))

    def wait(self, event):
        self._stream.wait(event)

    def behind(self):
        return self._stream.record()

    def finish(self):
        self._stream.record().synchronize()


class Stress:
    """One run.

    Args:
        in_flight: operations at a time; with 1 the run is the same every time.
    """

    def __init__(self, worker, forward, num_blocks, num_slots, root, in_flight, seed=7):
        self.worker, self.forward, self.root, self.in_flight = worker, forward, root, in_flight
        self.rng = random.Random(seed)
        self.free_blocks = set(range(LIVE_BLOCKS, num_blocks))
        self.free_slots = set(range(num_slots))
        self.slot_marks, self.files, self.running = {}, {}, {}
        self.live = dict.fromkeys(range(LIVE_BLOCKS))
        self.marks = iter(range(1, 10**9))
        self.done = self.begun = 0

    def run(self, num_ops, stop_at_mismatch=False):
        """Runs at least ``num_ops`` operations; returns the mismatches."""
        while self.done < num_ops or self.running:
            if stop_at_mismatch and self.forward.mismatches:
                num_ops = self.done
            ops = []
            while self.done + len(self.running) < num_ops and len(self.running) < self.in_flight:
                op = self._next(self.done + len(self.running))
                if op is None:
                    break
                ops.append(op)
            self._decode()
            self.worker.submit(ops, self.forward.behind())
            self.worker.hurry([op_id for op_id in self.running if self.rng.random() < 0.1])
            assert self.worker.wait(PATIENCE_S) or not self.running, "an operation has no result"
            for op_id in self.worker.take_begun():
                self._read_while_it_arrives(op_id)
            for result in self.worker.drain():
                self._ended(result)
        self.forward.finish()
        return self.forward.mismatches

    def _decode(self):
        """The pass that runs beside the copies."""
        for block, mark in self.live.items():
            if mark is not None:
                self.forward.check(block, mark, f"live block {block}")
            self.live[block] = next(self.marks)
            self.forward.write(block, self.live[block])

    def _next(self, number):
        op_id = 10**6 + number + self.rng.randrange(10**6) * 10**7
        kind = self.rng.choice(["save", "load", "load", "read", "write"])
        ready = sorted(self.slot_marks.keys() & self.free_slots)
        if (kind in ("load", "write") and not ready) or (kind == "read" and not self.files) or number < 4:
            kind = "save"
        want = self.rng.randint(1, 5)
        match kind:
            case "save":
                count = min(want, len(self.free_blocks), len(self.free_slots))
                blocks, slots = self._some(self.free_blocks, count), self._some(self.free_slots, count)
                marks = [next(self.marks) for _ in blocks]
                for block, mark in zip(blocks, marks, strict=True):
                    self.forward.write(block, mark)
                op = Save(op_id, tuple(blocks), tuple(slots))
            case "load":
                slots = self.rng.sample(ready, min(want, len(ready), len(self.free_blocks)))
                marks, blocks = [self.slot_marks[slot] for slot in slots], self._some(self.free_blocks, len(slots))
                is_guess = self.rng.random() < 0.5
                op = Load(op_id, tuple(slots), tuple(blocks), prefetch=is_guess, in_groups=not is_guess)
            case "write":
                slots, blocks = self.rng.sample(ready, min(want, len(ready))), []
                marks = [self.slot_marks[slot] for slot in slots]
                path = str(self.root / f"{number}.r{{rank}}")
                op = Write(op_id, str(number), path, tuple(slots), make_keys(*marks))
            case "read":
                path, held = self.rng.choice(sorted(self.files.items()))
                count = min(want, len(held), len(self.free_blocks))
                positions = self.rng.sample(range(len(held)), count)
                marks, blocks = [held[position] for position in positions], self._some(self.free_blocks, count)
                promoted = self.rng.random() < 0.5 and len(self.free_slots) >= count
                slots = self._some(self.free_slots, count) if promoted else []
                op = Read(op_id, "c", path, tuple(positions), make_keys(*marks), tuple(blocks), tuple(slots) or None)
        if not marks:
            return None
        if kind in ("save", "read"):
            for slot in slots:
                self.slot_marks.pop(slot, None)
        self.free_blocks.difference_update(blocks)
        self.free_slots.difference_update(slots)
        self.running[op_id] = (kind, blocks, slots, marks, op)
        return op

    def _some(self, free, count):
        return self.rng.sample(sorted(free), count)

    def _read_while_it_arrives(self, op_id):
        """A pass that waits for each group of layers, and then reads all of them."""
        for group in range(len(self.worker._link.layers)):
            for event in self.worker.wait_for_layers(op_id, group):
                self.forward.wait(event)
        _, blocks, _, marks, op = self.running[op_id]
        for block, mark in zip(blocks, marks, strict=True):
            self.forward.check(block, mark, f"block {block} of {op} while it arrives")
        self.begun += 1

    def _ended(self, result):
        kind, blocks, slots, marks, op = self.running.pop(result.op_id)
        self.done += 1
        assert result.ok, result.error
        if kind in ("load", "read"):
            for block, mark in zip(blocks, marks, strict=True):
                self.forward.check(block, mark, f"block {block} after {op}")
        if kind in ("save", "read") and slots:
            for row, slot, mark in zip(tensors(self.worker._host.groups(slots)), slots, marks, strict=True):
                self.forward.compare(row, mark, f"slot {slot} after {op}")
                self.slot_marks[slot] = mark
        if kind == "write" and len(self.files) < 30:
            self.files[op.path] = marks
        for block in blocks:
            self.forward.write(block, next(self.marks))  # a pass that was queued before the block was given back
        self.free_blocks.update(blocks)
        self.free_slots.update(slots)
