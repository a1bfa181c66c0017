"""Postings in memory: for each term the slots that hold it, and how often.

A posting is one unsigned 32-bit number, the slot in the upper 24 bits and the frequency, up to 255, in
the lower 8. Postings of a term stand in the order in which they came, in an array that grows at its end;
the many terms of one posting (half of all, by Zipf's law) need no array.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_MAX_FREQUENCY = 255
_NONE = np.empty(0, np.uint32)

Slots = npt.NDArray[np.int64]


class Postings:
    def __init__(self) -> None:
        self._packed: dict[str, int | array[int]] = {}

    def __len__(self) -> int:
        """Terms."""
        return len(self._packed)

    def add(self, slot: int, counts: Mapping[str, int]) -> None:
        """Slots may come in any order, each once per term."""
        packed = self._packed
        for term, frequency in counts.items():
            posting = slot << 8 | min(frequency, _MAX_FREQUENCY)
            known = packed.get(term)
            if known is None:
                packed[term] = posting
            elif isinstance(known, int):
                packed[term] = array("I", (known, posting))
            else:
                known.append(posting)

    def of(self, term: str) -> tuple[Slots, npt.NDArray[np.int64]]:
        """Slots and frequencies; both empty for a term that nothing holds. [num postings] each."""
        found = self._raw(term)
        return (found >> 8).astype(np.int64), (found & 255).astype(np.int64)

    def slots(self, term: str) -> Slots:
        return (self._raw(term) >> 8).astype(np.int64)

    def renumbered(self, new_slots: npt.NDArray[np.int64]) -> Postings:
        """A copy in which ``new_slots[slot]`` takes the place of a slot; where it is 0, nothing does."""
        renewed = Postings()
        one_by_one = new_slots.tolist()
        for term, known in self._packed.items():
            if isinstance(known, int):
                if slot := one_by_one[known >> 8]:
                    renewed._packed[term] = slot << 8 | known & 255
                continue
            old = np.array(known, np.uint32)
            slots = new_slots[old >> 8].astype(np.uint32)
            kept = (slots << 8 | old & 255)[slots > 0]
            if len(kept):
                renewed._packed[term] = array("I", kept.tobytes()) if len(kept) > 1 else int(kept[0])
        return renewed

    def _raw(self, term: str) -> npt.NDArray[np.uint32]:
        known = self._packed.get(term)
        if known is None:
            return _NONE
        # A copy: an array that is looked at cannot grow.
        return np.array([known] if isinstance(known, int) else known, np.uint32)
