"""The CUDA layer with the calls of torch.cuda replaced by ones that run at once on CPU memory.

It holds what needs no GPU: which bytes go where, by which method, and that page-locking is lazy, in
pieces, and does without where the system refuses. The order of the calls is test_pipeline's.
"""

import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from memos_vllm.kernels.kv_copy import BlockCopier, planes_of
from memos_vllm.kernels.reference import gather_reference
from memos_vllm.store import cuda_device, host_memory, kv_file
from memos_vllm.store import link as link_module
from memos_vllm.store.copy_planner import CELLS, CopyPlan, Direction, Measured, cached_plan
from memos_vllm.store.cuda_device import CopyMeasure, CudaDevice, plan_of
from memos_vllm.store.host_memory import HostMemory, RowGroup
from memos_vllm.store.layer_groups import layer_groups
from memos_vllm.store.link import DeviceLink
from memos_vllm.store.pipeline import Method

BLOCKS, PIECE = 12, 4
CPU = torch.device("cpu")


class Registered:
    """cudart with a limit on locked memory."""

    def __init__(self, limit_bytes=2**40):
        self.segments, self.limit_bytes = {}, limit_bytes
        self.threads = []  # that chose their GPU, and it

    def cudaHostRegister(self, pointer, size_bytes, flags):
        if sum(self.segments.values()) + size_bytes > self.limit_bytes:
            return 2
        self.segments[pointer] = size_bytes
        return 0

    def cudaHostUnregister(self, pointer):
        del self.segments[pointer]
        return 0


@pytest.fixture
def cudart(monkeypatch):
    cudart = Registered()

    class Event:
        def __init__(self, blocking=False):
            assert blocking

        def record(self, stream):
            pass

        def synchronize(self):
            pass

    class Stream:
        def __init__(self, device, priority):
            assert priority == 0, "the lowest: torch's range ends there, and none of vLLM's has less"

        def wait_event(self, event):
            assert isinstance(event, Event)

    fake = SimpleNamespace(
        Event=Event,
        Stream=Stream,
        device=lambda device: contextlib.nullcontext(),
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=lambda device: SimpleNamespace(synchronize=lambda: None),
        cudart=lambda: cudart,
        set_device=lambda device: cudart.threads.append((threading.current_thread().name, device)),
    )
    monkeypatch.setattr(cuda_device.torch, "cuda", fake)
    return cudart


def pinned_memory(num_slots, row_bytes):
    memory = HostMemory(num_slots, row_bytes, True, CPU)
    memory._pin = True  # what a GPU as its device would have decided
    return memory


def make_planes():
    planes = planes_of([torch.zeros(2, BLOCKS, 5, 8) for _ in range(3)], BLOCKS)
    for plane in planes:
        plane.random_()
    return planes


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("num_groups", [0, 2], ids=["whole", "in groups of layers"])
def test_every_method_moves_the_same_bytes(cudart, monkeypatch, method, num_groups):
    monkeypatch.setattr(CopyPlan, "choose", lambda self, direction, size, count, allowed: method)
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 3 * 960)
    planes = make_planes()
    copier = BlockCopier(planes)
    layers = layer_groups(planes, num_groups)
    device = CudaDevice(copier, planes, PIECE, layers)
    link = DeviceLink(device, CPU, copier.row_bytes, len(planes), CopyPlan(), layers=layers)
    host = pinned_memory(8, copier.row_bytes)
    blocks, slots, errors = [3, 4, 9, 0], [6, 1, 2, 3], []
    expected = torch.empty(4, copier.row_bytes, dtype=torch.uint8)
    gather_reference(planes, blocks, expected)
    event = torch.cuda.Event(blocking=True)
    link.save(blocks, host.groups(slots), event, errors.append)
    for group in range(num_groups) or (None,):
        link.load(host.groups(slots), [5, 6, 7, 8], event, errors.append, group)
    assert link.close(60.0) and errors == [None] * (1 + max(1, num_groups))
    arrived = torch.empty_like(expected)
    gather_reference(planes, [5, 6, 7, 8], arrived)
    assert torch.equal(arrived, expected)


def test_each_copy_to_the_device_is_of_memory_in_one_piece(cudart):
    """torch copies other memory together first, and waits for it."""
    planes = make_planes()
    columns = layer_groups(planes, 2)[1].columns
    memory = pinned_memory(8, 960)
    buffer = torch.empty(PIECE, 960, dtype=torch.uint8)
    whole = memory.groups([1, 2, 3, 5])
    assert [len(host) for host, _ in cuda_device._spans(whole, buffer)] == [3, 1]
    narrow = [RowGroup(group.matrix[:, columns], group.rows, group.pinned) for group in whole]
    spans = cuda_device._spans(narrow, buffer)
    assert [len(host) for host, _ in spans] == [1] * 4
    assert all(host.is_contiguous() and device.is_contiguous() for host, device in spans)
    width = columns.stop - columns.start
    assert [device.data_ptr() - buffer.data_ptr() for _, device in spans] == [row * width for row in range(4)]


def test_threads_that_wait_for_a_gpu_wait_for_their_own(cudart):
    planes = make_planes()
    link = DeviceLink(CudaDevice(BlockCopier(planes), planes, PIECE), CPU, 960, len(planes), CopyPlan())
    assert link.close(60.0)
    assert sorted(cudart.threads, key=str) == [("memos-load-landing", CPU), ("memos-save-landing", CPU)]


def test_pages_are_locked_segment_by_segment_as_they_are_used_and_unlocked_at_the_end(cudart, monkeypatch):
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 3 * 100)
    memory = pinned_memory(10, 100)
    assert cudart.segments == {}
    assert [group.pinned for group in memory.groups([0, 9])] == [True, True]
    assert sorted(cudart.segments.values()) == [100, 300]
    memory.close()
    assert cudart.segments == {}


def test_where_no_more_can_be_locked_the_rest_is_pageable_and_never_goes_through_a_kernel(cudart, monkeypatch, caplog):
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 3 * 960)
    cudart.limit_bytes = 3 * 960
    planes = make_planes()
    memory = pinned_memory(9, 960)
    groups = memory.groups([0, 3, 6])
    assert [group.pinned for group in groups] == [True, False, False]
    assert caplog.text.count("ulimit -l") == 1
    asked = []
    monkeypatch.setattr(
        CopyPlan, "choose", lambda self, direction, size, count, allowed: (asked.append(allowed), Method.STAGED)[1]
    )
    link = DeviceLink(CudaDevice(BlockCopier(planes), planes, PIECE), CPU, 960, len(planes), CopyPlan())
    link.save([0], groups[:1], None, lambda error: None)
    link.save([0, 1], groups[:2], None, lambda error: None)
    assert link.close(60.0)
    assert Method.DIRECT in asked[0] and Method.DIRECT not in asked[1]


def test_a_segment_that_is_being_made_holds_up_nobody_who_needs_another(monkeypatch):
    monkeypatch.setattr(host_memory, "SEGMENT_BYTES", 100)
    memory = HostMemory(3, 100, False, CPU)
    ready = memory.groups([0])[0].matrix
    allocate, begun, go_on = memory._allocate, threading.Event(), threading.Event()
    made = []

    def slow(num_rows):
        made.append(num_rows)
        begun.set()
        assert go_on.wait(60.0)
        return allocate(num_rows)

    monkeypatch.setattr(memory, "_allocate", slow)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(memory.groups, [1])
        assert begun.wait(60.0)
        second = pool.submit(memory.groups, [1])
        other = pool.submit(memory.groups, [0])
        try:
            assert other.result(60.0)[0].matrix is ready
        finally:
            go_on.set()
        assert first.result()[0].matrix is second.result()[0].matrix and made == [1]
    memory.close()


def test_a_segment_that_could_not_be_made_is_tried_again(monkeypatch):
    memory = HostMemory(1, 100, False, CPU)
    allocate = memory._allocate
    monkeypatch.setattr(memory, "_allocate", lambda num_rows: (_ for _ in ()).throw(MemoryError("no memory")))
    with pytest.raises(MemoryError):
        memory.groups([0])
    monkeypatch.setattr(memory, "_allocate", allocate)
    assert len(memory.groups([0])) == 1
    memory.close()


def test_fragments_are_offered_only_where_a_block_is_contiguous(cudart):
    planes = make_planes()
    assert Method.DMA in CudaDevice(BlockCopier(planes), planes, PIECE).methods
    apart = [plane.transpose(1, 2) for plane in planes]
    assert CudaDevice(BlockCopier(apart), apart, PIECE).methods == {Method.STAGED, Method.DIRECT}


def test_the_planner_measures_every_method(cudart):
    measure = CopyMeasure(CPU)
    for direction in Direction:
        for method in (Method.STAGED, Method.DMA):
            assert measure(direction, method, 4096, 16) > 0
        assert measure(direction, Method.DIRECT, 4096, 16) == 0, "the memory is not page-locked: no kernel may read it"
    measure.close()


def test_a_measurement_has_pieces_in_a_row_and_no_buffer_is_used_before_it_is_free(cudart, monkeypatch):
    """Copies of one piece run beside the kernel of another: as in the pipeline, which is what the plan is for."""
    log = []
    for name in ("copy_in", "scatter", "gather", "copy_out"):
        at = 1 if name in ("copy_in", "gather") else 0  # where the buffer stands, behind the stream
        monkeypatch.setattr(
            CudaDevice, name, lambda self, stream, *args, name=name, at=at: log.append((name, stream, args[at]))
        )
    monkeypatch.setattr(cuda_device.CudaStream, "wait", lambda self, event: log.append(("wait", self, event)))
    monkeypatch.setattr(cuda_device.CudaStream, "record", lambda self: Recorded(log, self))
    measure = CopyMeasure(CPU)
    for direction, first, second in ((Direction.LOAD, "copy_in", "scatter"), (Direction.SAVE, "gather", "copy_out")):
        log.clear()
        assert measure(direction, Method.STAGED, 4096, 16) > 0
        work = [entry for entry in log if entry[0] in (first, second)]
        runs = cuda_device._REPEATS + 1
        assert [entry[0] for entry in work] == [first, second] * cuda_device._PIECES * runs
        assert len({id(entry[1]) for entry in work}) == 2, "one stream would overlap nothing"
        buffers = [entry[2] for entry in work if entry[0] == first]
        assert len({id(buffer) for buffer in buffers}) == 2
        assert all(one is not other for one, other in itertools.pairwise(buffers))
        # Before a buffer is filled again, the filling stream waits for the end of the piece that had it.
        waits = [entry for entry in log if entry[0] == "wait"]
        assert len(waits) == runs * (cuda_device._PIECES + cuda_device._PIECES - 2)
        filling = next(entry[1] for entry in work if entry[0] == first)
        assert sum(stream is filling for _, stream, _ in waits) == runs * (cuda_device._PIECES - 2)
        assert all(event.stream is not stream for _, stream, event in waits), "a stream waits for the other one"
    measure.close()


class Recorded:
    def __init__(self, log, stream):
        self.stream = stream

    def synchronize(self):
        pass


def test_measuring_takes_few_of_the_streams_that_torch_has_for_the_process(cudart, monkeypatch):
    made = []
    real = torch.cuda.Stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: (made.append(1), real(*args, **kwargs))[1])
    cuda_device._allocation_stream.cache_clear()
    measure = CopyMeasure(CPU)
    for fragment_bytes in (256, 512, 1024, 2048, 4096):
        for method in Method:
            measure(Direction.LOAD, method, fragment_bytes, 16)
    measure.close()
    planes = make_planes()
    DeviceLink(CudaDevice(BlockCopier(planes), planes, PIECE), CPU, 960, len(planes), CopyPlan()).close(60.0)
    cuda_device._allocation_stream.cache_clear()
    assert len(made) <= 8, "of 32, and vLLM's own come from them too"


def test_a_buffer_is_of_the_engines_own_part_of_the_allocator(cudart, monkeypatch):
    """Not of the stream that is current: memory that the forward pass gave back may still be in use by it."""
    current, of = [], []

    @contextlib.contextmanager
    def stream(one):
        current.append(one)
        yield
        current.pop()

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "stream", stream)
    cuda_device._allocation_stream.cache_clear()
    planes = make_planes()
    device = CudaDevice(BlockCopier(planes), planes, PIECE)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: (of.append(list(current)), empty(*args, **kwargs))[1])
    device.buffer()
    assert of == [[device._allocation.torch]]
    cuda_device._allocation_stream.cache_clear()


def test_a_piece_over_the_link_is_larger_than_one_of_a_file_and_never_smaller(monkeypatch):
    assert link_module.device_piece_blocks(2**20) == 16 > kv_file.items_per_piece(2**20) == 8
    assert link_module.device_piece_blocks(2**26) == kv_file.items_per_piece(2**26) == 1


def test_on_a_gpu_the_link_is_warm_and_has_the_plan_and_pieces_of_its_size(cudart, caplog):
    planes, warmed = make_planes(), []
    copier = SimpleNamespace(
        device=torch.device("cuda", 0), row_bytes=960, block_bytes=960, warm_up=lambda: warmed.append(True)
    )
    plan = CopyPlan([Measured(Direction.SAVE, Method.DMA, 160, 8, 9.0)])
    with caplog.at_level("INFO"):
        link = link_module.link_for(copier, planes, plan)
    assert isinstance(link, DeviceLink) and link._plan is plan and warmed
    assert link.piece_blocks == link_module.device_piece_blocks(960) and link._methods == frozenset(Method)
    assert "{'load': 'staged', 'save': 'dma'}" in caplog.text
    assert link.close(60.0)


def test_a_machine_has_a_name_by_calls_that_every_torch_has(cudart, monkeypatch):
    """The builds for CUDA have calls of ``torch._C`` that this one has not, and lose them from version to version."""
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(name="NVIDIA H200")
    assert cuda_device.machine_name(CPU).startswith(f"NVIDIA H200, driver {cuda_device.driver_version()}, CUDA ")

    class Driver:
        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = 13000
            return 0

    monkeypatch.setattr(cuda_device.ctypes, "CDLL", lambda name: Driver())
    assert "driver 13000" in cuda_device.machine_name(CPU)


def test_without_memory_to_measure_everything_is_staged_and_the_next_start_measures(cudart, monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_device, "machine_name", lambda device: "a GPU")
    monkeypatch.setattr(CopyMeasure, "__call__", full)
    assert plan_of(CPU, tmp_path).choose(Direction.LOAD, 4096, 8) is Method.STAGED
    assert list(tmp_path.iterdir()) == []


def test_a_start_measures_only_what_the_plan_lacks(cudart, monkeypatch, tmp_path):
    *known, lacking = CELLS[1:] + CELLS[:1]
    part = CopyPlan([Measured(each, method, *cell, 1.0) for each in Direction for method in Method for cell in known])
    cached_plan(tmp_path, "a GPU", lambda _: part)
    asked = []
    monkeypatch.setattr(cuda_device, "machine_name", lambda device: "a GPU")
    monkeypatch.setattr(CopyMeasure, "__call__", lambda self, *what: (asked.append(what[2:]), 1.0)[1])
    assert plan_of(CPU, tmp_path).complete and lacking in asked
    assert set(asked) == {lacking, CELLS[-1]}, "the latter for what a first use costs"
    asked.clear()
    assert plan_of(CPU, tmp_path).complete and not asked
