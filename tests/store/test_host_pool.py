import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memos_vllm.store.host_pool import DropOutcome, SlotCounts, SlotState, SlotTable
from tests.store.store_factories import make_key, make_keys


def ready(table: SlotTable, *numbers: int) -> None:
    assert table.reserve(make_keys(*numbers)) is not None
    table.commit(make_keys(*numbers))


def test_a_block_is_found_only_between_commit_and_drop():
    table = SlotTable(2)
    (slot,) = table.reserve(make_keys(1))
    assert table.lookup(make_key(1)) is None and table.state(make_key(1)) is SlotState.WRITING
    table.commit(make_keys(1))
    assert table.lookup(make_key(1)) == slot and len(table) == 1
    assert table.drop(make_keys(1, 7)) == DropOutcome(freed=1, doomed=0)
    assert table.lookup(make_key(1)) is None and table.state(make_key(1)) is SlotState.ABSENT


def test_the_least_recently_used_goes_first():
    table = SlotTable(3)
    ready(table, 1, 2, 3)
    table.touch(make_keys(1, 9))
    ready(table, 4)
    assert [table.lookup(make_key(n)) is not None for n in (1, 2, 3, 4)] == [True, False, True, True]


def test_reserving_takes_all_or_nothing():
    table = SlotTable(3)
    ready(table, 1, 2)
    table.pin(make_keys(1))
    assert table.reserve(make_keys(3, 4, 5)) is None
    assert table.lookup(make_key(2)) is not None, "nothing was evicted for a reservation that failed"
    assert table.reserve(make_keys(3, 4)) is not None
    assert table.lookup(make_key(1)) is not None and table.lookup(make_key(2)) is None


def test_pins_are_counted():
    table = SlotTable(1)
    ready(table, 1)
    table.pin(make_keys(1))
    table.pin(make_keys(1))
    table.unpin(make_keys(1))
    assert table.reserve(make_keys(2)) is None
    table.clear()
    assert len(table) == 1
    table.unpin(make_keys(1))
    assert table.reserve(make_keys(2)) is not None


@pytest.mark.parametrize("end", ["commit", "abort", "unpin"])
def test_a_slot_in_use_is_freed_only_when_the_copy_ends(end):
    table = SlotTable(1)
    table.reserve(make_keys(1))
    if end == "unpin":
        table.commit(make_keys(1))
        table.pin(make_keys(1))
    assert table.drop(make_keys(1)) == DropOutcome(freed=0, doomed=1)
    assert table.lookup(make_key(1)) is None and table.state(make_key(1)) is SlotState.DOOMED
    assert table.reserve(make_keys(2)) is None, "the copy still uses the only slot"
    getattr(table, end)(make_keys(1))
    assert table.check_integrity() == SlotCounts(free=1, writing=0, ready=0, pinned=0, doomed=0)


def test_reserving_a_present_key_is_our_bug():
    table = SlotTable(4)
    ready(table, 1)
    for keys in (make_keys(1), make_keys(2, 2)):
        with pytest.raises(AssertionError):
            table.reserve(keys)


class Conservation(RuleBasedStateMachine):
    """Any sequence of legal calls: slots add up, and nobody gets a slot that someone else uses."""

    def __init__(self):
        super().__init__()
        self.table = SlotTable(6)
        self.owner = {}  # slot in use by a copy -> key
        self.pinned = []

    def writing(self):
        return sorted(set(self.owner.values()) - set(self.pinned))

    @rule(numbers=st.lists(st.integers(0, 9), unique=True, max_size=7))
    def reserve(self, numbers):
        keys = [key for key in make_keys(*numbers) if self.table.state(key) is SlotState.ABSENT]
        before = self.table.check_integrity()
        slots = self.table.reserve(keys)
        if slots is None:
            assert self.table.check_integrity() == before and len(keys) > before.free + before.ready
            return
        assert not set(slots) & self.owner.keys()
        self.owner.update(zip(slots, keys, strict=True))

    @precondition(lambda self: self.writing())
    @rule(data=st.data(), commit=st.booleans())
    def end_write(self, data, commit):
        key = data.draw(st.sampled_from(self.writing()))
        (self.table.commit if commit else self.table.abort)([key])
        self.owner = {slot: owner for slot, owner in self.owner.items() if owner != key}

    @rule(number=st.integers(0, 9))
    def pin(self, number):
        key = make_key(number)
        if (slot := self.table.lookup(key)) is not None:
            self.table.pin([key])
            self.pinned.append(key)
            self.owner[slot] = key

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        key = data.draw(st.sampled_from(self.pinned))
        self.table.unpin([key])
        self.pinned.remove(key)
        if key not in self.pinned:
            self.owner = {slot: owner for slot, owner in self.owner.items() if owner != key}

    @rule(numbers=st.lists(st.integers(0, 9), unique=True))
    def drop(self, numbers):
        keys = make_keys(*numbers)
        present = sum(self.table.state(key) is not SlotState.ABSENT for key in keys)
        outcome = self.table.drop(keys)
        assert outcome.freed + outcome.doomed == present
        assert all(self.table.lookup(key) is None for key in keys)

    @rule(numbers=st.lists(st.integers(0, 9)))
    def touch(self, numbers):
        self.table.touch(make_keys(*numbers))

    @rule()
    def clear(self):
        self.table.clear()

    @invariant()
    def adds_up(self):
        counts = self.table.check_integrity()
        assert counts.free + counts.writing + counts.ready + counts.pinned + counts.doomed == 6
        assert counts.writing + counts.pinned + counts.doomed == len(self.owner)


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=60, stateful_step_count=40)
