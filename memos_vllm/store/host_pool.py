"""Which host slot holds which block: the scheduler side's table of the host pool.

    ABSENT --reserve--> WRITING --commit--> READY --evicted or dropped--> ABSENT
                          |  \\--abort--> ABSENT    READY and pinned: being read, never evicted
                          \\--drop--> DOOMED (gone for lookups; its slot is freed when the copy ends)

A slot is one block of KV in the memory of every rank. One thread (the scheduler's) owns the table;
nothing here blocks or copies. A slot returns to the free list only when no copy reads or writes it.

How recently a block was used is what ``reserve`` and ``touch`` say, in whatever state it is; the end of a copy
changes nothing of it. So several copies of one prefix may end in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heapify, heappop, heappush, heapreplace

from memos_vllm.store.use_clock import UseClock
from memos_vllm.types import BlockKey


class SlotState(Enum):
    ABSENT = auto()
    WRITING = auto()
    READY = auto()
    DOOMED = auto()
    """Dropped while a copy reads or writes it; the key cannot be reserved until that ends."""


@dataclass(frozen=True, slots=True)
class DropOutcome:
    freed: int
    """Slots that are free now."""
    doomed: int
    """Slots that a copy still uses; freed when it ends."""


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """Sums to the number of slots, always."""

    free: int
    writing: int
    ready: int
    """READY and evictable."""
    pinned: int
    """READY and being read."""
    doomed: int


@dataclass(slots=True)
class _Entry:
    key: BlockKey
    slot: int
    last_use: int
    state: SlotState = SlotState.WRITING
    pins: int = 0
    writing: bool = True
    queued: bool = False
    """Whether it is in the queue for eviction, where it may be although it is pinned again."""

    @property
    def evictable(self) -> bool:
        return self.state is SlotState.READY and not self.pins


class SlotTable:
    """Key to slot, least recently used first to go."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.clock = UseClock()
        """Of the disk tier too, where there is one: the manager puts that in its place."""
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: dict[BlockKey, _Entry] = {}
        self._num_evictable = 0
        self._queue: list[tuple[int, _Entry]] = []
        """A heap by use. The use may be one of before, and the entry not evictable or gone: seen when its turn comes,
        so that a touch costs nothing here."""

    @property
    def num_used(self) -> int:
        """Slots that are not free, whatever their state."""
        return self.num_slots - len(self._free)

    def __len__(self) -> int:
        """Keys that ``lookup`` finds; counted one by one."""
        return sum(entry.state is SlotState.READY for entry in self._entries.values())

    def lookup(self, key: BlockKey) -> int | None:
        """The slot of a READY block. Does not count as a use, see ``touch``."""
        entry = self._entries.get(key)
        return entry.slot if entry is not None and entry.state is SlotState.READY else None

    def state(self, key: BlockKey) -> SlotState:
        entry = self._entries.get(key)
        return SlotState.ABSENT if entry is None else entry.state

    def last_use(self, key: BlockKey) -> int:
        """Of a block that is not ABSENT, by the clock."""
        return self._entries[key].last_use

    def reserve(self, keys: Sequence[BlockKey], *, evict: bool = True) -> list[int] | None:
        """Slots to write ``keys`` to; or None, and nothing has changed. A use of the keys, the last as the latest.

        Every key must be ABSENT. End each by ``commit`` or ``abort``.

        Args:
            evict: where slots are missing, those of the least recently used blocks; otherwise free ones only.
        """
        assert len(set(keys)) == len(keys) and not any(key in self._entries for key in keys)
        missing = len(keys) - len(self._free)
        if missing > (self._num_evictable if evict else 0):
            return None
        for _ in range(missing):
            self._release(self._oldest())
        entries = [_Entry(key, self._free.pop(), self.clock.tick()) for key in keys]
        self._entries.update((entry.key, entry) for entry in entries)
        return [entry.slot for entry in entries]

    def commit(self, keys: Iterable[BlockKey]) -> None:
        """The blocks are in their slots on every rank: WRITING becomes READY, DOOMED becomes ABSENT."""
        for key in keys:
            entry = self._entries[key]
            assert entry.writing, "commit without reserve"
            entry.writing = False
            if entry.state is SlotState.DOOMED:
                self._release(entry)
            else:
                entry.state = SlotState.READY
                self._offer(entry)

    def abort(self, keys: Iterable[BlockKey]) -> None:
        """The blocks did not arrive, and no copy writes to their slots any more."""
        for key in keys:
            assert self._entries[key].writing, "abort without reserve"
            self._release(self._entries[key])

    def pin(self, keys: Iterable[BlockKey]) -> None:
        """A copy is going to read these READY blocks: they keep their slots until ``unpin``. Counted."""
        for key in keys:
            entry = self._entries[key]
            assert entry.state is SlotState.READY, "only a READY block can be read"
            self._num_evictable -= entry.evictable
            entry.pins += 1

    def unpin(self, keys: Iterable[BlockKey]) -> None:
        """The copy ended. The last one makes the block evictable."""
        for key in keys:
            entry = self._entries[key]
            assert entry.pins > 0, "unpin without pin"
            entry.pins -= 1
            if entry.pins:
                continue
            if entry.state is SlotState.DOOMED:
                self._release(entry)
            else:
                self._offer(entry)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Counts as a use, the last key as the latest. Keys that are not here are skipped.

        Of a prefix, touch the last block first: then eviction shortens prefixes from their end.
        """
        for key in keys:
            if (entry := self._entries.get(key)) is not None:
                entry.last_use = self.clock.tick()

    def drop(self, keys: Iterable[BlockKey]) -> DropOutcome:
        """Makes blocks unfindable; frees their slots now, or when the copy that uses them ends."""
        freed = doomed = 0
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                continue
            if entry.writing or entry.pins:
                entry.state = SlotState.DOOMED
                doomed += 1
            else:
                self._release(entry)
                freed += 1
        return DropOutcome(freed, doomed)

    def clear(self) -> None:
        """Drops every READY block that nothing reads."""
        for entry in [entry for entry in self._entries.values() if entry.evictable]:
            self._release(entry)

    def check_integrity(self) -> SlotCounts:
        """Asserts that every slot is free or has one key, and that states, pins and the queue agree."""
        used = [entry.slot for entry in self._entries.values()]
        assert sorted([*self._free, *used]) == list(range(self.num_slots)), "a slot is lost or used twice"
        writing = ready = pinned = doomed = 0
        for entry in self._entries.values():
            assert entry.queued or not entry.evictable
            assert not (entry.writing and entry.pins)
            if entry.state is SlotState.WRITING:
                assert entry.writing
                writing += 1
            elif entry.state is SlotState.DOOMED:
                assert entry.writing or entry.pins, "a doomed slot that nothing will free"
                doomed += 1
            elif entry.pins:
                pinned += 1
            else:
                ready += 1
        assert self._num_evictable == ready
        queued = [entry for _, entry in self._queue if self._is_here(entry)]
        assert len(queued) == sum(entry.queued for entry in self._entries.values()), "twice in the queue, or lost"
        assert all(last_use <= entry.last_use for last_use, entry in self._queue)
        return SlotCounts(len(self._free), writing, ready, pinned, doomed)

    def _is_here(self, entry: _Entry) -> bool:
        return self._entries.get(entry.key) is entry

    def _offer(self, entry: _Entry) -> None:
        """It may be evicted from now on."""
        self._num_evictable += 1
        if entry.queued:
            return
        entry.queued = True
        heappush(self._queue, (entry.last_use, entry))
        if len(self._queue) > 2 * self.num_slots:  # most of it was dropped since
            self._queue = [(each.last_use, each) for _, each in self._queue if self._is_here(each)]
            heapify(self._queue)

    def _oldest(self) -> _Entry:
        """The evictable entry that was not used for longest; there must be one."""
        while True:
            last_use, entry = self._queue[0]
            if not (self._is_here(entry) and entry.evictable):
                heappop(self._queue)
                entry.queued = False
            elif entry.last_use != last_use:
                heapreplace(self._queue, (entry.last_use, entry))
            else:
                return entry

    def _release(self, entry: _Entry) -> None:
        self._num_evictable -= entry.evictable
        del self._entries[entry.key]
        self._free.append(entry.slot)
