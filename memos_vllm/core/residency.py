"""Which blocks to keep, which to give up first, and which to bring from a lower tier before they are asked for.

A scene's value is per byte, so a block is worth the sum over the scenes that contain it: the head of a
chain is worth what all its continuations are, the last block least, and giving up the least valuable
block shortens chains from their end. Among equals the least recently used goes first.

The policy only decides. The caller moves the bytes and tells what became of them:

    ABSENT --plan / loading--> LOADING --resident--> RESIDENT --evict / absent--> ABSENT
                                  '------absent------> ABSENT
    held: a request uses the block; it is never given up meanwhile
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from memos_vllm.core.block_tree import ABSENT, LOADING, RESIDENT, BlockTree, Segment, num_evictable
from memos_vllm.core.segment_queues import SegmentQueues

SWAP_GAIN = 1.25
"""A block is brought in place of another only if it is worth this many times as much: a copy costs
bandwidth, and estimates that differ by less are the same estimate."""


class Values(Protocol):
    """Where the values of scenes come from: a ``Predictor``, or what others have told (``ToldValues``)."""

    def value(self, scene_id: str) -> float: ...

    def take_changes(self) -> set[str]:
        """Scenes whose value changed since the last call."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """Blocks to bring, in this order, and blocks that make room for them; both are marked already."""

    fetch: list[Hashable] = field(default_factory=list)
    evict: list[Hashable] = field(default_factory=list)


@dataclass(slots=True)
class _Chain:
    body: Segment
    """Ends with the last block, or with the one before where the last stands apart."""
    tail: Segment | None
    length: int
    value: float = 0.0
    tail_value: float = 0.0


class ResidencyPolicy:
    """Not safe for threads; one loop owns it, with the values.

    Args:
        values: of the scenes.
        swap_gain: see ``SWAP_GAIN``.
        partial_tails: a chain's last block may be partial, so that a longer chain has another one in its
            place. How often it is used again is then learned apart. vLLM's blocks are full: False.
        watch_worth: see ``take_turned``.
        in_use_from: what is worth as much is in use by requests, which bring it themselves: never planned.
    """

    def __init__(
        self,
        values: Values,
        swap_gain: float = SWAP_GAIN,
        partial_tails: bool = False,
        watch_worth: bool = False,
        in_use_from: float = math.inf,
    ) -> None:
        self.values, self.swap_gain, self.partial_tails = values, swap_gain, partial_tails
        self._turned: list[list[Hashable]] | None = [] if watch_worth else None
        self.tree = BlockTree()
        self._queues = SegmentQueues(self.tree, in_use_from)
        self.num_resident = 0
        """RESIDENT or LOADING."""
        self._chains: dict[str, _Chain] = {}
        self._tail_uses, self._tail_returns = 1.0, 2.0

    # -- scenes ------------------------------------------------------------------------------------

    def track(self, scene_id: str, blocks: Sequence[Hashable]) -> None:
        """The scene's blocks from the first on; replaces what was tracked, e.g. when a conversation went on."""
        assert blocks
        old = self._chains.get(scene_id)
        if self.partial_tails and len(blocks) > 1:
            body, touched = self.tree.insert(blocks[:-1])
            tail, more = self.tree.insert(blocks[-1:], after=body)
            touched += more
        else:
            body, touched = self.tree.insert(blocks)
            tail = None
        chain = _Chain(body, tail, len(blocks))
        self._chains[scene_id] = chain
        if tail is not None:
            tail.num_tails += 1
        for segment in self._path(chain):
            segment.num_scenes += 1
        for segment in touched:
            self._queues.file(segment)
        self._apply(chain, self.values.value(scene_id))
        if old is not None:
            self._drop(old)

    def forget(self, scene_id: str) -> None:
        """The scene is gone. Its blocks that are resident stay so until room is needed: they are worth nothing now."""
        chain = self._chains.pop(scene_id, None)
        if chain is not None:
            self._drop(chain)

    def used(self, scene_id: str, num_blocks: int, now: float) -> None:
        """A request used the first ``num_blocks`` of the scene's chain."""
        chain = self._chains.get(scene_id)
        if chain is None:
            return
        if chain.tail is not None and num_blocks >= chain.length - 1:
            self._tail_returns += 1
            self._tail_uses += num_blocks >= chain.length
        for segment in self._path(chain):
            if segment.start < num_blocks:
                segment.last_use = max(segment.last_use, now)
                self._queues.file(segment)

    def update(self) -> None:
        """Takes over what has changed since the last call."""
        for scene_id in self.values.take_changes():
            chain = self._chains.get(scene_id)
            if chain is not None:
                self._apply(chain, self.values.value(scene_id))

    def take_turned(self) -> list[list[Hashable]]:
        """Runs of blocks that became worth something, or nothing, since the last call, in that order.

        For a caller who keeps blocks that are worth nothing elsewhere; only with ``watch_worth``.
        """
        assert self._turned is not None
        turned, self._turned = self._turned, []
        return turned

    # -- blocks ------------------------------------------------------------------------------------

    def state(self, block: Hashable) -> int:
        found = self.tree.find(block)
        return ABSENT if found is None else found[0].states[found[1]]

    def value(self, block: Hashable) -> float:
        """Expected seconds saved per byte; 0 for a block of no scene."""
        segment = self.tree.segment_of(block)
        return 0.0 if segment is None else segment.value

    def resident(self, blocks: Iterable[Hashable]) -> None:
        """Arrived, or were computed. Blocks of no tracked chain are ignored."""
        self._mark(blocks, RESIDENT)

    def loading(self, blocks: Iterable[Hashable]) -> None:
        """On their way, and have their place."""
        self._mark(blocks, LOADING)

    def absent(self, blocks: Iterable[Hashable]) -> None:
        """Given up, or did not arrive."""
        self._mark(blocks, ABSENT)

    def hold(self, blocks: Iterable[Hashable]) -> None:
        """A request uses them: counted, until ``release``."""
        self._hold(blocks, 1)

    def release(self, blocks: Iterable[Hashable]) -> None:
        self._hold(blocks, -1)

    # -- decisions ---------------------------------------------------------------------------------

    def order(self, blocks: Iterable[Hashable]) -> list[Hashable]:
        """Sorted: what to give up first stands first. Blocks of no scene come before all others, as they were."""

        def key(block: Hashable) -> tuple[float, float, int]:
            segment = self.tree.segment_of(block)
            if segment is None:
                return (-1.0, 0.0, 0)
            return (segment.value, segment.last_use, -self.tree.depth(block))

        return sorted(blocks, key=key)

    def coldest(self, num_blocks: int, below: float = math.inf) -> list[Hashable]:
        """Up to ``num_blocks`` RESIDENT blocks that nobody holds, worth less than ``below``; least first."""
        out: list[Hashable] = []
        taken: set[Segment] = set()
        while len(out) < num_blocks:
            segment = self._queues.lowest()
            if segment is None or segment.value >= below:
                break
            self._queues.pass_lowest()
            if segment in taken:  # queued twice
                continue
            taken.add(segment)
            place = len(segment.blocks)
            while len(out) < num_blocks and (place := segment.states.rfind(RESIDENT, 0, place)) >= 0:
                if not segment.held[place]:
                    out.append(segment.blocks[place])
        for segment in taken:
            self._queues.file(segment)
        return out

    def evict(self, num_blocks: int, below: float = math.inf) -> list[Hashable] | None:
        """Gives up exactly ``num_blocks``, marked ABSENT; or None, and nothing has changed."""
        blocks = self.coldest(num_blocks, below)
        if len(blocks) < num_blocks:
            return None
        self.absent(blocks)
        return blocks

    def plan(
        self,
        budget_blocks: int,
        free_blocks: int,
        available: Callable[[Hashable], bool] = lambda block: True,
        free_worths: Iterable[float] = (),
    ) -> Plan:
        """What to bring now: the most valuable absent blocks, first into free places, then in place of others.

        Args:
            budget_blocks: how many at most.
            free_blocks: places that no tracked block has.
            available: whether a lower tier has the block. A block behind one that is not available is not brought.
            free_worths: of what the free places hold, the one that is taken first being first, in the unit of
                values; those that follow the last one named hold nothing.
        """
        plan = Plan()
        skipped: list[Segment] = []
        worths = iter(free_worths)
        worth = next(worths, 0.0) if free_blocks > 0 else math.inf
        while len(plan.fetch) < budget_blocks:
            segment = self._queues.highest()
            if segment is None:
                break
            parent = segment.parent
            block = segment.blocks[segment.states.index(ABSENT)]
            if (parent is not None and parent.num_absent) or not available(block):
                self._queues.pass_highest()
                skipped.append(segment)
                continue
            if worth * self.swap_gain < segment.value:
                free_blocks -= 1
                worth = next(worths, 0.0) if free_blocks > 0 else math.inf
            else:
                lowest = self._queues.lowest()
                if lowest is None or lowest.value * self.swap_gain >= segment.value:
                    break
                victim = _last_evictable(lowest)
                plan.evict.append(lowest.blocks[victim])
                self._set_state(lowest, victim, ABSENT)
                self._prune(lowest)
            self._mark([block], LOADING)
            plan.fetch.append(block)
        for segment in skipped:
            self._queues.file(segment)
        return plan

    # -- inside ------------------------------------------------------------------------------------

    @property
    def tail_share(self) -> float:
        """How often a chain's last block was used again when the rest was."""
        return self._tail_uses / self._tail_returns

    def check_integrity(self) -> None:
        """Asserts that counters and values are the sums that they stand for."""
        resident = 0
        expected: dict[Segment, list[float]] = {}
        for chain in self._chains.values():
            for segment in self._path(chain):
                cell = expected.setdefault(segment, [0, 0.0])
                cell[0] += 1
                cell[1] += chain.tail_value if segment is chain.tail else chain.value
        segments = {segment for block in self.tree.blocks() if (segment := self.tree.segment_of(block)) is not None}
        for segment in segments:
            num_scenes, value = expected.get(segment, (0, 0.0))
            assert segment.num_scenes == num_scenes
            assert math.isclose(segment.value, value, rel_tol=1e-6, abs_tol=1e-12)
            assert segment.num_absent == segment.states.count(ABSENT)
            assert segment.num_evictable == num_evictable(segment)
            resident += len(segment.blocks) - segment.num_absent
        assert resident == self.num_resident
        self._queues.check_integrity(segments)

    def _path(self, chain: _Chain) -> Iterable[Segment]:
        return self.tree.path(chain.tail or chain.body)

    def _apply(self, chain: _Chain, value: float) -> None:
        tail_value = value * self.tail_share
        body, tail = value - chain.value, tail_value - chain.tail_value
        chain.value, chain.tail_value = value, tail_value
        for segment in self._path(chain):
            self._set_value(segment, max(0.0, segment.value + (tail if segment is chain.tail else body)))

    def _drop(self, chain: _Chain) -> None:
        for segment in self._path(chain):
            segment.num_scenes -= 1
            own = chain.tail_value if segment is chain.tail else chain.value
            self._set_value(segment, max(0.0, segment.value - own) if segment.num_scenes else 0.0)
        if chain.tail is not None:
            chain.tail.num_tails -= 1
        self._prune(chain.tail or chain.body)

    def _set_value(self, segment: Segment, value: float) -> None:
        if self._turned is not None and (segment.value > 0.0) != (value > 0.0):
            self._turned.append(list(segment.blocks))
        segment.value = value
        self._queues.file(segment)

    def _prune(self, segment: Segment) -> None:
        joined = self.tree.prune(segment)
        if joined is not None:
            self._queues.file(joined)

    def _mark(self, blocks: Iterable[Hashable], state: int) -> None:
        for block in blocks:
            found = self.tree.find(block)
            if found is not None:
                self._set_state(*found, state)
                if state == ABSENT:
                    self._prune(found[0])

    def _set_state(self, segment: Segment, place: int, state: int) -> None:
        old = segment.states[place]
        if old == state:
            return
        free = not segment.held[place]
        segment.states[place] = state
        segment.num_absent += (state == ABSENT) - (old == ABSENT)
        segment.num_evictable += free * ((state == RESIDENT) - (old == RESIDENT))
        self.num_resident += (old == ABSENT) - (state == ABSENT)
        if segment.num_absent == 1 or segment.num_evictable == 1:  # it may have been in a queue before, or not
            self._queues.file(segment)

    def _hold(self, blocks: Iterable[Hashable], change: int) -> None:
        for block in blocks:
            found = self.tree.find(block)
            if found is None:
                continue
            segment, place = found
            before = segment.held[place]
            segment.held[place] = before + change
            assert segment.held[place] >= 0, "release without hold"
            if segment.states[place] == RESIDENT and (before == 0) != (segment.held[place] == 0):
                segment.num_evictable -= change
                self._queues.file(segment)
            if change < 0:
                self._prune(segment)


def _last_evictable(segment: Segment) -> int:
    place = segment.states.rfind(RESIDENT)
    while segment.held[place]:
        place = segment.states.rfind(RESIDENT, 0, place)
        assert place >= 0, "num_evictable is wrong"
    return place
