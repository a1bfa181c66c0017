"""The transfer worker on CPU blocks: bytes, failures, order, shutdown."""

import dataclasses
import errno
import os
import pickle
import threading

import pytest
import torch

from memos_vllm.kernels.heads import HeadShape, heads_of
from memos_vllm.kernels.kv_copy import BlockCopier, block_bytes, planes_of
from memos_vllm.kernels.reference import (
    gather_fp8_reference,
    gather_reference,
    scatter_heads_reference,
    scatter_reference,
)
from memos_vllm.store import host_memory, kv_file, link, transfer
from memos_vllm.store.copy_planner import CopyPlan
from memos_vllm.store.link import CpuLink, link_for
from memos_vllm.store.task_queue import Priority, Task
from memos_vllm.store.transfer import Load, Read, Save, TransferWorker, Write
from tests.store.store_factories import make_identity, make_keys, other_identity, read_blocks

IDENTITY = make_identity()
BLOCKS, SLOTS = 24, 16
PATIENCE_S = 60.0  # ends a hung test; nothing waits this long

LAYOUTS = {
    "cpu bf16": lambda: [torch.zeros(BLOCKS, 2, 16, 48, dtype=torch.bfloat16) for _ in range(2)],
    "kv apart fp16": lambda: [torch.zeros(2, BLOCKS, 16, 2, 24, dtype=torch.float16) for _ in range(2)],
    "heads apart fp8": lambda: [torch.zeros(BLOCKS, 2, 2, 16, 24).to(torch.float8_e4m3fn)[:, :, 0]],
    "small kernel blocks fp32": lambda: [torch.zeros(BLOCKS * 2, 5, 7) for _ in range(3)],
}


@pytest.fixture(autouse=True)
def small_pieces_and_segments(monkeypatch):
    """Three blocks to a piece, five slots to a segment: every operation crosses borders. No fragment is short."""
    monkeypatch.setattr(kv_file, "PIECE_BYTES", 3 * 6144 + 1)
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 5 * 6144 + 1)
    monkeypatch.setattr(link, "IN_PLACE_BYTES", 1)


class Rig:
    """A worker, its planes, and calls that wait for their result."""

    def __init__(self, layout="cpu bf16", io_threads=2, root=None, planes=None, copier=None, piece_blocks=None):
        self.planes = planes or planes_of(LAYOUTS[layout](), BLOCKS)
        link = CpuLink(copier or BlockCopier(self.planes), self.planes, piece_blocks)
        self.worker = TransferWorker(link, SLOTS, IDENTITY, 0, io_threads, pin_memory=False)
        self.root, self.ids = root, iter(range(10**9))

    def fill(self, block_ids):
        rows = torch.randint(0, 256, (len(block_ids), block_bytes(self.planes)), dtype=torch.uint8)
        scatter_reference(rows, self.planes, block_ids)
        return rows

    def content(self, block_ids):
        rows = torch.full((len(block_ids), block_bytes(self.planes)), 0xA5, dtype=torch.uint8)
        gather_reference(self.planes, block_ids, rows)
        return rows

    def finish(self, count):
        results = {}
        while len(results) < count:
            assert self.worker.wait(PATIENCE_S), "an operation has no result"
            results.update((result.op_id, result) for result in self.worker.drain())
        return results

    def run(self, kind, **fields):
        op = kind(op_id=next(self.ids), **fields)
        self.worker.submit([op])
        return self.finish(1)[op.op_id]

    def save(self, block_ids, slots):
        return self.run(Save, block_ids=tuple(block_ids), slots=tuple(slots))

    def load(self, slots, block_ids):
        return self.run(Load, slots=tuple(slots), block_ids=tuple(block_ids))

    def write(self, slots, numbers, name="c"):
        path = str(self.root / f"{name}.r{{rank}}")
        return self.run(Write, chunk=name, path=path, slots=tuple(slots), keys=make_keys(*numbers))

    def read_op(self, positions, block_ids, slots=None, name="c", keys=None):
        path, slots = str(self.root / f"{name}.r{{rank}}"), None if slots is None else tuple(slots)
        keys = keys or make_keys(*positions)
        return Read(next(self.ids), name, path, tuple(positions), keys, tuple(block_ids), slots)

    def read(self, *args, **kwargs):
        op = self.read_op(*args, **kwargs)
        self.worker.submit([op])
        return self.finish(1)[op.op_id]


@pytest.fixture
def make_rig(tmp_path):
    rigs = []

    def make_rig(*args, **kwargs):
        rigs.append(Rig(*args, root=tmp_path, **kwargs))
        return rigs[-1]

    yield make_rig
    for rig in rigs:
        rig.worker.shutdown(PATIENCE_S)
        rig.worker.drain()
        assert rig.worker.in_flight == 0
        rig.worker._staging.check_idle()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_through_host_and_disk_is_bit_identical(layout, make_rig):
    rig = make_rig(layout)
    blocks, slots = [3, 4, 5, 6, 20, 0, 19, 18], [1, 2, 3, 4, 5, 6, 15, 0]
    original = rig.fill(range(BLOCKS))
    saved = rig.save(blocks, slots)
    assert saved.ok and saved.nbytes == len(blocks) * rig.worker.row_bytes
    written = rig.write(slots, range(8))
    assert written.ok and written.nbytes == saved.nbytes
    rig.fill(range(BLOCKS))
    untouched = rig.content([1, 2])
    assert rig.load(slots, [7, 8, 9, 10, 11, 12, 13, 14]).ok
    assert torch.equal(rig.content(range(7, 15)), original[blocks])
    read = rig.read([0, 1, 2, 3, 4, 6, 7], range(15, 22))
    assert read.ok and read.nbytes == 7 * rig.worker.row_bytes
    assert torch.equal(rig.content(range(15, 22)), original[blocks][[0, 1, 2, 3, 4, 6, 7]])
    assert torch.equal(rig.content([1, 2]), untouched)


def test_a_read_fills_host_slots_too(make_rig):
    rig = make_rig()
    original = rig.fill(range(5))
    rig.save(range(5), range(5))
    rig.write(range(5), range(5))
    assert rig.read(range(5), range(10, 15), slots=range(11, 16)).ok
    assert rig.load(range(11, 16), range(15, 20)).ok
    assert torch.equal(rig.content(range(10, 20)), original.repeat(2, 1))


def test_empty_operations_succeed(make_rig):
    rig = make_rig()
    rig.fill([0])
    rig.save([0], [0])
    rig.write([0], [0])
    assert rig.save([], []).ok and rig.load([], []).ok and rig.read([], []).ok


@pytest.fixture
def staged_reads(monkeypatch):
    """As on a GPU: a file cannot be read into blocks."""
    monkeypatch.setattr(CpuLink, "memory", lambda self, block_ids: None)


def damage(path, row_bytes, rows_from_end):
    data = bytearray(path.read_bytes())
    data[-rows_from_end * row_bytes + 5] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("slots", [None, range(8)], ids=["staged", "into slots"])
def test_a_damaged_block_reaches_no_gpu_block(make_rig, tmp_path, slots, staged_reads):
    rig = make_rig(io_threads=1)
    original = rig.fill(range(8))
    rig.save(range(8), range(8))
    rig.write(range(8), range(8))
    damage(tmp_path / "c.r0", rig.worker.row_bytes, 3)  # block 5, in the second piece of three
    before = rig.fill(range(10, 18))
    result = rig.read(range(8), range(10, 18), slots=slots)
    assert not result.ok and "KVChecksumMismatch" in result.error and "position 5" in result.error
    assert result.corrupt and result.checksum_failed
    assert result.failed_blocks == (13, 14, 15, 16, 17) and result.nbytes == 3 * rig.worker.row_bytes
    assert torch.equal(rig.content(range(13, 18)), before[3:])
    assert torch.equal(rig.content(range(10, 13)), original[:3])


def test_a_damaged_block_that_was_read_in_place_is_named(make_rig, tmp_path):
    """Its block holds anything now, and so may the rest of its piece; other blocks do not."""
    rig = make_rig(io_threads=1)
    original = rig.fill(range(8))
    rig.save(range(8), range(8))
    rig.write(range(8), range(8))
    damage(tmp_path / "c.r0", rig.worker.row_bytes, 3)
    before = rig.fill(range(10, BLOCKS))
    result = rig.read(range(8), range(10, 18))
    assert not result.ok and result.corrupt and "position 5" in result.error
    assert result.failed_blocks == (13, 14, 15, 16, 17) and result.nbytes == 3 * rig.worker.row_bytes
    assert torch.equal(rig.content(range(10, 13)), original[:3])
    assert torch.equal(rig.content(range(16, BLOCKS)), before[6:])


def test_blocks_that_are_not_contiguous_are_not_read_in_place(make_rig):
    assert make_rig("heads apart fp8").worker._link.memory([0]) is None
    assert make_rig("kv apart fp16").worker._link.memory([0]) is not None


@pytest.mark.parametrize("in_place", [True, False])
def test_files_are_read_straight_into_long_fragments_only(make_rig, monkeypatch, in_place):
    monkeypatch.setattr(link, "IN_PLACE_BYTES", 3072 + (not in_place))
    rig = make_rig()
    assert (rig.worker._link.memory([0]) is not None) == in_place
    original = rig.fill(range(8))
    rig.save(range(8), range(8))
    rig.write(range(8), range(8))
    before = rig.fill(range(8, BLOCKS))
    assert rig.read([6, 1, 2, 7], [9, 20, 12, 23]).ok
    assert torch.equal(rig.content([9, 20, 12, 23]), original[[6, 1, 2, 7]])
    others = [block for block in range(8, BLOCKS) if block not in (9, 20, 12, 23)]
    assert torch.equal(rig.content(others), before[[block - 8 for block in others]])


@pytest.fixture
def steps_of_two(monkeypatch):
    """Blocks of a step; a piece has three."""
    monkeypatch.setattr(kv_file, "CACHED_BYTES", 2 * 6144 + 1)


@pytest.mark.parametrize("slots", [None, range(8)], ids=["staged", "into slots"])
def test_a_step_is_verified_before_it_reaches_a_block(make_rig, tmp_path, slots, staged_reads, steps_of_two):
    """Damage in the second step of the second piece: the first step has arrived, and is not claimed as lost."""
    rig = make_rig(io_threads=1)
    original = rig.fill(range(8))
    rig.save(range(8), range(8))
    rig.write(range(8), range(8))
    damage(tmp_path / "c.r0", rig.worker.row_bytes, 3)  # block 5
    before = rig.fill(range(10, 18))
    result = rig.read(range(8), range(10, 18), slots=slots)
    assert not result.ok and result.checksum_failed and "position 5" in result.error
    assert result.failed_blocks == (15, 16, 17) and result.nbytes == 5 * rig.worker.row_bytes
    assert torch.equal(rig.content(range(10, 15)), original[:5])
    assert torch.equal(rig.content(range(15, 18)), before[5:])


def test_nothing_is_read_after_a_step_whose_copy_failed(make_rig, monkeypatch, staged_reads, steps_of_two):
    rig = make_rig(io_threads=1)
    original = rig.fill(range(3))
    rig.save(range(3), range(3))
    rig.write(range(3), range(3))
    before = rig.fill(range(10, 13))
    load, asked = rig.worker._link.load, []

    def broken(groups, block_ids, *rest):
        asked.append(block_ids)
        raise RuntimeError("a bug")

    monkeypatch.setattr(rig.worker._link, "load", broken)
    result = rig.read(range(3), range(10, 13))
    assert not result.ok and result.failed_blocks == (10, 11, 12) and asked == [(10, 11)]
    assert torch.equal(rig.content(range(10, 13)), before)
    monkeypatch.setattr(rig.worker._link, "load", load)
    assert rig.read(range(3), range(10, 13)).ok and torch.equal(rig.content(range(10, 13)), original)


def test_reads_stage_no_more_than_steps_where_they_copy_themselves(make_rig, steps_of_two):
    assert make_rig(io_threads=2).worker._staging._memory.num_slots == 3 * 2


def test_threads_share_a_read_and_name_every_block_that_did_not_arrive(make_rig, tmp_path, staged_reads):
    """Two threads: the one that finds the damage must not hide what the other one did, nor claim it."""
    rig = make_rig(io_threads=2)
    original = rig.fill(range(16))
    rig.save(range(16), range(16))
    rig.write(range(16), range(16))
    damage(tmp_path / "c.r0", rig.worker.row_bytes, 7)  # block 9
    before = rig.fill(range(8, 24))
    result = rig.read(range(16), range(8, 24))
    arrived = sorted(set(range(16)) - {block - 8 for block in result.failed_blocks})
    assert not result.ok and result.corrupt and 17 in result.failed_blocks
    assert result.nbytes == len(arrived) * rig.worker.row_bytes
    assert torch.equal(rig.content([block + 8 for block in arrived]), original[arrived])
    untouched = [block - 8 for block in result.failed_blocks]
    assert torch.equal(rig.content(result.failed_blocks), before[untouched])


@pytest.mark.parametrize("harm", ["missing", "truncated", "key", "identity", "rank"])
def test_a_file_that_does_not_fit_fails_the_read(make_rig, tmp_path, harm):
    rig = make_rig()
    rig.fill(range(4))
    rig.save(range(4), range(4))
    rig.write(range(4), range(4))
    if harm == "missing":
        os.unlink(tmp_path / "c.r0")
    elif harm == "truncated":
        os.truncate(tmp_path / "c.r0", 5000)
    elif harm == "identity":
        rig.worker.identity = other_identity("kv_cache_dtype")
    elif harm == "rank":
        os.rename(tmp_path / "c.r0", tmp_path / "c.r1")
        rig.worker.rank = 1
    before = rig.content(range(BLOCKS))
    result = rig.read(range(4), range(10, 14), keys=make_keys(0, 1, 9, 3) if harm == "key" else None)
    assert not result.ok and result.failed_blocks == (10, 11, 12, 13) and result.nbytes == 0
    assert torch.equal(rig.content(range(BLOCKS)), before)


@pytest.mark.parametrize(
    ("number", "unreadable"),
    [
        (errno.EIO, True),
        (errno.EACCES, True),
        (errno.ESTALE, True),
        (errno.EMFILE, False),
        (errno.ENOMEM, False),
        (errno.ENOENT, False),
    ],
)
def test_a_file_that_cannot_be_read_is_told_from_a_process_that_runs_short(make_rig, monkeypatch, number, unreadable):
    rig = make_rig()
    rig.save(range(4), range(4))
    rig.write(range(4), range(4))

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    result = rig.read(range(4), range(4))
    monkeypatch.undo()
    assert not result.ok and result.unreadable == unreadable
    assert result.corrupt == (number == errno.ENOENT)


def test_a_write_that_fails_is_a_result_and_leaves_no_file(make_rig, tmp_path, monkeypatch):
    rig = make_rig()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    result = rig.write(range(4), range(4))
    assert not result.ok and "No space left" in result.error and result.failed_blocks == ()
    assert result.no_space and os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["save", "load", "read"])
def test_a_bug_in_a_copy_is_a_failed_result_with_a_traceback(make_rig, monkeypatch, caplog, kind, staged_reads):
    rig = make_rig()
    rig.save(range(4), range(4))
    rig.write(range(4), range(4))

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(rig.worker._link, "load", broken)
    monkeypatch.setattr(rig.worker._link, "save", broken)
    result = rig.read(range(4), range(4)) if kind == "read" else getattr(rig, kind)(range(4), range(4))
    assert not result.ok and "a bug" in result.error and "Traceback" in caplog.text
    assert result.failed_blocks == (() if kind == "save" else (0, 1, 2, 3))
    monkeypatch.undo()
    assert rig.save([0], [0]).ok, "the thread lives on"


def test_a_slot_or_block_that_does_not_exist_is_a_failed_result(make_rig):
    rig = make_rig()
    assert not rig.save([0], [SLOTS]).ok and not rig.save([0], [-1]).ok and not rig.load([0], [BLOCKS]).ok


def test_as_many_blocks_as_slots_or_a_failed_result(make_rig):
    rig = make_rig()
    for blocks, slots in (([0, 1], [0]), ([0], [0, 1]), ([], [0]), (range(4), range(3))):
        assert not rig.save(blocks, slots).ok and not rig.load(slots, blocks).ok


def test_results_come_once_and_are_counted_until_drained(make_rig):
    rig = make_rig()
    assert not rig.worker.wait(PATIENCE_S) and rig.worker.drain() == [], "nothing in flight: nothing to wait for"
    rig.worker.submit([Save(1, (0,), (0,)), Save(2, (1,), (1,))])
    assert rig.worker.in_flight == 2
    assert set(rig.finish(2)) == {1, 2}
    assert rig.worker.in_flight == 0 and rig.worker.drain() == []


def test_host_slots_go_over_the_link_in_pieces_of_its_size(make_rig, monkeypatch):
    pieces = []
    for name, at in (("load", 1), ("save", 0)):
        real = getattr(CpuLink, name)
        monkeypatch.setattr(
            CpuLink, name, lambda self, *args, real=real, at=at: (pieces.append(len(args[at])), real(self, *args))[1]
        )
    rig = make_rig(piece_blocks=5)
    saved = rig.fill(range(12))
    assert rig.save(range(12), range(12)).ok and rig.load(range(12), range(12, 24)).ok
    assert pieces == [5, 5, 2, 5, 5, 2]
    assert torch.equal(rig.content(range(12, 24)), saved)


def test_pieces_over_the_link_are_larger_than_those_of_a_file(monkeypatch):
    planes = planes_of(LAYOUTS["cpu bf16"](), BLOCKS)  # of 6,144 bytes per block
    assert link_for(BlockCopier(planes), planes, CopyPlan()).piece_blocks == link.CPU_PIECE_BYTES // 6144
    monkeypatch.setattr(link, "CPU_PIECE_BYTES", 6144)
    assert link_for(BlockCopier(planes), planes, CopyPlan()).piece_blocks == 3


class GatedLink:
    """Copies like the real one in a thread of its own, but logs every piece and holds it at a gate."""

    in_place, layers = False, ()
    memory = staticmethod(lambda block_ids: None)

    def __init__(self, link):
        self.real, self.close, self.refuse = link, link.close, link.refuse
        self.log, self.entered, self.gate = [], threading.Event(), threading.Event()

    def _piece(self, name):
        self.log.append(name)
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)

    def save(self, *piece):
        self._piece("save")
        self.real.save(*piece)

    def load(self, *piece):
        self._piece("load")
        self.real.load(*piece)


def gate(rig):
    rig.worker._link = GatedLink(rig.worker._link)
    return rig.worker._link


def test_a_load_waits_for_one_piece_of_a_save(make_rig):
    rig = make_rig()
    link = gate(rig)
    rig.worker.submit([Save(1, tuple(range(9)), tuple(range(9)))])
    assert link.entered.wait(PATIENCE_S)
    rig.worker.submit([Save(2, (9,), (9,)), Load(3, (10, 11, 12, 13), (10, 11, 12, 13))])
    link.gate.set()
    rig.finish(3)
    assert link.log == ["save", "load", "load", "save", "save", "save"]


def test_a_prefetch_for_which_a_request_waits_overtakes_the_others(make_rig):
    rig = make_rig()
    link = gate(rig)
    rig.worker.submit([Load(op_id, (op_id,) * 5, tuple(range(5)), prefetch=True) for op_id in (1, 2)])
    assert link.entered.wait(PATIENCE_S)
    rig.worker.submit([Load(3, (3,), (13,))])
    rig.worker.hurry([2, 4])
    rig.worker.submit([Load(4, (4,), (14,), prefetch=True)])
    link.gate.set()
    results = rig.finish(4)
    assert all(result.ok for result in results.values())
    assert list(results) == [3, 2, 1, 4], "what was not there yet is not hurried"


def test_a_prefetch_from_a_file_for_which_a_request_waits_overtakes_the_others(make_rig):
    rig = make_rig(io_threads=1)
    rig.fill(range(4))
    rig.save(range(4), range(4))
    rig.write(range(4), range(4))
    opened, is_hurried = threading.Event(), threading.Event()

    class Held(Task):
        def step(self):
            opened.set()
            assert is_hurried.wait(PATIENCE_S)

        def cancel(self):
            pass

    rig.worker._files.put(Priority.READ, Held())
    assert opened.wait(PATIENCE_S)
    reads = [dataclasses.replace(rig.read_op(range(4), range(4)), prefetch=True) for _ in range(3)]
    rig.worker.submit(reads)
    rig.worker.hurry([reads[1].op_id])
    is_hurried.set()
    assert list(rig.finish(3)) == [reads[1].op_id, reads[0].op_id, reads[2].op_id]


@pytest.mark.parametrize("reads", ["when it is hurried", "before it is hurried"])
def test_a_read_that_is_hurried_is_urgent_on_the_link_too(make_rig, monkeypatch, reads):
    rig = make_rig(io_threads=1)
    rig.fill(range(4))
    rig.save(range(4), range(4))
    rig.write(range(4), range(4))
    link, queue, is_hurried = gate(rig), rig.worker._loads, threading.Event()
    rig.worker.submit([Load(0, (5,), (11,))])
    assert link.entered.wait(PATIENCE_S)  # and stays there; what is read waits behind it
    at_the_queue, put = threading.Event(), queue.put

    def put_later(priority, task):
        at_the_queue.set()
        assert is_hurried.wait(PATIENCE_S)
        put(priority, task)

    if reads == "when it is hurried":
        monkeypatch.setattr(queue, "put", put_later)
    read = dataclasses.replace(rig.read_op(range(4), range(4)), prefetch=True)
    rig.worker.submit([read])
    with queue._changed:
        waiting = queue._waiting[Priority.PREFETCH]
        assert reads == "when it is hurried" or queue._changed.wait_for(lambda: len(waiting) == 2, PATIENCE_S)
    assert reads == "before it is hurried" or at_the_queue.wait(PATIENCE_S)
    rig.worker.hurry([read.op_id])
    is_hurried.set()
    with queue._changed:
        assert queue._changed.wait_for(lambda: len(queue._waiting[Priority.LOAD]) == 2, PATIENCE_S), "two pieces"
        assert not queue._waiting[Priority.PREFETCH]
    link.gate.set()
    assert all(result.ok for result in rig.finish(2).values())


def test_reads_wait_for_staging_instead_of_filling_memory(make_rig, monkeypatch):
    """The copy thread stands still: three pieces are read (``io_threads + 1``), both threads wait for a fourth."""
    rig = make_rig(io_threads=2)
    original = rig.fill(range(12))
    rig.save(range(12), range(12))
    rig.write(range(12), range(12))
    link, staging = gate(rig), rig.worker._staging
    asked = threading.Semaphore(0)
    take = staging.take
    monkeypatch.setattr(staging, "take", lambda num_rows: (asked.release(), take(num_rows))[1])
    rig.worker.submit([rig.read_op(range(12), range(12)) for _ in range(3)])
    for _ in range(5):
        assert asked.acquire(timeout=PATIENCE_S)
    assert link.entered.wait(PATIENCE_S)
    assert staging._free == [] and link.log == ["load"]
    link.gate.set()
    assert all(result.ok for result in rig.finish(3).values())
    staging.check_idle()
    assert torch.equal(rig.content(range(12)), original)


def test_a_result_is_not_reported_before_the_bytes_are_there(make_rig):
    rig = make_rig()
    rig.save(range(3), range(3))
    rig.write(range(3), range(3))
    link = gate(rig)
    rig.worker.submit([rig.read_op(range(3), range(3))])
    assert link.entered.wait(PATIENCE_S)
    assert rig.worker.drain() == [] and rig.worker.in_flight == 1
    link.gate.set()
    assert len(rig.finish(1)) == 1


def wait_for_stop(queue):
    """Blocks a piece until the queue has been told to stop."""
    with queue._changed:
        assert queue._changed.wait_for(lambda: queue._stopped, PATIENCE_S)


def test_shutdown_finishes_writes_and_fails_the_rest(make_rig, tmp_path, monkeypatch):
    rig = make_rig()
    original = rig.fill(range(6))
    rig.save(range(6), range(6))
    save = rig.worker._link.save
    entered = threading.Event()

    def held_save(*args):
        entered.set()
        wait_for_stop(rig.worker._saves)
        save(*args)

    monkeypatch.setattr(rig.worker._link, "save", held_save)
    rig.worker.submit([Save(1, tuple(range(6, 15)), tuple(range(6, 15)))])
    assert entered.wait(PATIENCE_S)
    write = Write(3, "c", str(tmp_path / "c.r{rank}"), tuple(range(6)), make_keys(*range(6)))
    rig.worker.submit([Load(2, (1, 2), (1, 2)), write])
    rig.worker.shutdown(PATIENCE_S)
    results = {result.op_id: result for result in rig.worker.drain()}
    assert {op_id: result.ok for op_id, result in results.items()} == {1: False, 2: False, 3: True}
    assert results[2].failed_blocks == (1, 2) and "shut down" in results[1].error
    out = torch.zeros_like(original)
    read_blocks(tmp_path / "c.r0", range(6), make_keys(*range(6)), out, IDENTITY, 0)
    assert torch.equal(out, original)


def test_shutdown_gives_up_writes_after_its_time(make_rig, tmp_path, monkeypatch):
    rig = make_rig(io_threads=1)
    entered = threading.Event()

    def slow(fd):
        entered.set()
        wait_for_stop(rig.worker._files)

    monkeypatch.setattr(os, "fdatasync", slow)
    rig.worker.submit([Write(1, "c", str(tmp_path / "c.r{rank}"), tuple(range(9)), make_keys(*range(9)))])
    assert entered.wait(PATIENCE_S)
    rig.worker.shutdown(flush_timeout_s=0.0)
    (result,) = rig.worker.drain()
    assert not result.ok and os.listdir(tmp_path) == []
    with pytest.raises(AssertionError, match="after shutdown"):
        rig.worker.submit([Save(2, (), ())])


def test_operations_are_plain_data():
    for op in (Save(1, (2,), (3,)), Read(1, "c", "p", (0,), make_keys(0), (1,), None)):
        assert pickle.loads(pickle.dumps(op)) == op and dataclasses.asdict(op)
    assert pickle.loads(pickle.dumps(IDENTITY)).digest() == IDENTITY.digest()


def test_an_fp8_store_takes_half_the_bytes_in_every_tier_and_comes_back_encoded_once(make_rig, tmp_path):
    caches = [torch.randn(BLOCKS, 2, 16, 96).to(torch.bfloat16) for _ in range(2)]
    planes = planes_of(caches, BLOCKS)
    heads = heads_of(caches, BLOCKS, HeadShape(2, 48))
    copier = BlockCopier(planes, heads, fp8=True)
    rig = make_rig(copier=copier, planes=planes)
    blocks, encoded = [3, 4, 9, 0], torch.zeros(4, copier.row_bytes, dtype=torch.uint8)
    gather_fp8_reference(heads, copier.layout, blocks, encoded)
    assert rig.save(blocks, range(4)).ok and rig.write(range(4), range(4)).ok
    assert 0.5 < rig.worker.row_bytes / copier.block_bytes < 0.51
    assert (tmp_path / "c.r0").stat().st_size < 4 * copier.row_bytes + 8192
    assert rig.load(range(4), range(12, 16)).ok and rig.read(range(4), range(16, 20)).ok
    scatter_heads_reference(encoded, heads, copier.layout, range(20, 24))
    assert torch.equal(rig.content(range(12, 16)), rig.content(range(20, 24)))
    assert torch.equal(rig.content(range(16, 20)), rig.content(range(20, 24)))
    original, arrived = (caches[0][list(ids)].float() for ids in (blocks, range(12, 16)))
    error = (arrived - original).abs()
    assert error.max() > 0 and (error <= original.abs() * 2**-4 + 2**-9).all()


@pytest.mark.parametrize("kind", [Load, Read])
@pytest.mark.parametrize("shares_cores", [True, False])
def test_a_prefetch_goes_in_small_pieces_where_it_takes_cores_from_the_forward_pass(
    kind, shares_cores, make_rig, monkeypatch, staged_reads
):
    rig = make_rig(io_threads=1)
    original = rig.fill(range(6))
    rig.save(range(6), range(6))
    rig.write(range(6), range(6))
    monkeypatch.setattr(transfer, "PREFETCH_PIECE_BYTES", 2 * rig.worker.row_bytes)
    rig.worker._link.in_place = shares_cores
    sizes = []
    load = rig.worker._link.load
    monkeypatch.setattr(
        rig.worker._link, "load", lambda groups, ids, *rest: sizes.append(len(ids)) or load(groups, ids, *rest)
    )
    for prefetch in (True, False):
        op = rig.read_op(range(6), range(10, 16)) if kind is Read else Load(7, tuple(range(6)), tuple(range(10, 16)))
        rig.worker.submit([dataclasses.replace(op, prefetch=prefetch)])
        assert rig.finish(1)[op.op_id].ok
        assert torch.equal(rig.content(range(10, 16)), original)
    assert sizes == ([2, 2, 2] if shares_cores else [3, 3]) + [3, 3]
