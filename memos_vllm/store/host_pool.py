"""Which host slot holds which block: the scheduler side's table of the host pool.

    ABSENT --reserve--> WRITING --commit--> READY --evicted or dropped--> ABSENT
                          |  \\--abort--> ABSENT    READY and pinned: being read, never evicted
                          \\--drop--> DOOMED (gone for lookups; its slot is freed when the copy ends)

A slot is one block of KV in the memory of every rank. One thread (the scheduler's) owns the table;
nothing here blocks or copies. A slot returns to the free list only when no copy reads or writes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

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
    slot: int
    state: SlotState = SlotState.WRITING
    pins: int = 0
    writing: bool = True


class SlotTable:
    """Key to slot, least recently used first to go."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evicted = 0
        """Slots taken from READY blocks so far."""
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: dict[BlockKey, _Entry] = {}
        self._evictable: OrderedDict[BlockKey, None] = OrderedDict()  # READY and unpinned, oldest use first

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

    def reserve(self, keys: Sequence[BlockKey]) -> list[int] | None:
        """Slots to write ``keys`` to, evicting the least recently used; or None, and nothing has changed.

        Every key must be ABSENT. End each by ``commit`` or ``abort``.
        """
        assert len(set(keys)) == len(keys) and not any(key in self._entries for key in keys)
        missing = len(keys) - len(self._free)
        if missing > len(self._evictable):
            return None
        for _ in range(missing):
            self._release(next(iter(self._evictable)))
            self.num_evicted += 1
        slots = [self._free.pop() for _ in keys]
        self._entries.update((key, _Entry(slot)) for key, slot in zip(keys, slots, strict=True))
        return slots

    def commit(self, keys: Iterable[BlockKey]) -> None:
        """The blocks are in their slots on every rank: WRITING becomes READY, DOOMED becomes ABSENT."""
        for key in keys:
            entry = self._entries[key]
            assert entry.writing, "commit without reserve"
            entry.writing = False
            if entry.state is SlotState.DOOMED:
                self._release(key)
            else:
                entry.state = SlotState.READY
                self._evictable[key] = None

    def abort(self, keys: Iterable[BlockKey]) -> None:
        """The blocks did not arrive, and no copy writes to their slots any more."""
        for key in keys:
            assert self._entries[key].writing, "abort without reserve"
            self._release(key)

    def pin(self, keys: Iterable[BlockKey]) -> None:
        """A copy is going to read these READY blocks: they keep their slots until ``unpin``. Counted."""
        for key in keys:
            entry = self._entries[key]
            assert entry.state is SlotState.READY, "only a READY block can be read"
            entry.pins += 1
            self._evictable.pop(key, None)

    def unpin(self, keys: Iterable[BlockKey]) -> None:
        """The copy ended. The last one makes the block evictable, as the most recently used."""
        for key in keys:
            entry = self._entries[key]
            assert entry.pins > 0, "unpin without pin"
            entry.pins -= 1
            if entry.pins:
                continue
            if entry.state is SlotState.DOOMED:
                self._release(key)
            else:
                self._evictable[key] = None

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Counts as a use, the last key as the latest. Keys that are not here or in use are skipped.

        Of a prefix, touch the last block first: then eviction shortens prefixes from their end.
        """
        for key in keys:
            if key in self._evictable:
                self._evictable.move_to_end(key)

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
                self._release(key)
                freed += 1
        return DropOutcome(freed, doomed)

    def clear(self) -> int:
        """Drops every READY block that nothing reads; returns how many."""
        keys = list(self._evictable)
        for key in keys:
            self._release(key)
        return len(keys)

    def check_integrity(self) -> SlotCounts:
        """Asserts that every slot is free or has one key, and that states, pins and the LRU list agree."""
        used = [entry.slot for entry in self._entries.values()]
        assert sorted([*self._free, *used]) == list(range(self.num_slots)), "a slot is lost or used twice"
        writing = ready = pinned = doomed = 0
        for key, entry in self._entries.items():
            assert (key in self._evictable) == (entry.state is SlotState.READY and entry.pins == 0)
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
        assert len(self._evictable) == ready
        return SlotCounts(len(self._free), writing, ready, pinned, doomed)

    def _release(self, key: BlockKey) -> None:
        self._free.append(self._entries.pop(key).slot)
        self._evictable.pop(key, None)
