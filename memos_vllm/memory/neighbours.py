"""Which memories stand beside which in a conversation, and what they lend each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memos_vllm.memory.postings import Slots

STEPS = 2
WEIGHT_PER_STEP = 0.5
"""Each step away halves. Not fitted: see docs/RECALL.md."""

Floats = npt.NDArray[np.floating]


class Neighbours:
    """Chains of slots, one per conversation, in the order in which things were said. Slot 0 ends them."""

    def __init__(self) -> None:
        self._links = np.zeros((2, 16), np.int64)  # [before and after, capacity]

    def grow(self, slot: int) -> None:
        """Makes room for a new slot, which has no neighbours yet."""
        if slot >= self._links.shape[1]:
            self._links = np.concatenate([self._links, np.zeros_like(self._links)], axis=1)
        self._links[:, slot] = 0

    def link(self, before: int, slot: int) -> None:
        """Puts a slot behind another one."""
        after = int(self._links[1, before])
        self._links[:, slot] = before, after
        self._links[1, before] = slot
        if after:
            self._links[0, after] = slot

    def link_first(self, slot: int, after: int) -> None:
        """Puts a slot in front of a chain's first."""
        self._links[:, slot] = 0, after
        self._links[0, after] = slot

    def unlink(self, slot: int) -> None:
        """What stood on both sides of it then stands side by side."""
        before, after = self._links[:, slot]
        if before:
            self._links[1, before] = after
        if after:
            self._links[0, after] = before
        self._links[:, slot] = 0

    def before(self, slot: int) -> int:
        return int(self._links[0, slot])

    def around(self, slot: int, steps: int) -> tuple[list[int], list[int]]:
        """Up to ``steps`` slots before it and after it, in their order."""
        sides: tuple[list[int], list[int]] = ([], [])
        for side, found in enumerate(sides):
            at = slot
            while len(found) < steps and (at := int(self._links[side, at])):
                found.append(at)
        return sides[0][::-1], sides[1]

    def spread(self, values: Floats) -> Floats:
        """Each slot's value and its neighbours' by weight. [num slots, ...] in and out."""
        values = values.copy()
        values[0] = 0
        total = values.copy()
        for links in self._links[:, : len(values)]:
            at, weight = links, WEIGHT_PER_STEP
            for _ in range(STEPS):
                total += weight * values[at]
                at, weight = links[at], weight * WEIGHT_PER_STEP
        total[0] = 0
        return total

    def spread_sparse(self, slots: Slots, weights: npt.NDArray[np.float64]) -> tuple[Slots, npt.NDArray[np.float64]]:
        """The same where only some slots have a value: slots, some of them several times, and parts to add up."""
        all_slots, all_weights = [slots], [weights]
        for links in self._links:
            at, weight = slots, weights
            for _ in range(STEPS):
                at, weight = links[at], weight * WEIGHT_PER_STEP
                there = at > 0
                if not there.any():
                    break
                at, weight = at[there], weight[there]
                all_slots.append(at)
                all_weights.append(weight)
        return np.concatenate(all_slots), np.concatenate(all_weights)

    def reach(self, slots: Slots) -> Slots:
        """The slots and all that lend to them, sorted."""
        found = [slots]
        for links in self._links:
            at = slots
            for _ in range(STEPS):
                at = links[at]
                found.append(at)
        reached = np.unique(np.concatenate(found))
        return reached[reached > 0]

    def renumbered(self, new_slots: npt.NDArray[np.int64], num_slots: int) -> Neighbours:
        renewed = Neighbours()
        renewed._links = np.zeros((2, max(16, 2 * num_slots)), np.int64)
        kept = new_slots > 0
        renewed._links[:, new_slots[kept]] = new_slots[self._links[:, : len(new_slots)][:, kept]]
        return renewed
