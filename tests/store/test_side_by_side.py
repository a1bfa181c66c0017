"""Copies that must not wait for each other: saves and loads of a device, the pieces of a Read, Reads and Writes. And
what a shutdown does with those that wait for good."""

import threading

import pytest
import torch

from memos_vllm.kernels.kv_copy import BlockCopier, planes_of
from memos_vllm.store import kv_file
from memos_vllm.store.kv_file import ChunkReader
from memos_vllm.store.link import CpuLink
from memos_vllm.store.task_queue import Priority, TaskQueue
from memos_vllm.store.transfer import Load, Read, Save, TransferWorker, Write
from tests.store.store_factories import make_identity, make_keys

BLOCKS = 8
PATIENCE_S = 30.0  # ends a hung test; nothing waits this long


class OwnThreads(CpuLink):
    """Copies as the real one, and is taken for a device: the caller's thread is not one that computes."""

    in_place = False

    def memory(self, block_ids):
        return None


@pytest.fixture
def make_worker():
    workers = []

    def make_worker(io_threads=2):
        planes = planes_of([torch.zeros(2, BLOCKS, 4, 8)], BLOCKS)
        link = OwnThreads(BlockCopier(planes), planes)
        workers.append(TransferWorker(link, BLOCKS, make_identity(), 0, io_threads, pin_memory=False))
        return workers[-1]

    yield make_worker
    for worker in workers:
        worker.shutdown(PATIENCE_S)


def finish(worker, count):
    results = []
    while len(results) < count:
        assert worker.wait(PATIENCE_S), "an operation has no result"
        results += worker.drain()
    assert all(result.ok for result in results), results
    return [result.op_id for result in results]


def write(path, op_id=1):
    return Write(op_id, "c", str(path), tuple(range(4)), make_keys(*range(4)))


def read(path, op_id=2):
    return Read(op_id, "c", str(path), tuple(range(4)), make_keys(*range(4)), tuple(range(4)), None)


def test_a_save_that_waits_for_a_long_pass_holds_up_no_load(make_worker, monkeypatch):
    worker, begun, gate = make_worker(), threading.Event(), threading.Event()
    save = worker._link.save
    monkeypatch.setattr(worker._link, "save", lambda *piece: (begun.set(), gate.wait(PATIENCE_S), save(*piece)))
    worker.submit([Save(1, (0,), (0,))])
    assert begun.wait(PATIENCE_S)
    worker.submit([Load(2, (1,), (1,))])
    assert finish(worker, 1) == [2]
    gate.set()
    assert finish(worker, 1) == [1]


def test_two_threads_read_pieces_of_one_file_at_a_time(make_worker, monkeypatch, tmp_path):
    worker, together = make_worker(io_threads=2), threading.Barrier(2)
    worker.submit([write(tmp_path / "c.r0")])
    finish(worker, 1)
    monkeypatch.setattr(kv_file, "PIECE_BYTES", 2 * worker.row_bytes)  # two pieces
    real = ChunkReader.read
    monkeypatch.setattr(ChunkReader, "read", lambda *args: (together.wait(PATIENCE_S), real(*args)))
    worker.submit([read(tmp_path / "c.r0")])
    assert finish(worker, 1) == [2]


def test_writes_leave_a_thread_for_reads(make_worker, monkeypatch, tmp_path):
    """Each of them waits for its disk, more of them than there are threads."""
    worker, begun, gate = make_worker(io_threads=2), threading.Event(), threading.Event()
    worker.submit([write(tmp_path / "c.r0")])
    finish(worker, 1)
    monkeypatch.setattr("os.fdatasync", lambda fd: (begun.set(), gate.wait(PATIENCE_S)))
    worker.submit([write(tmp_path / f"{op_id}.r0", op_id) for op_id in (3, 4, 5)])
    assert begun.wait(PATIENCE_S)
    queue = worker._files
    with queue._changed:
        assert queue._most_urgent() is None and len(queue._waiting[Priority.WRITE]) == 2, (
            "they wait beside a free thread"
        )
    worker.submit([read(tmp_path / "c.r0")])
    assert finish(worker, 1) == [2]
    gate.set()
    assert sorted(finish(worker, 3)) == [3, 4, 5]


def test_a_shutdown_ends_the_thread_that_waits_for_a_staging_buffer(make_worker, monkeypatch, tmp_path):
    """What is read never lands: the device has failed."""
    worker, asked, held = make_worker(io_threads=1), threading.Semaphore(0), []
    worker.submit([write(tmp_path / "c.r0")])
    finish(worker, 1)
    monkeypatch.setattr(kv_file, "PIECE_BYTES", worker.row_bytes)  # four pieces for the two buffers
    monkeypatch.setattr(worker._link, "load", lambda *piece: held.append(piece))
    take = worker._staging.take
    monkeypatch.setattr(worker._staging, "take", lambda num_rows: (asked.release(), take(num_rows))[1])
    worker.submit([read(tmp_path / "c.r0")])
    for _ in range(3):
        assert asked.acquire(timeout=PATIENCE_S)
    worker.shutdown(0.0)
    assert not any(thread.is_alive() for thread in worker._files._threads)


@pytest.mark.parametrize("ended", [True, False])
def test_memory_that_a_copy_may_still_use_stays_locked_and_mapped(make_worker, monkeypatch, caplog, ended):
    worker, closed = make_worker(), []
    monkeypatch.setattr(worker._link, "close", lambda timeout_s: ended)
    monkeypatch.setattr(worker._host, "close", lambda: closed.append("host"))
    monkeypatch.setattr(worker._staging, "unpin", lambda: closed.append("staging"))
    worker.shutdown(0.0)
    assert closed == (["host", "staging"] if ended else [])
    assert ("left to the end of the process" in caplog.text) is not ended


def test_a_shutdown_first_lets_go_who_waits_for_a_device(make_worker, monkeypatch):
    worker, calls = make_worker(), []
    refuse, stop = worker._link.refuse, TaskQueue.stop
    monkeypatch.setattr(worker._link, "refuse", lambda: (calls.append("refuse"), refuse())[1])
    monkeypatch.setattr(TaskQueue, "stop", lambda self, timeout_s: (calls.append("stop"), stop(self, timeout_s))[1])
    worker.shutdown(0.0)
    assert calls == ["refuse", "stop", "stop", "stop"]
