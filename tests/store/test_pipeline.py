"""The order of copies on a device that runs them in the worst order: every wait is needed, and enough."""

import itertools
import threading

import pytest
import torch

from memos_vllm.kernels.kv_copy import planes_of
from memos_vllm.kernels.reference import gather_reference, scatter_reference
from memos_vllm.store.copy_planner import CopyPlan
from memos_vllm.store.host_memory import RowGroup
from memos_vllm.store.link import DeviceLink
from memos_vllm.store.pipeline import Method, Ring
from tests.store.simulated_device import NAMES, SimulatedDevice

BLOCKS, PIECE = 12, 2
PATIENCE_S = 60.0
ORDERS = {
    "lazy": (),
    "eager": ("compute", *NAMES),
    "eager copies": ("load copy", "save copy"),
    "eager kernels": ("compute", "load kernel", "save kernel"),
    "eager compute": ("compute",),
    "late compute": NAMES,
}


class FixedPlan(CopyPlan):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def choose(self, *_):
        return self.method


class Bench:
    """A link over a simulated device; blocks 0-5 hold ``original``, rows of ``host`` 0xA5."""

    def __init__(self, method=Method.STAGED, eager=(), removed=()):
        self.planes = planes_of([torch.zeros(2, BLOCKS, 5, 7) for _ in range(2)], BLOCKS)
        self.device = SimulatedDevice(self.planes, PIECE, eager, removed)
        self.width = self.device.copier.block_bytes
        self.link = DeviceLink(self.device, torch.device("cpu"), self.width, len(self.planes), FixedPlan(method))
        self.host = torch.full((6, self.width), 0xA5, dtype=torch.uint8)
        self.original = torch.randint(0, 256, (6, self.width), dtype=torch.uint8)
        self.landed, self.landings = [], threading.Semaphore(0)

    def groups(self, rows):
        return [RowGroup(self.host, rows, pinned=True)]

    def note(self, error):
        self.landed.append(error)
        self.landings.release()

    def finish(self, count):
        for _ in range(count):
            assert self.landings.acquire(timeout=PATIENCE_S)

    def forward(self, work):
        """Queues work of the forward pass and returns the event behind it."""
        self.device.compute.put(work)
        return self.device.compute.record()

    def write(self, rows, block_ids):
        scatter_reference(rows, self.planes, block_ids)

    def content(self, block_ids):
        rows = torch.empty(len(block_ids), self.width, dtype=torch.uint8)
        gather_reference(self.planes, block_ids, rows)
        return rows

    def save(self):
        """A pass writes blocks 0-5; they are saved; what comes after the landing may overwrite them."""
        after = self.forward(lambda: self.write(self.original, range(6)))
        for begin in range(0, 6, PIECE):
            rows = range(begin, begin + PIECE)
            self.link.save(list(rows), self.groups(rows), after, self.note)
        self.finish(3)
        arrived = self.host.clone()
        self.write(torch.zeros_like(self.original), range(6))
        self.device.compute.record().synchronize()
        return torch.equal(arrived, self.original) and torch.equal(self.host, self.original)

    def load(self):
        """A pass that was queued earlier still writes to blocks 6-11; rows are loaded into them."""
        self.host.copy_(self.original)
        after = self.forward(lambda: self.write(torch.zeros_like(self.original), range(6, 12)))
        for begin in range(0, 6, PIECE):
            rows = range(begin, begin + PIECE)
            self.link.load(self.groups(rows), [6 + row for row in rows], after, self.note)
        self.finish(3)
        arrived = self.content(range(6, 12))
        self.host.fill_(0xEE)  # the rows are reused
        self.device.compute.record().synchronize()
        return torch.equal(arrived, self.original) and torch.equal(self.content(range(6, 12)), self.original)


@pytest.fixture
def make_bench():
    benches = []

    def make_bench(*args, **kwargs):
        benches.append(Bench(*args, **kwargs))
        return benches[-1]

    yield make_bench
    for bench in benches:
        assert bench.link.close(PATIENCE_S)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("order", ORDERS)
def test_bytes_are_right_in_every_order(make_bench, order, method):
    assert make_bench(method, ORDERS[order]).save()
    assert make_bench(method, ORDERS[order]).load()


# Which order shows that a wait is needed.
WAITS = [
    ("save", Method.STAGED, "save kernel", "compute", "lazy"),
    ("save", Method.STAGED, "save copy", "save kernel", "eager copies"),
    ("save", Method.DIRECT, "save kernel", "compute", "lazy"),
    ("save", Method.DMA, "save copy", "compute", "lazy"),
    ("load", Method.STAGED, "load kernel", "compute", "lazy"),
    ("load", Method.STAGED, "load kernel", "load copy", "lazy"),
    ("load", Method.DIRECT, "load kernel", "compute", "lazy"),
    ("load", Method.DMA, "load copy", "compute", "lazy"),
]


@pytest.mark.parametrize(("direction", "method", "waiting", "awaited", "order"), WAITS)
def test_every_wait_is_needed(make_bench, direction, method, waiting, awaited, order):
    assert getattr(make_bench(method, ORDERS[order]), direction)()
    assert not getattr(make_bench(method, ORDERS[order], removed={(waiting, awaited)}), direction)()


def test_all_waits_are_in_the_list(make_bench, monkeypatch):
    """A new wait in the pipeline needs its line above."""
    seen = set()
    wait = type(SimulatedDevice([torch.zeros(2, 4)], 1).compute).wait
    monkeypatch.setattr(
        "tests.store.simulated_device.SimulatedStream.wait",
        lambda self, event: (seen.add((self.name, event.stream.name)), wait(self, event))[1],
    )
    for method in Method:
        assert make_bench(method).save() and make_bench(method).load()
    assert seen == {(waiting, awaited) for _, _, waiting, awaited, _ in WAITS}


@pytest.mark.parametrize("direction", ["save", "load"])
def test_a_landing_that_is_not_waited_for_is_seen(make_bench, direction, monkeypatch):
    monkeypatch.setattr("tests.store.simulated_device.SimulatedEvent.synchronize", lambda self: None)
    assert not getattr(make_bench(), direction)()


@pytest.mark.parametrize("early", [False, True], ids=["held until landed", "given back early"])
@pytest.mark.parametrize(("direction", "order"), [("save", "eager kernels"), ("load", "eager copies")])
def test_a_buffer_is_not_reused_before_its_piece_landed(make_bench, direction, order, early, monkeypatch):
    """All three pieces are issued before the first is looked at, so a buffer that is free too soon is taken again."""
    if early:
        take, give_back = Ring.take, Ring.give_back
        monkeypatch.setattr(Ring, "take", lambda self: (place := take(self), give_back(self, place))[0])
        monkeypatch.setattr(Ring, "give_back", lambda self, place: None)
    bench, issued, all_issued = make_bench(eager=ORDERS[order]), [], threading.Event()
    landing = (bench.link._loads if direction == "load" else bench.link._saves)._landing
    expect = landing.expect

    def count(*piece):
        expect(*piece)
        issued.append(piece)
        if len(issued) == 3:
            all_issued.set()

    monkeypatch.setattr(landing, "expect", count)
    monkeypatch.setattr(bench.device, "gate", lambda event: all_issued.wait(PATIENCE_S))
    assert getattr(bench, direction)() is not early


def test_a_full_ring_holds_the_next_piece_until_one_landed(make_bench, monkeypatch):
    bench, gate = make_bench(), threading.Event()
    bench.device.gate = lambda event: gate.wait(PATIENCE_S)
    ring, asked, issued = bench.link._loads._ring, threading.Semaphore(0), []
    take = ring.take
    monkeypatch.setattr(ring, "take", lambda: (asked.release(), take())[1])

    def issue():
        for piece in range(5):
            bench.link.load(bench.groups([0, 1]), [0, 1], None, bench.note)
            issued.append(piece)

    thread = threading.Thread(target=issue)
    thread.start()
    for _ in range(4):
        assert asked.acquire(timeout=PATIENCE_S)
    assert issued == [0, 1, 2] and bench.landed == [] and ring._free == []
    gate.set()
    thread.join(PATIENCE_S)
    bench.finish(5)
    assert bench.landed == [None] * 5


@pytest.mark.parametrize("failing", ["copy_in", "scatter"])
def test_a_piece_that_cannot_be_issued_leaves_nothing_under_way(make_bench, failing, monkeypatch):
    """The copy before the kernel was given already; the rows must not be anybody's before it ran."""
    bench = make_bench()

    def broken(*_):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(bench.device, failing, broken)
    with pytest.raises(RuntimeError, match="launch failed"):
        bench.link.load(bench.groups([0, 1]), [6, 7], None, bench.note)
    assert not bench.device.streams["load copy"].queue and bench.landed == []
    monkeypatch.undo()
    assert bench.load()


def test_a_device_that_fails_is_an_error_of_the_piece_and_not_the_end_of_the_thread(make_bench, monkeypatch):
    bench, fails = make_bench(), itertools.chain([True], itertools.repeat(False))

    def gate(event):
        if next(fails):
            raise RuntimeError("device lost")

    bench.device.gate = gate
    bench.link.load(bench.groups([0, 1]), [6, 7], None, bench.note)
    bench.finish(1)
    assert isinstance(bench.landed.pop(), RuntimeError)
    assert bench.load()


def test_an_error_in_who_is_told_does_not_keep_the_next_pieces(make_bench):
    bench = make_bench()

    def raises(error):
        raise RuntimeError("a bug of ours")

    for _ in range(5):  # more than the ring has places
        bench.link.load(bench.groups([0, 1]), [6, 7], None, raises)
    assert bench.load()


def test_who_waits_for_a_place_of_the_ring_is_let_go_when_no_more_is_taken(make_bench):
    """A device that does not answer: the thread of a queue would else stay in the ring until the process ends."""
    bench, gate, refused = make_bench(), threading.Event(), []
    bench.device.gate = lambda event: gate.wait(PATIENCE_S)

    def issue():
        try:
            for _ in range(4):
                bench.link.load(bench.groups([0, 1]), [6, 7], None, bench.note)
        except OSError as error:
            refused.append(error)

    thread = threading.Thread(target=issue)
    thread.start()
    bench.link.refuse()
    thread.join(PATIENCE_S)
    assert len(refused) == 1 and not thread.is_alive()
    gate.set()


def test_a_closed_pipeline_lets_pieces_land_and_takes_no_more(make_bench):
    bench = make_bench()
    bench.link.save([0], bench.groups([0]), None, bench.note)
    assert bench.link.close(PATIENCE_S)
    bench.finish(1)
    with pytest.raises(OSError, match="closed"):
        bench.link.save([0], bench.groups([0]), None, bench.note)


def test_loads_and_saves_share_no_stream_and_no_buffer(make_bench):
    """A save that waits for a long pass holds up no load."""
    bench, gate = make_bench(), threading.Event()
    bench.device.gate = lambda event: event.stream.name.startswith("load") or gate.wait(PATIENCE_S)
    for _ in range(3):
        bench.link.save([0], bench.groups([0]), bench.device.compute.record(), bench.note)
    bench.link.load(bench.groups([1]), [1], None, bench.note)
    bench.finish(1)
    assert bench.landed == [None]
    gate.set()
    bench.finish(3)
