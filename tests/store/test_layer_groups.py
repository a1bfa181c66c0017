"""Loads in groups of layers: the cut, the order of the copies, and what a pass has to wait for."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.kernels.kv_copy import BlockCopier, block_bytes, plane_bytes, plane_numbers, planes_of
from memos_vllm.kernels.reference import gather_reference, scatter_reference
from memos_vllm.store import host_memory, kv_file
from memos_vllm.store.host_memory import RowGroup
from memos_vllm.store.jobs import Job
from memos_vllm.store.layer_groups import layer_groups
from memos_vllm.store.layered_load import LayeredLoad
from memos_vllm.store.link import CpuLink, DeviceLink
from memos_vllm.store.pipeline import Method
from memos_vllm.store.transfer import Load, Read, Save, TransferWorker, Write
from tests.store.simulated_device import SimulatedDevice
from tests.store.store_factories import make_identity, make_keys
from tests.store.test_pipeline import ORDERS, FixedPlan

BLOCKS, SLOTS, PIECE = 12, 12, 2
PATIENCE_S = 60.0


def make_planes(widths=(7, 7, 7)):
    return planes_of([torch.zeros(2, BLOCKS, 5, width) for width in widths], BLOCKS)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_groups_are_as_many_as_asked_and_about_even(widths, num_groups):
    planes = [torch.zeros(2, width, dtype=torch.uint8) for width in widths]
    groups = layer_groups(planes, num_groups)
    assert len(groups) == min(num_groups, len(planes))
    assert [group.planes.start for group in groups] == [0, *(group.planes.stop for group in groups[:-1])]
    assert groups[-1].planes.stop == len(planes)
    for group in groups:
        assert group.num_planes > 0
        assert group.columns.start == sum(map(plane_bytes, planes[: group.planes.start]))
        assert group.row_bytes == sum(map(plane_bytes, planes[group.planes]))
    if len(set(widths)) == 1:
        counts = [group.num_planes for group in groups]
        assert max(counts) - min(counts) <= 1


def test_layers_that_share_their_kv_have_the_same_planes():
    first, second = torch.zeros(2, BLOCKS, 5, 7), torch.zeros(BLOCKS, 5, 7)
    assert plane_numbers([first, second, first], BLOCKS) == [(0, 1), (2,), (0, 1)]


class TestLayeredLoad:
    """One load in two groups; ``calls`` has what it says, and the Result of its job."""

    @pytest.fixture(autouse=True)
    def load(self):
        self.calls = []
        job = Job(op := Load(1, (0, 1), (6, 7)), 64, 2, lambda op, result: self.calls.append(result.ok), 2)
        self.load = LayeredLoad(op, job, 2, lambda: self.calls.append("begun"))

    def test_the_first_group_has_landed_when_all_of_its_pieces_and_its_task_have(self):
        pieces = [self.load.piece(0, [block]) for block in (6, 7)]
        self.load.end(0)
        pieces[0](None)
        assert self.calls == []
        pieces[1](None)
        assert self.calls == ["begun"]
        self.load.piece(1, [6, 7])(None)
        self.load.end(1)
        assert self.calls == ["begun", True]

    def test_it_has_not_landed_before_its_task_has_ended(self):
        self.load.piece(0, [6])(None)
        assert self.calls == [], "further pieces may follow"
        self.load.end(0)
        assert self.calls == ["begun"]

    @pytest.mark.parametrize("where", ["piece", "task"])
    def test_a_first_group_that_failed_has_not_landed(self, where):
        self.load.piece(0, [6, 7])(OSError() if where == "piece" else None)
        self.load.end(0, "shut down" if where == "task" else None)
        self.load.end(1)
        assert self.calls == [False]

    def test_who_waits_goes_on_when_all_copies_of_the_group_were_issued(self):
        seen = []
        self.load.issued(1, "first")
        thread = threading.Thread(target=lambda: seen.extend(self.load.wait(1)))
        thread.start()
        self.load.issued(1, "second")
        self.load.end(0)
        assert seen == []
        self.load.end(1)
        thread.join(PATIENCE_S)
        assert seen == ["first", "second"]

    @pytest.mark.parametrize("where", ["piece", "task"])
    def test_who_waits_for_a_load_that_failed_is_told_so(self, where):
        """Its Result may come a step later; the pass must not go on with what is in the blocks."""
        self.load.end(0)
        piece = self.load.piece(1, [6])
        if where == "piece":
            piece(OSError())
        self.load.end(1, "shut down" if where == "task" else None)
        with pytest.raises(RuntimeError, match="did not arrive"):
            self.load.wait(1)
        with pytest.raises(RuntimeError, match="did not arrive"):
            self.load.wait(0)


class Device:
    """A link in three groups over a simulated device; blocks 6-11 are loaded from rows of the host."""

    def __init__(self, method, order, removed=()):
        self.planes = make_planes()
        self.groups = layer_groups(self.planes, 3)
        self.device = SimulatedDevice(self.planes, PIECE, ORDERS[order], removed, self.groups)
        self.width = self.device.copier.block_bytes
        self.link = DeviceLink(
            self.device, torch.device("cpu"), self.width, len(self.planes), FixedPlan(method), PIECE, self.groups
        )
        self.rows = torch.randint(0, 256, (6, self.width), dtype=torch.uint8)
        self.landings = threading.Semaphore(0)

    def content(self):
        rows = torch.empty(6, self.width, dtype=torch.uint8)
        gather_reference(self.planes, range(6, 12), rows)
        return rows

    def right_groups(self):
        """What a pass reads that waits for each group before it reads it, and for nothing else."""
        compute = self.device.compute
        zeros = torch.zeros(6, self.width, dtype=torch.uint8)
        compute.put(lambda: scatter_reference(zeros, self.planes, range(6, 12)))  # the blocks' last user
        after = compute.record()
        host, seen = self.rows.clone(), []

        def read(group):
            seen.append(torch.equal(self.content()[:, group.columns], self.rows[:, group.columns]))

        for number, group in enumerate(self.groups):
            for begin in range(0, 6, PIECE):
                rows = list(range(begin, begin + PIECE))
                event = self.link.load(
                    [RowGroup(host, rows, pinned=True)], [6 + row for row in rows], after, self.landed, number
                )
                compute.wait(event)
            compute.put(lambda group=group: read(group))
        compute.record().synchronize()
        for _ in range(9):
            assert self.landings.acquire(timeout=PATIENCE_S)
        host.fill_(0xEE)
        assert self.link.close(PATIENCE_S)
        return seen == [True] * 3 and torch.equal(self.content(), self.rows)

    def landed(self, error):
        assert error is None
        self.landings.release()


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("order", ORDERS)
def test_a_pass_reads_the_bytes_of_each_group_in_every_order(order, method):
    assert Device(method, order).right_groups()


@pytest.mark.parametrize("method", Method)
def test_a_pass_that_does_not_wait_for_a_group_reads_other_bytes(method):
    from_stream = "load copy" if method is Method.DMA else "load kernel"
    assert not Device(method, "lazy", removed={("compute", from_stream)}).right_groups()


def test_the_ring_is_whole_before_the_first_load():
    """A request that runs already must not meet a GPU without memory for another buffer."""
    device = Device(Method.STAGED, "lazy")
    assert all(buffer is not None for buffer in device.link._loads._ring._buffers)
    assert device.link.close(PATIENCE_S)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("removed", [False, True], ids=["it waits", "it does not wait"])
def test_a_pass_begins_with_the_first_group_and_waits_for_the_events_of_the_others(method, removed):
    """From the worker's word that a load has begun to the read of the last layer; no later group has landed then."""
    stream = "load copy" if method is Method.DMA else "load kernel"
    bench = Device(method, "eager compute", removed={("compute", stream)} if removed else ())
    worker = TransferWorker(bench.link, SLOTS, make_identity(), 0, 1, pin_memory=False)
    compute, opened, landings, seen = bench.device.compute, threading.Event(), [], []
    scatter_reference(bench.rows, bench.planes, range(6))
    worker.submit([Save(1, tuple(range(6)), tuple(range(6)))], compute.record())
    while not worker.drain():
        assert worker.wait(PATIENCE_S)

    def gate(event):
        if event.stream is not compute:
            landings.append(event)
            assert len(landings) == 1 or opened.wait(PATIENCE_S)

    bench.device.gate = gate
    op = Load(2, (0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11), in_groups=True)
    worker.submit([op], compute.record())  # one piece per group: two blocks are six of a third of the layers
    assert worker.wait(PATIENCE_S) and worker.take_begun() == {2}
    for group in range(3):
        for event in worker.wait_for_layers(2, group):
            compute.wait(event)
    compute.put(lambda: seen.append(torch.equal(bench.content(), bench.rows)))
    opened.set()
    compute.record().synchronize()
    worker.shutdown(PATIENCE_S)
    assert seen == [not removed]
    assert [result.ok for result in worker.drain()] == [True]


class Rig:
    """A transfer worker over CPU blocks; loads of requests come in three groups, whose copies a test can hold."""

    def __init__(self):
        self.planes = make_planes()
        self.width = block_bytes(self.planes)
        self.link = HeldLink(BlockCopier(self.planes), self.planes, layers=layer_groups(self.planes, 3))
        self.worker = TransferWorker(self.link, SLOTS, make_identity(), 0, 2, pin_memory=False)
        self.rows = torch.randint(0, 256, (6, self.width), dtype=torch.uint8)
        scatter_reference(self.rows, self.planes, range(6))
        self.run(Save(1, tuple(range(6)), tuple(range(6))))

    def run(self, *ops):
        self.worker.submit(ops)
        return self.finish(len(ops))

    def finish(self, count):
        results = {}
        while len(results) < count:
            self.worker.take_begun()
            assert self.worker.wait(PATIENCE_S)
            results |= {result.op_id: result for result in self.worker.drain()}
        return results

    def content(self, block_ids):
        rows = torch.empty(len(block_ids), self.width, dtype=torch.uint8)
        gather_reference(self.planes, block_ids, rows)
        return rows


class HeldLink(CpuLink):
    """Logs the group and the blocks of every load; a group's copies wait until it is open."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log, self.failing = [], None
        self.open = {group: threading.Event() for group in (None, 0, 1, 2)}
        for event in self.open.values():
            event.set()

    def load(self, groups, block_ids, after, landed, layers=None):
        assert self.open[layers].wait(PATIENCE_S)
        if layers is not None and layers == self.failing:
            raise RuntimeError("device lost")
        self.log.append((layers, tuple(block_ids)))
        super().load(groups, block_ids, after, landed, layers)


@pytest.fixture
def rig(monkeypatch):
    row = block_bytes(make_planes())
    monkeypatch.setattr(kv_file, "PIECE_BYTES", 2 * row)  # two blocks to a piece, six of a third of the layers
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 5 * row)
    rig = Rig()
    yield rig
    for event in rig.link.open.values():
        event.set()
    rig.worker.shutdown(PATIENCE_S)


def test_loads_of_one_step_go_group_by_group_in_pieces_of_as_many_bytes_as_whole_blocks(rig):
    """Two blocks to a piece, hence six of a third of their layers, whichever load they belong to."""
    ops = [
        Load(2, (0, 1, 2, 3), (6, 7, 8, 9), in_groups=True),
        Load(3, (4, 5, 0, 1), (10, 11, 4, 5), in_groups=True),
    ]
    results = rig.run(*ops)
    assert rig.link.log == [(group, blocks) for group in range(3) for blocks in [(6, 7, 8, 9, 10, 11), (4, 5)]]
    assert torch.equal(rig.content([*range(6, 12), 4, 5]), rig.rows[[*range(6), 0, 1]])
    assert [results[op].nbytes for op in (2, 3)] == [4 * rig.width] * 2
    assert all(result.ok and not result.failed_blocks for result in results.values())


def test_the_time_of_a_step_is_counted_once(rig, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("memos_vllm.store.jobs.time.perf_counter", lambda: next(clock))
    results = rig.run(Load(2, (0, 1, 2), (6, 7, 8), in_groups=True), Load(3, (4,), (10,), in_groups=True))
    # Begun at 0 and 10, ended at 20 and 30: 20 s each of the clock, three quarters and one quarter of them.
    assert [results[op].seconds for op in (2, 3)] == [15.0, 5.0]


def test_a_load_has_begun_when_its_first_group_is_there(rig):
    rig.link.open[1].clear()
    rig.worker.submit([Load(2, (0, 1), (6, 7), in_groups=True)])
    assert rig.worker.wait(PATIENCE_S), "whoever waits for a result is told of this too"
    assert rig.worker.take_begun() == {2} and rig.worker.take_begun() == set()
    assert rig.worker.drain() == []
    first = rig.link.layers[0].columns
    assert torch.equal(rig.content([6, 7])[:, first], rig.rows[:2, first])

    waited = threading.Event()
    thread = threading.Thread(target=lambda: (rig.worker.wait_for_layers(2, 1), waited.set()))
    thread.start()
    assert not waited.is_set()
    rig.link.open[1].set()
    thread.join(PATIENCE_S)
    second = rig.link.layers[1].columns
    assert torch.equal(rig.content([6, 7])[:, second], rig.rows[:2, second])
    rig.finish(1)
    assert rig.worker.wait_for_layers(2, 2) == [], "nothing is left to wait for"


def test_prefetches_and_reads_come_whole(rig, tmp_path):
    path, keys = str(tmp_path / "chunk.{rank}"), make_keys(0, 1)
    assert rig.run(Write(2, "chunk", path, (0, 1), keys))[2].ok
    rig.link.log.clear()
    rig.run(
        Load(3, (0, 1), (6, 7), prefetch=True),
        Read(4, "chunk", path, (0, 1), keys, (8, 9), (8, 9)),
    )
    assert sorted(rig.link.log) == [(None, (6, 7)), (None, (8, 9))]
    assert rig.worker.take_begun() == set()


def test_a_piece_that_cannot_be_issued_is_tried_once_more(rig, monkeypatch):
    """Memory for a table may be short for a moment, and the request may run already."""
    load, refusals = rig.link.load, iter([RuntimeError("out of memory")])

    def refuse_once(groups, block_ids, after, landed, layers=None):
        if layers == 1 and (error := next(refusals, None)):
            raise error
        load(groups, block_ids, after, landed, layers)

    monkeypatch.setattr(rig.link, "load", refuse_once)
    assert rig.run(Load(2, (0, 1), (6, 7), in_groups=True))[2].ok
    assert next(refusals, None) is None
    assert torch.equal(rig.content([6, 7]), rig.rows[:2])


def test_a_load_that_is_not_to_come_in_groups_comes_whole(rig):
    rig.run(Load(2, (0, 1), (6, 7)))
    assert rig.link.log == [(None, (6, 7))] and rig.worker.take_begun() == set()


def test_a_load_that_has_ended_has_not_begun(rig):
    """Else it would be kept for ever as one that is on its way."""
    rig.worker.submit([Load(2, (0, 1), (6, 7), in_groups=True)])
    while not rig.worker._results:
        assert rig.worker.wait(PATIENCE_S)
    assert rig.worker.take_begun() == set()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_group_that_fails_fails_every_block(rig, failing):
    rig.link.failing = failing
    result = rig.run(Load(2, (0, 1), (6, 7), in_groups=True))[2]
    assert not result.ok and result.failed_blocks == (6, 7) and "device lost" in result.error
    assert result.nbytes == failing * 2 * rig.width // 3
    rig.link.failing = None
    assert rig.run(Load(3, (0, 1), (6, 7), in_groups=True))[3].ok
    assert torch.equal(rig.content([6, 7]), rig.rows[:2])


def test_a_first_group_that_fails_has_not_begun(rig):
    rig.link.failing = 0
    rig.worker.submit([Load(2, (0, 1), (6, 7), in_groups=True)])
    assert rig.worker.wait(PATIENCE_S)
    assert [result.op_id for result in rig.worker.drain()] == [2] and rig.worker.take_begun() == set()


def test_nobody_waits_for_a_group_that_a_shutdown_cancelled(rig):
    rig.link.open[0].clear()
    rig.worker.submit([Load(2, (0, 1), (6, 7), in_groups=True)])
    thread = threading.Thread(target=lambda: rig.worker.wait_for_layers(2, 2))
    thread.start()
    stopping = threading.Thread(target=lambda: rig.worker.shutdown(0.0))
    stopping.start()
    rig.link.open[0].set()
    for each in (stopping, thread):
        each.join(PATIENCE_S)
        assert not each.is_alive()
