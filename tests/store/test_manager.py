"""The tier manager with its real tables; the test plays the workers: it makes the results."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memos_vllm.store.copy_totals import CopyTotals
from memos_vllm.store.disk_index import DiskIndex
from memos_vllm.store.host_pool import SlotCounts, SlotState, SlotTable
from memos_vllm.store.manager import ForgetReport, Match, Pending, TierManager
from memos_vllm.store.ops import Load, Op, Read, Result, Save, Write
from memos_vllm.types import BlockKey
from tests.store.store_factories import make_identity, make_key, make_keys

BLOCK_BYTES = 64
TAG = b"alice"
OTHER_TAG = b"bob"

MakeTiers = Callable[..., TierManager]


@pytest.fixture
def make_tiers(tmp_path: Path) -> Iterator[MakeTiers]:
    """Makes managers; at the end nothing may be pinned or under way in any of them."""
    made: list[TierManager] = []

    def make(
        num_slots: int = 8, disk_blocks: int | None = 32, chunk_blocks: int = 4, world_size: int = 1
    ) -> TierManager:
        disk = None
        if disk_blocks is not None:
            root = tmp_path / f"kv{len(made)}"
            disk = DiskIndex(root, make_identity(), disk_blocks * BLOCK_BYTES, world_size)
        made.append(TierManager(SlotTable(num_slots), disk, chunk_blocks, BLOCK_BYTES, world_size))
        return made[-1]

    yield make
    for tiers in made:
        check_idle(tiers)
        if tiers.disk is not None:
            tiers.disk.check_integrity()
            tiers.disk.close()


def check_idle(tiers: TierManager) -> None:
    assert tiers.num_in_flight == 0, "the test must end what it started"
    tiers.check_integrity()
    counts = tiers.slots.check_integrity()
    assert counts.writing == counts.pinned == counts.doomed == 0
    if tiers.disk is not None:
        assert not tiers.disk._pins and not tiers.disk._writing


def result(operation: Op, ok: bool = True, corrupt: bool = False) -> Result:
    """What one rank reports."""
    failed = () if ok or not isinstance(operation, Load | Read) else operation.block_ids
    error = None if ok else "broken"
    return Result(operation.op_id, ok, error, failed, nbytes=1, seconds=0.0, corrupt=corrupt and not ok)


def end(tiers: TierManager, operation: Op, ok: bool = True, corrupt: bool = False) -> list[Op]:
    """Every rank reports; the last one fails, if any does."""
    well = [result(operation)] * (tiers._in_flight._world_size - 1)
    return tiers.complete([*well, result(operation, ok, corrupt)])[1]


def end_all(tiers: TierManager, operations: Sequence[Op]) -> None:
    """All of them, and what follows from them."""
    while operations:
        operations = [after for operation in operations for after in end(tiers, operation)]


def put_on_host(tiers: TierManager, *numbers: int, tag: bytes = TAG) -> None:
    """On the host, and on disk if there is one with room."""
    operations = tiers.plan_save(make_keys(*numbers), numbers, tag)
    assert [block for operation in operations for block in operation.block_ids] == list(numbers)
    end_all(tiers, operations)


def put_on_disk(tiers: TierManager, *numbers: int, tag: bytes = TAG) -> None:
    """On disk only."""
    put_on_host(tiers, *numbers, tag=tag)
    assert tiers.slots.drop(make_keys(*numbers)).freed == len(numbers)
    assert tiers.match(make_keys(*numbers)) == Match(len(numbers), 0, Pending.NO)


def matched(tiers: TierManager, *numbers: int) -> int:
    return tiers.match(make_keys(*numbers)).num_blocks


# -- save and write behind ------------------------------------------------------------------------


def test_a_save_is_found_after_it_ended_and_is_then_written_to_disk(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    (save,) = tiers.plan_save(make_keys(1, 2), (11, 12), TAG)
    assert isinstance(save, Save) and save.block_ids == (11, 12)
    assert matched(tiers, 1, 2) == 0

    completion, (write,) = tiers.complete([result(save)])
    assert completion.released_blocks == [11, 12]
    assert completion.finished_ops == {save.op_id} and not completion.failed_ops
    assert tiers.match(make_keys(1, 2, 3)) == Match(2, 2, Pending.NO)
    assert isinstance(write, Write) and write.slots == save.slots and write.keys == make_keys(1, 2)
    assert tiers.slots.check_integrity().pinned == 2, "the write reads the slots: they must stay"
    assert tiers.disk is not None and len(tiers.disk) == 0, "not on disk before the write ended"

    assert end(tiers, write) == []
    assert len(tiers.disk) == 2
    assert (tiers.totals.saved_blocks, tiers.totals.written_blocks) == (2, 2)


def test_saves_are_cut_into_chunks_in_prefix_order(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(chunk_blocks=2)
    operations = tiers.plan_save(make_keys(1, 2, 3), (11, 12, 13), TAG)
    assert [operation.block_ids for operation in operations] == [(11, 12), (13,)]
    end_all(tiers, operations)


def test_a_slot_that_is_being_written_to_disk_is_not_reused(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(num_slots=2)
    (save,) = tiers.plan_save(make_keys(1, 2), (11, 12), TAG)
    (write,) = end(tiers, save)
    assert tiers.plan_save(make_keys(3), (13,), TAG) == [] and tiers.totals.skipped_blocks == 1
    tiers.drop_host()
    assert matched(tiers, 1, 2) == 2
    end(tiers, write)
    end_all(tiers, tiers.plan_save(make_keys(3), (13,), TAG))


@pytest.mark.parametrize("state", ["host", "disk", "saving", "writing", "twice"])
def test_what_a_tier_has_or_is_getting_is_not_saved_again(make_tiers: MakeTiers, state: str) -> None:
    tiers = make_tiers()
    under_way: list[Op] = []
    match state:
        case "host":
            put_on_host(tiers, 1)
        case "disk":
            put_on_disk(tiers, 1)
        case "saving":
            under_way = tiers.plan_save(make_keys(1), (11,), TAG)
        case "writing":
            under_way = end(tiers, *tiers.plan_save(make_keys(1), (11,), TAG))
        case "twice":
            (save,) = tiers.plan_save(make_keys(2, 2), (12, 12), TAG)
            assert save.block_ids == (12,)
            under_way = [save]
    fresh = tiers.plan_save(make_keys(1, 2), (21, 22), TAG) if state != "twice" else []
    assert [operation.block_ids for operation in fresh] == ([(22,)] if state != "twice" else [])
    end_all(tiers, [*under_way, *fresh])


def test_without_room_on_the_host_the_head_of_the_prefix_is_saved(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(num_slots=3, chunk_blocks=2)
    operations = tiers.plan_save(make_keys(1, 2, 3, 4, 5), range(11, 16), TAG)
    assert [operation.block_ids for operation in operations] == [(11, 12)]
    assert tiers.totals.skipped_blocks == 3
    end_all(tiers, operations)


def test_without_room_on_disk_the_host_keeps_its_copy(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(disk_blocks=1)
    (save,) = tiers.plan_save(make_keys(1, 2), (11, 12), TAG)
    assert end(tiers, save) == []
    assert matched(tiers, 1, 2) == 2 and tiers.totals.skipped_blocks == 2


def test_the_file_system_does_not_hold_up_the_engine(make_tiers: MakeTiers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop makes room on a full disk, and the files go in a thread."""
    tiers = make_tiers(disk_blocks=2)
    put_on_host(tiers, 1, 2)
    may_go, unlink, threads = threading.Event(), os.unlink, set()

    def slow(path: str) -> None:
        threads.add(threading.get_ident())
        assert may_go.wait(20), "a guard against a test that hangs"
        unlink(path)

    monkeypatch.setattr(os, "unlink", slow)
    tiers.drop_host()
    (save,) = tiers.plan_save(make_keys(3, 4), (13, 14), TAG)
    (write,) = end(tiers, save)
    assert matched(tiers, 1) == 0 and tiers.disk is not None
    end(tiers, write)
    assert matched(tiers, 3, 4) == 2
    may_go.set()
    tiers.disk.close()
    assert threads and threading.get_ident() not in threads


def test_without_a_disk_nothing_is_written(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(disk_blocks=None)
    (save,) = tiers.plan_save(make_keys(1), (11,), TAG)
    assert end(tiers, save) == [] and matched(tiers, 1, 2) == 1


def test_eviction_shortens_a_prefix_from_its_end(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(num_slots=4, disk_blocks=None)
    put_on_host(tiers, 1, 2, 3, 4)
    put_on_host(tiers, 9)
    assert matched(tiers, 1, 2, 3, 4) == 3
    end_all(tiers, tiers.plan_load(make_keys(1, 2, 3), (11, 12, 13)))
    put_on_host(tiers, 10)
    assert matched(tiers, 1, 2, 3) == 3, "what was loaded last goes last"
    put_on_host(tiers, 11)
    assert matched(tiers, 1, 2, 3) == 2, "and of a load, the last block first"


PREFIX = range(1, 9)
"""Of four chunks of two blocks."""


def end_in_any_order(tiers: TierManager, operations: Sequence[Op], data: st.DataObject) -> None:
    """All of them, and what follows from them."""
    under_way = list(operations)
    while under_way:
        under_way += end(tiers, under_way.pop(data.draw(st.integers(0, len(under_way) - 1))))


@settings(max_examples=50)
@given(data=st.data(), tier=st.sampled_from(["host", "disk"]), source=st.sampled_from(["save", "host", "disk", "both"]))
def test_eviction_shortens_a_prefix_of_many_chunks_from_its_end(data: st.DataObject, tier: str, source: str) -> None:
    """A whole prefix is saved or loaded in parts that end in any order; then one chunk more is saved."""
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskIndex(Path(folder), make_identity(), len(PREFIX) * BLOCK_BYTES, 1)
        tiers = TierManager(SlotTable(len(PREFIX)), disk, 2, BLOCK_BYTES, 1)
        end_in_any_order(tiers, tiers.plan_save(make_keys(*PREFIX), PREFIX, TAG), data)
        if source != "save":
            if source == "disk":
                tiers.drop_host()
            elif source == "both":
                tiers.slots.drop(make_keys(3, 4, 7, 8))
            end_in_any_order(tiers, tiers.plan_load(make_keys(*PREFIX), PREFIX), data)
        put_on_host(tiers, 10, 11)
        find = tiers.slots.lookup if tier == "host" else disk.lookup
        assert [find(key) is not None for key in make_keys(*PREFIX, 10)] == [True] * 6 + [False] * 2 + [True]
        check_idle(tiers)
        disk.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_what_requests_find_on_the_gpu_stays_in_the_tiers(make_tiers: MakeTiers, tier: str) -> None:
    """Turn after turn the head of a conversation is in vLLM's prefix cache, and no tier is asked for it."""
    tiers = make_tiers(num_slots=8, disk_blocks=8 if tier == "disk" else None, chunk_blocks=2)
    put_on_host(tiers, 1, 2)
    for turn in range(10):
        put_on_host(tiers, 20 + 2 * turn, 21 + 2 * turn, tag=OTHER_TAG)
        if tier == "disk":
            tiers.drop_host()
        assert tiers.plan_save(make_keys(1, 2), (11, 12), TAG) == [], "it is there still"


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_prefix_too_long_for_a_tier_keeps_its_head(make_tiers: MakeTiers, tier: str) -> None:
    tiers = make_tiers(num_slots=8 if tier == "disk" else 4, disk_blocks=4 if tier == "disk" else None, chunk_blocks=2)
    put_on_host(tiers, 1, 2, 3, 4)
    for last in (6, 8):
        numbers = range(1, last + 1)
        end_all(tiers, tiers.plan_save(make_keys(*numbers), numbers, TAG))
    if tier == "disk":
        tiers.drop_host()
    assert [matched(tiers, number) for number in range(1, 9)] == [1] * 4 + [0] * 4


def test_a_prefix_that_outgrows_the_host_is_saved_to_disk_through_it(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(num_slots=2, chunk_blocks=2)
    for last in (2, 4, 6):
        numbers = range(1, last + 1)
        end_all(tiers, tiers.plan_save(make_keys(*numbers), numbers, TAG))
    assert matched(tiers, *range(1, 7)) == 6


def test_a_chunk_that_is_written_late_is_as_old_as_its_save(make_tiers: MakeTiers) -> None:
    """A slow write of one prefix does not make it younger than what was used since."""
    tiers = make_tiers(disk_blocks=4, chunk_blocks=2)
    (save,) = tiers.plan_save(make_keys(1, 2), (11, 12), TAG)
    (write,) = end(tiers, save)
    put_on_host(tiers, 3, 4)
    end(tiers, write)
    put_on_host(tiers, 5, 6)
    tiers.drop_host()
    assert [matched(tiers, number) for number in (1, 3, 5)] == [0, 1, 1]


def test_loads_that_are_planned_together_are_one_use(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(num_slots=4, disk_blocks=None, chunk_blocks=2)
    put_on_host(tiers, 1, 2, 3, 4)
    with tiers.keeping(make_keys(1, 2, 3, 4)):
        loads = [
            *tiers.plan_load(make_keys(1, 2), (11, 12), prefetch=True),
            *tiers.plan_load(make_keys(3, 4), (13, 14), prefetch=True),
        ]
    end_all(tiers, loads)
    put_on_host(tiers, 9)
    assert matched(tiers, 1, 2, 3, 4) == 3


# -- ranks ----------------------------------------------------------------------------------------


def test_a_copy_counts_when_the_last_rank_has_reported(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(world_size=3)
    (save,) = tiers.plan_save(make_keys(1), (11,), TAG)
    for _ in range(2):
        completion, follow_up = tiers.complete([result(save)])
        assert not completion.released_blocks and not completion.finished_ops and not follow_up
        assert matched(tiers, 1) == 0 and tiers.num_in_flight == 1
    completion, (write,) = tiers.complete([result(save)])
    assert completion.released_blocks == [11] and matched(tiers, 1) == 1

    assert tiers.disk is not None
    for on_disk in (0, 0, 1):
        tiers.complete([result(write)])
        assert len(tiers.disk) == on_disk


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_rank_that_fails_fails_all(make_tiers: MakeTiers, failing: int) -> None:
    tiers = make_tiers(world_size=3)
    (save,) = tiers.plan_save(make_keys(1), (11,), TAG)
    results = [result(save, ok=rank != failing) for rank in range(3)]
    early, nothing = tiers.complete(results[:2])
    assert not early.finished_ops and not nothing
    completion, follow_up = tiers.complete(results[2:])
    assert completion.failed_ops == completion.finished_ops == {save.op_id}
    assert completion.released_blocks == [11], "the GPU block is free all the same"
    assert follow_up == [] and matched(tiers, 1) == 0
    assert tiers.totals.failed_ops == 1, "one operation, not one per rank"


def test_results_of_several_operations_come_in_any_order(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(world_size=2, chunk_blocks=1, disk_blocks=None)
    one, two = tiers.plan_save(make_keys(1, 2), (11, 12), TAG)
    completion, _ = tiers.complete([result(two), result(one), result(two)])
    assert completion.released_blocks == [12]
    assert matched(tiers, 1, 2) == 0 and matched(tiers, 2) == 1
    completion, _ = tiers.complete([result(one)])
    assert completion.released_blocks == [11] and matched(tiers, 1, 2) == 2


# -- load -----------------------------------------------------------------------------------------


def test_a_load_from_the_host_pins_its_slots(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(num_slots=2, disk_blocks=None)
    put_on_host(tiers, 1, 2)
    slots = tuple(tiers.slots.lookup(key) for key in make_keys(1, 2))
    (load,) = tiers.plan_load(make_keys(1, 2), (21, 22))
    assert isinstance(load, Load) and load.slots == slots and load.block_ids == (21, 22) and not load.prefetch
    tiers.drop_host()
    assert tiers.plan_save(make_keys(3), (13,), TAG) == []
    end(tiers, load)
    assert matched(tiers, 1, 2) == 2 and tiers.totals.loaded_host_blocks == 2


def test_a_read_from_disk_leaves_a_copy_on_the_host(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(chunk_blocks=3)
    put_on_disk(tiers, 1, 2, 3)
    assert tiers.disk is not None
    (read,) = tiers.plan_load(make_keys(1, 2), (21, 22))
    assert isinstance(read, Read) and read.positions == (0, 1) and read.block_ids == (21, 22)
    assert read.path == tiers.disk.path_of(read.chunk) and read.slots is not None
    assert tiers.slots.lookup(make_key(1)) is None, "not before it is there"
    end(tiers, read)
    assert tiers.match(make_keys(1, 2, 3)) == Match(3, 2, Pending.NO)
    assert tiers.totals.loaded_disk_blocks == 2


@pytest.mark.parametrize("when", ["after the read", "during the read"])
def test_a_copy_from_an_older_servers_disk_has_its_owners_tag(make_tiers: MakeTiers, when: str) -> None:
    old = make_tiers()
    put_on_disk(old, 1, 2)
    tiers = TierManager(SlotTable(4), old.disk, 4, BLOCK_BYTES, 1)
    (read,) = tiers.plan_load(make_keys(1, 2), (21, 22))
    if when == "after the read":
        end(tiers, read)
        assert tiers.forget(TAG) == ForgetReport(host_blocks=2, disk_blocks=2)
    else:
        assert tiers.forget(TAG).disk_blocks == 2
        end(tiers, read)
    assert matched(tiers, 1) == 0 and tiers.slots.state(make_key(1)) is SlotState.ABSENT
    check_idle(tiers)


def test_a_chunk_that_is_being_read_is_not_evicted(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(disk_blocks=2, num_slots=8, chunk_blocks=2)
    put_on_disk(tiers, 1, 2)
    (read,) = tiers.plan_load(make_keys(1, 2), (21, 22))
    (save,) = tiers.plan_save(make_keys(3, 4), (13, 14), TAG)
    assert end(tiers, save) == [], "the only room on disk is being read"
    end(tiers, read)
    put_on_host(tiers, 5, 6)
    assert tiers.disk is not None and tiers.disk.lookup(make_key(1)) is None


def test_a_read_never_evicts_the_host_block_that_the_same_load_needs(make_tiers: MakeTiers) -> None:
    """[disk, host] with a full host table: the host block would be the first to go."""
    tiers = make_tiers(num_slots=2, chunk_blocks=1)
    put_on_disk(tiers, 1)
    put_on_host(tiers, 2)
    put_on_host(tiers, 9)
    assert tiers.slots.check_integrity() == SlotCounts(free=0, writing=0, ready=2, pinned=0, doomed=0)
    slot = tiers.slots.lookup(make_key(2))
    assert tiers.match(make_keys(1, 2)) == Match(2, 1, Pending.NO)

    read, load = tiers.plan_load(make_keys(1, 2), (21, 22))

    assert isinstance(read, Read) and read.block_ids == (21,)
    assert isinstance(load, Load) and load.slots == (slot,) and load.block_ids == (22,)
    assert read.slots is not None and slot not in read.slots, "it takes the slot of block 9"
    end_all(tiers, [read, load])
    assert tiers.match(make_keys(1, 2)).num_host_blocks == 2


def test_a_read_without_room_on_the_host_goes_to_the_gpu_alone(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(num_slots=1, chunk_blocks=1)
    put_on_disk(tiers, 1)
    put_on_host(tiers, 2)
    read, load = tiers.plan_load(make_keys(1, 2), (21, 22))
    assert isinstance(read, Read) and read.slots is None and isinstance(load, Load)
    end_all(tiers, [read, load])
    assert tiers.match(make_keys(1, 2)) == Match(2, 1, Pending.NO)


@pytest.mark.parametrize("num_free", [0, 2])
def test_a_prefetch_from_disk_evicts_nothing_from_the_host(make_tiers: MakeTiers, num_free: int) -> None:
    tiers = make_tiers(num_slots=2 + num_free, chunk_blocks=2)
    put_on_disk(tiers, 1, 2)
    put_on_host(tiers, 8, 9)
    (prefetch,) = tiers.plan_load(make_keys(1, 2), (21, 22), prefetch=True)
    end(tiers, prefetch)
    assert tiers.match(make_keys(8, 9)).num_host_blocks == 2
    assert tiers.match(make_keys(1, 2)) == Match(2, num_free, Pending.NO)
    end_all(tiers, tiers.plan_load(make_keys(1, 2), (21, 22)))
    assert tiers.match(make_keys(1, 2)).num_host_blocks == 2, "a request takes what it needs"


def test_a_load_is_cut_where_the_source_changes_and_at_the_chunk_size(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(chunk_blocks=2, num_slots=4)
    put_on_disk(tiers, 1, 2)
    put_on_disk(tiers, 5, 6)
    put_on_host(tiers, 3, 4, 7)
    operations = tiers.plan_load(make_keys(1, 2, 3, 4, 7, 5), range(21, 27))
    assert [(type(operation), operation.block_ids) for operation in operations] == [
        (Read, (21, 22)),
        (Load, (23, 24)),
        (Load, (25,)),
        (Read, (26,)),
    ]
    end_all(tiers, operations)


def test_two_loads_of_the_same_blocks_are_counted(make_tiers: MakeTiers) -> None:
    """A prefetch of a prefix, and a request that was allocated for it in the same step."""
    tiers = make_tiers(num_slots=8)
    put_on_disk(tiers, 1, 2)
    (first,) = tiers.plan_load(make_keys(1, 2), (21, 22))
    (second,) = tiers.plan_load(make_keys(1, 2), (31, 32))
    assert isinstance(first, Read) and first.slots is not None
    assert isinstance(second, Read) and second.slots is None, "they are on their way into the host already"
    end(tiers, first)
    assert tiers.match(make_keys(1, 2)).pending is Pending.LOAD
    end(tiers, second)
    assert tiers.match(make_keys(1, 2)) == Match(2, 2, Pending.NO)


def test_a_block_that_is_being_loaded_is_pending(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    put_on_host(tiers, 1, 2)
    assert tiers.match([]) == Match(0, 0, Pending.NO)
    (load,) = tiers.plan_load(make_keys(1), (21,))
    assert tiers.match(make_keys(1, 2)) == Match(1, 1, Pending.LOAD), "the others are not looked at"
    assert tiers.match(make_keys(2)) == Match(1, 1, Pending.NO)
    end(tiers, load)
    assert tiers.match(make_keys(1, 2)) == Match(2, 2, Pending.NO)


@pytest.mark.parametrize("ok", [True, False])
def test_a_prefetch_is_pending_as_one_that_may_be_overtaken(make_tiers: MakeTiers, ok: bool) -> None:
    tiers = make_tiers()
    put_on_host(tiers, 1, 2)
    (prefetch,) = tiers.plan_load(make_keys(1, 2), (21, 22), prefetch=True)
    assert tiers.match(make_keys(1, 2)) == Match(2, 2, Pending.PREFETCH)
    (load,) = tiers.plan_load(make_keys(1), (31,))
    assert tiers.match(make_keys(1)).pending is Pending.LOAD, "a request's own load counts for more"
    assert tiers.match(make_keys(2)).pending is Pending.PREFETCH
    end(tiers, load)
    assert tiers.match(make_keys(1)).pending is Pending.PREFETCH
    end(tiers, prefetch, ok)
    assert tiers.match(make_keys(1)).pending is Pending.NO


def test_the_prefetch_flag_goes_to_the_workers(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    put_on_disk(tiers, 1)
    put_on_host(tiers, 2)
    operations = tiers.plan_load(make_keys(1, 2), (21, 22), prefetch=True)
    assert [type(operation) for operation in operations] == [Read, Load]
    assert all(operation.prefetch for operation in operations)
    end_all(tiers, operations)
    operations = tiers.plan_load(make_keys(1, 2), (21, 22))
    assert not any(operation.prefetch for operation in operations)
    end_all(tiers, operations)


# -- failures -------------------------------------------------------------------------------------


def test_a_failed_save_leaves_nothing(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    (save,) = tiers.plan_save(make_keys(1), (11,), TAG)
    assert end(tiers, save, ok=False) == []
    assert matched(tiers, 1) == 0 and tiers.totals.saved_blocks == 0
    put_on_host(tiers, 1)  # and can be tried again


def test_a_failed_write_leaves_the_host_copy(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    (save,) = tiers.plan_save(make_keys(1), (11,), TAG)
    (write,) = end(tiers, save)
    end(tiers, write, ok=False)
    assert tiers.match(make_keys(1)) == Match(1, 1, Pending.NO)
    assert tiers.disk is not None and make_key(1) not in tiers.disk and tiers.disk.usage_bytes == 0
    assert tiers.totals.written_blocks == 0


def test_a_write_that_finds_the_disk_full_lowers_the_budget_of_the_disk(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    assert tiers.disk is not None and tiers.disk.budget_bytes == 32 * BLOCK_BYTES
    put_on_disk(tiers, 1, 2)
    for number, no_space in ((3, False), (4, True)):
        (save,) = tiers.plan_save([make_key(number)], [number], TAG)
        (write,) = end(tiers, save)
        assert tiers.disk.budget_bytes == 32 * BLOCK_BYTES
        tiers.complete([replace(result(write, ok=False), no_space=no_space)])
    assert tiers.disk.budget_bytes == 2 * BLOCK_BYTES


def test_a_request_that_ends_has_the_reserve_looked_at(make_tiers: MakeTiers, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = make_tiers()
    put_on_disk(tiers, 1, 2)
    assert tiers.disk is not None
    monkeypatch.setattr(tiers.disk._room, "look", lambda *_: setattr(tiers.disk._room, "budget_bytes", 0))
    operations = tiers.plan_save(make_keys(1, 2), [1, 2], TAG)
    assert matched(tiers, 1, 2) == 0
    end_all(tiers, operations)


def test_a_failed_load_drops_the_host_copy_and_falls_back_to_disk(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    put_on_host(tiers, 1, 2)
    (load,) = tiers.plan_load(make_keys(1, 2), (21, 22))
    completion, follow_up = tiers.complete([result(load, ok=False)])
    assert completion.failed_ops == {load.op_id} and follow_up == []
    assert tiers.match(make_keys(1, 2)) == Match(2, 0, Pending.NO), "from disk now"
    assert tiers.totals.loaded_host_blocks == 0


def test_a_failed_attempt_to_read_leaves_the_chunk(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    put_on_disk(tiers, 1, 2)
    (read,) = tiers.plan_load(make_keys(1), (21,))
    end(tiers, read, ok=False)
    assert tiers.match(make_keys(1, 2)) == Match(2, 0, Pending.NO), "another attempt may succeed"
    assert tiers.slots.state(make_key(1)) is SlotState.ABSENT
    assert tiers.totals.loaded_disk_blocks == 0 and tiers.totals.failed_ops == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_chunk_that_cannot_be_read_twice_in_a_row_is_dropped(make_tiers: MakeTiers, world_size: int) -> None:
    tiers = make_tiers(world_size=world_size)
    put_on_disk(tiers, 1, 2)

    def read(**outcome: bool) -> None:
        (operation,) = tiers.plan_load(make_keys(1, 2), (21, 22))
        tiers.complete([result(operation)] * (world_size - 1))
        tiers.complete([replace(result(operation, ok=not outcome), **outcome)])
        tiers.drop_host()

    for outcome in ("unreadable", "", "unreadable"):
        read(**{outcome: True} if outcome else {})
    assert matched(tiers, 1, 2) == 2, "a success in between"
    for _ in range(3):
        (operation,) = tiers.plan_load(make_keys(1, 2), (21, 22))
        end(tiers, operation, ok=False)
    assert matched(tiers, 1, 2) == 2, "the file is not to blame"
    read(unreadable=True)
    assert matched(tiers, 1, 2) == 0
    put_on_host(tiers, 1, 2)
    assert tiers.disk is not None and len(tiers.disk) == 2, "built again"
    tiers.drop_host()
    read(unreadable=True)
    assert matched(tiers, 1, 2) == 2, "and counted anew"


def test_a_corrupt_file_of_any_rank_drops_the_chunk_and_the_copy_it_began(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(world_size=3)
    put_on_disk(tiers, 1, 2)
    (read,) = tiers.plan_load(make_keys(1), (21,))
    tiers.complete([result(read), result(read, ok=False, corrupt=True), result(read)])
    assert matched(tiers, 1) == matched(tiers, 2) == 0
    assert tiers.totals.loaded_disk_blocks == 0
    put_on_host(tiers, 1, 2)  # built again, on disk too
    assert tiers.disk is not None and len(tiers.disk) == 2


def test_two_reads_of_a_damaged_chunk_fail_one_after_the_other(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    put_on_disk(tiers, 1, 2)
    (first,) = tiers.plan_load(make_keys(1), (21,))
    (second,) = tiers.plan_load(make_keys(2), (22,))
    end(tiers, first, ok=False, corrupt=True)
    end(tiers, second, ok=False, corrupt=True)
    assert matched(tiers, 1) == matched(tiers, 2) == 0


# -- forget ---------------------------------------------------------------------------------------


def test_forgetting_removes_every_copy_of_one_owner(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    put_on_host(tiers, 1, 2)
    put_on_disk(tiers, 3)
    put_on_host(tiers, 7, tag=OTHER_TAG)
    assert tiers.forget(TAG) == ForgetReport(host_blocks=2, disk_blocks=3)
    assert matched(tiers, 1) == matched(tiers, 3) == 0 and matched(tiers, 7) == 1
    assert tiers.plan_save(make_keys(4), (14,), TAG) == [], "nothing is kept under it any more"
    assert tiers.forget(TAG) == ForgetReport(0, 0)


@pytest.mark.parametrize("ok", [True, False])
def test_a_save_under_way_is_forgotten_when_it_ends(make_tiers: MakeTiers, ok: bool) -> None:
    tiers = make_tiers()
    (save,) = tiers.plan_save(make_keys(1), (11,), TAG)
    tiers.forget(TAG)
    completion, follow_up = tiers.complete([result(save, ok)])
    assert completion.released_blocks == [11] and follow_up == []
    assert matched(tiers, 1) == 0 and tiers.slots.state(make_key(1)) is SlotState.ABSENT


@pytest.mark.parametrize("ok", [True, False])
def test_a_write_under_way_is_forgotten_when_it_ends(make_tiers: MakeTiers, ok: bool) -> None:
    tiers = make_tiers()
    (save,) = tiers.plan_save(make_keys(1), (11,), TAG)
    (write,) = end(tiers, save)
    assert isinstance(write, Write)
    path = Path(write.path.replace("{rank}", "0"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"what the worker wrote")
    tiers.forget(TAG)
    assert matched(tiers, 1) == 0, "at once"
    assert tiers.slots.check_integrity().doomed == 1, "but the write still reads the slot"
    end(tiers, write, ok)
    assert matched(tiers, 1) == 0 and not path.exists()
    assert tiers.totals.written_blocks == 0


@pytest.mark.parametrize("ok", [True, False])
def test_a_load_under_way_keeps_its_slot_until_it_ends(make_tiers: MakeTiers, ok: bool) -> None:
    tiers = make_tiers(num_slots=1, disk_blocks=None)
    put_on_host(tiers, 1)
    (load,) = tiers.plan_load(make_keys(1), (21,))
    assert tiers.forget(TAG).host_blocks == 1
    assert tiers.plan_save(make_keys(2), (12,), OTHER_TAG) == [], "its slot is being read"
    end(tiers, load, ok)
    assert matched(tiers, 1) == 0
    put_on_host(tiers, 2, tag=OTHER_TAG)


@pytest.mark.parametrize("ok", [True, False])
def test_a_read_under_way_leaves_no_copy_on_the_host(make_tiers: MakeTiers, ok: bool) -> None:
    tiers = make_tiers()
    put_on_disk(tiers, 1)
    (read,) = tiers.plan_load(make_keys(1), (21,))
    assert tiers.forget(TAG).disk_blocks == 1
    end(tiers, read, ok)
    assert matched(tiers, 1) == 0 and tiers.slots.state(make_key(1)) is SlotState.ABSENT


def test_tags_of_evicted_copies_do_not_pile_up(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(num_slots=2, disk_blocks=None)
    for number in range(50):
        put_on_host(tiers, number)
    assert len(tiers._host_tags) <= 4
    assert tiers.forget(TAG).host_blocks == 2


def test_drop_host_leaves_the_disk(make_tiers: MakeTiers) -> None:
    tiers = make_tiers()
    put_on_host(tiers, 1, 2)
    tiers.drop_host()
    assert len(tiers.slots) == 0 and tiers.match(make_keys(1, 2)) == Match(2, 0, Pending.NO)


# -- any order ------------------------------------------------------------------------------------

WORLD_SIZE = 2
NUM_SLOTS = 5
NUM_KEYS = 10
KEYS = st.lists(st.integers(0, NUM_KEYS - 1), unique=True, min_size=1, max_size=6)


class AnyOrder(RuleBasedStateMachine):
    """Any interleaving of plans, results of single ranks, failures and deletions.

    The model knows the bytes: what each rank has in each slot and file. An operation runs on a rank
    when that rank reports it, so one that finds other bytes than it should was given its place too
    early, or lost it too soon.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        disk = DiskIndex(Path(self.folder.name), make_identity(), 7 * BLOCK_BYTES, WORLD_SIZE)
        self.tiers = TierManager(SlotTable(NUM_SLOTS), disk, 2, BLOCK_BYTES, WORLD_SIZE)
        self.under_way: dict[int, tuple[Op, set[int]]] = {}
        self.failed: set[int] = set()
        self.host: dict[tuple[int, int], BlockKey] = {}  # (rank, slot) -> what is there
        self.files: dict[tuple[int, str], tuple[BlockKey, ...]] = {}
        self.gpu_keys: dict[int, BlockKey] = {}  # blocks held for a copy
        self.next_block = 0
        self.forgotten: set[bytes] = set()

    @property
    def disk(self) -> DiskIndex:
        assert self.tiers.disk is not None
        return self.tiers.disk

    def tag_of(self, key: BlockKey) -> bytes:
        return bytes([key[-1] % 3])

    def blocks_for(self, keys: Sequence[BlockKey]) -> list[int]:
        first, self.next_block = self.next_block, self.next_block + len(keys)
        blocks = list(range(first, self.next_block))
        self.gpu_keys.update(zip(blocks, keys, strict=True))
        return blocks

    def start(self, operations: Sequence[Op]) -> None:
        for operation in operations:
            self.under_way[operation.op_id] = (operation, set(range(WORLD_SIZE)))

    @rule(numbers=KEYS, tag=st.integers(0, 2))
    def save(self, numbers: list[int], tag: int) -> None:
        keys = [key for key in make_keys(*numbers) if self.tag_of(key) == bytes([tag])]
        operations = self.tiers.plan_save(keys, self.blocks_for(keys), bytes([tag]))
        assert bytes([tag]) not in self.forgotten or not operations
        self.start(operations)

    @rule(numbers=KEYS, prefetch=st.booleans())
    def load(self, numbers: list[int], prefetch: bool) -> None:
        keys = list(make_keys(*numbers))
        match = self.tiers.match(keys)
        assert match.num_host_blocks <= match.num_blocks <= len(keys)
        keys = keys[: match.num_blocks]
        blocks = self.blocks_for(keys)
        operations = self.tiers.plan_load(keys, blocks, prefetch=prefetch)
        assert [block for operation in operations for block in operation.block_ids] == blocks
        self.start(operations)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), ok=st.integers(0, 4).map(bool), corrupt=st.booleans())
    def report(self, data: st.DataObject, ok: bool, corrupt: bool) -> None:
        op_id = data.draw(st.sampled_from(sorted(self.under_way)))
        self.report_one(op_id, data.draw(st.sampled_from(sorted(self.under_way[op_id][1]))), ok, corrupt)

    def report_one(self, op_id: int, rank: int, ok: bool = True, corrupt: bool = False) -> None:
        operation, ranks = self.under_way[op_id]
        if ok:
            self.run(operation, rank)
        else:
            self.failed.add(op_id)
        ranks.discard(rank)
        completion, follow_up = self.tiers.complete([result(operation, ok, corrupt)])
        if ranks:
            assert not completion.finished_ops and not completion.released_blocks and not follow_up
            return
        del self.under_way[op_id]
        assert completion.finished_ops == {op_id}
        assert bool(completion.failed_ops) == (op_id in self.failed)
        assert completion.released_blocks == (list(operation.block_ids) if isinstance(operation, Save) else [])
        self.start(follow_up)

    def run(self, operation: Op, rank: int) -> None:
        """What a worker does."""
        match operation:
            case Save():
                for block, slot in zip(operation.block_ids, operation.slots, strict=True):
                    self.host[rank, slot] = self.gpu_keys[block]
            case Write():
                assert [self.host[rank, slot] for slot in operation.slots] == list(operation.keys)
                self.files[rank, operation.path] = operation.keys
            case Load():
                for slot, block in zip(operation.slots, operation.block_ids, strict=True):
                    assert self.host[rank, slot] == self.gpu_keys[block], "another block's KV"
            case Read():
                keys = self.files[rank, operation.path]
                assert tuple(keys[position] for position in operation.positions) == operation.keys
                assert [self.gpu_keys[block] for block in operation.block_ids] == list(operation.keys)
                for key, slot in zip(operation.keys, operation.slots or (), strict=False):
                    self.host[rank, slot] = key

    @rule(tag=st.integers(0, 2))
    def forget(self, tag: int) -> None:
        if (removal := self.tiers.forget(bytes([tag])).removal) is not None:
            removal.result()
        self.forgotten.add(bytes([tag]))

    @rule()
    def drop_host(self) -> None:
        self.tiers.drop_host()

    @rule()
    def settle(self) -> None:
        while self.under_way:
            op_id = next(iter(self.under_way))
            self.report_one(op_id, min(self.under_way[op_id][1]))
        check_idle(self.tiers)

    @invariant()
    def integrity(self) -> None:
        self.tiers.check_integrity()
        self.disk.check_integrity()
        assert self.tiers.num_in_flight == len(self.under_way)

    @invariant()
    def a_slot_or_a_file_in_use_is_nobody_elses(self) -> None:
        written = [
            slot
            for operation, _ in self.under_way.values()
            if isinstance(operation, Save | Read)
            for slot in operation.slots or ()
        ]
        read = {
            slot
            for operation, _ in self.under_way.values()
            if isinstance(operation, Load | Write)
            for slot in operation.slots
        }
        assert len(written) == len(set(written)) and not read & set(written)
        paths = [operation.path for operation, _ in self.under_way.values() if isinstance(operation, Write)]
        assert len(paths) == len(set(paths))

    @invariant()
    def what_is_found_is_there_on_every_rank(self) -> None:
        for key in make_keys(*range(NUM_KEYS)):
            slot, location = self.tiers.slots.lookup(key), self.disk.lookup(key)
            for rank in range(WORLD_SIZE):
                assert slot is None or self.host[rank, slot] == key
                assert location is None or self.files[rank, self.disk.path_of(location.chunk)][location.position] == key
            if self.tag_of(key) in self.forgotten:
                assert slot is None and location is None

    def teardown(self) -> None:
        self.settle()
        self.disk.close()
        self.folder.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40)


# -- what the operator sees -------------------------------------------------------------------------


def test_a_copy_moves_the_bytes_of_all_ranks_in_the_time_of_the_slowest(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(world_size=2)
    put_on_host(tiers, 1, 2)
    load, prefetch = (tiers.plan_load(make_keys(1, 2), (11, 12), prefetch=each)[0] for each in (False, True))
    tiers.complete([replace(result(load), nbytes=10, seconds=2.0), replace(result(load), nbytes=10, seconds=3.0)])
    tiers.complete([replace(result(prefetch), nbytes=10, seconds=4.0)])
    assert tiers.copies["host_to_gpu", "request"] == CopyTotals(size_bytes=20, seconds=3.0)
    assert tiers.copies["host_to_gpu", "prefetch"] == CopyTotals(), "the other rank has not reported"
    tiers.complete([result(prefetch, ok=False)])
    assert tiers.copies["host_to_gpu", "prefetch"] == CopyTotals(size_bytes=11, seconds=4.0, failed_ops=1)


def test_a_damaged_file_counts_once_whatever_the_ranks_say(make_tiers: MakeTiers) -> None:
    tiers = make_tiers(world_size=2)
    put_on_disk(tiers, 1)
    (read,) = tiers.plan_load(make_keys(1), (11,))
    damaged = replace(result(read, ok=False, corrupt=True), checksum_failed=True)
    tiers.complete([damaged, damaged])
    assert (tiers.totals.corrupt_files, tiers.totals.checksum_failures) == (1, 1)
    assert tiers.copies["disk_to_gpu", "request"].failed_ops == 1
