"""Ten thousand operations beside a forward pass: no block is ever wrong, and a removed wait is seen."""

from functools import partial

import pytest
import torch

from memos_vllm.kernels.kv_copy import BlockCopier, planes_of
from memos_vllm.store import host_memory, kv_file
from memos_vllm.store.copy_planner import CopyPlan
from memos_vllm.store.layer_groups import layer_groups
from memos_vllm.store.link import CpuLink, DeviceLink
from memos_vllm.store.transfer import TransferWorker
from tests.store.simulated_device import NAMES, SimulatedDevice
from tests.store.store_factories import make_identity
from tests.store.stress import StreamPass, Stress, ThreadPass

BLOCKS, SLOTS, PIECE_BLOCKS = 28, 20, 2
BLOCK_BYTES = 2 * 2 * 16 * 2 * 8 * 2


@pytest.fixture(autouse=True)
def no_disk_and_small_pieces(monkeypatch):
    """Two blocks to a piece, seven slots to a segment; a sync of each of thousands of files would be the whole test."""
    monkeypatch.setattr(kv_file, "PIECE_BYTES", PIECE_BLOCKS * BLOCK_BYTES)
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 7 * BLOCK_BYTES)
    monkeypatch.setattr("os.fdatasync", lambda fd: None)
    monkeypatch.setattr("os.fsync", lambda fd: None)


@pytest.fixture
def make_stress(tmp_path):
    workers = []

    def make_stress(link_of, in_flight):
        planes = planes_of([torch.zeros(2, BLOCKS, 16, 2, 8, dtype=torch.bfloat16) for _ in range(2)], BLOCKS)
        link, forward = link_of(planes)
        workers.append(TransferWorker(link, SLOTS, make_identity(), 0, 2, pin_memory=False))
        return Stress(workers[-1], forward, BLOCKS, SLOTS, tmp_path, in_flight)

    yield make_stress
    for worker in workers:
        worker.shutdown(60.0)


def in_cpu_memory(planes, num_groups=0):
    return CpuLink(BlockCopier(planes), planes, layers=layer_groups(planes, num_groups)), ThreadPass(planes)


def on_a_device(eager=(), removed=(), num_groups=0):
    def link_of(planes):
        layers = layer_groups(planes, num_groups)
        device = SimulatedDevice(planes, PIECE_BLOCKS, eager, removed, layers)
        row_bytes = device.copier.row_bytes
        link = DeviceLink(device, torch.device("cpu"), row_bytes, len(planes), CopyPlan(), PIECE_BLOCKS, layers)
        return link, StreamPass(planes, device)

    return link_of


def test_ten_thousand_operations_in_cpu_memory(make_stress):
    stress = make_stress(in_cpu_memory, in_flight=8)
    assert stress.run(10_000) == []
    assert stress.done >= 10_000


@pytest.mark.parametrize(
    ("num_ops", "eager"),
    [(10_000, ()), (1_500, ("load copy", "save copy")), (1_500, NAMES)],
    ids=["lazy", "eager copies", "eager"],
)
def test_thousands_of_operations_on_a_device_in_the_worst_order(make_stress, num_ops, eager):
    stress = make_stress(on_a_device(eager), in_flight=8)
    assert stress.run(num_ops) == []
    assert stress.done >= num_ops


@pytest.mark.parametrize(
    ("link_of", "least"),
    [
        (partial(in_cpu_memory, num_groups=3), 0),
        (on_a_device(num_groups=3), 50),
        (on_a_device(NAMES, num_groups=3), 50),
    ],
    ids=["in CPU memory", "lazy", "eager"],
)
def test_passes_read_what_arrives_in_groups_of_layers(make_stress, link_of, least):
    """In CPU memory a load has mostly ended before anybody has seen that it has begun."""
    stress = make_stress(link_of, in_flight=8)
    assert stress.run(1_500) == []
    assert stress.done >= 1_500 and stress.begun >= least


@pytest.mark.parametrize(
    ("waiting", "awaited", "eager"),
    [
        ("save kernel", "compute", ()),
        ("save copy", "save kernel", ("save copy",)),
        ("load kernel", "compute", ()),
        ("load kernel", "load copy", ()),
    ],
)
def test_the_stress_sees_a_removed_wait(make_stress, waiting, awaited, eager):
    """One operation at a time: the same run every time, with the wait and without."""
    assert make_stress(on_a_device(eager), in_flight=1).run(60) == []
    assert make_stress(on_a_device(eager, {(waiting, awaited)}), in_flight=1).run(60, stop_at_mismatch=True) != []


def test_the_stress_sees_a_result_before_the_copy(make_stress):
    """On CPU the one wait is that for the copy itself: here each is made at the next one's turn."""

    class LateLink(CpuLink):
        held = staticmethod(lambda: None)

        def load(self, groups, block_ids, after, landed):
            self._late(super().load, groups, block_ids, after, landed)

        def save(self, block_ids, groups, after, landed):
            self._late(super().save, block_ids, groups, after, landed)

        def _late(self, copy, first, second, after, landed):
            self.held()
            self.held = lambda: copy(first, second, after, lambda error: None)
            landed(None)

    stress = make_stress(lambda planes: (LateLink(BlockCopier(planes), planes), ThreadPass(planes)), in_flight=1)
    assert stress.run(60, stop_at_mismatch=True) != []
