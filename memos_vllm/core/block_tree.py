"""The chains of all scenes as one tree: a segment is a run of blocks that the same scenes contain.

    root -- [system prompt] --+-- [memory of user A] -- [conversation 1]
                              +-- [memory of user B] --+-- [conversation 2]
                                                       +-- [conversation 3]

A block is named by any hashable key that stands for the whole prefix up to it, as vLLM's block hashes do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

ABSENT, LOADING, RESIDENT = 0, 1, 2


class Segment:
    """Blocks in the order of the chain, each ABSENT, LOADING or RESIDENT, and held by so many requests."""

    __slots__ = (
        "blocks",
        "children",
        "held",
        "last_use",
        "num_absent",
        "num_evictable",
        "num_scenes",
        "num_tails",
        "parent",
        "serial",
        "start",
        "states",
        "value",
    )

    def __init__(self, blocks: list[Hashable], parent: Segment | None, start: int, serial: int) -> None:
        self.blocks = blocks
        self.parent = parent
        self.start = start
        """Blocks before this segment."""
        self.serial = serial
        self.states = bytearray(len(blocks))
        self.held = [0] * len(blocks)
        self.num_absent = len(blocks)
        self.num_evictable = 0
        """RESIDENT and not held."""
        self.num_scenes = 0
        """That contain this segment."""
        self.num_tails = 0
        """Of which this is the last block, whose value is counted apart."""
        self.value = 0.0
        self.last_use = 0.0
        self.children: dict[Hashable, Segment] = {}


class BlockTree:
    def __init__(self) -> None:
        self.root = Segment([], None, 0, 0)
        self._of_block: dict[Hashable, Segment] = {}
        self._depth: dict[Hashable, int] = {}
        self._serial = 0
        self.num_segments = 0

    def __len__(self) -> int:
        return len(self._of_block)

    def find(self, block: Hashable) -> tuple[Segment, int] | None:
        """The segment of a block and the place in it."""
        segment = self._of_block.get(block)
        return None if segment is None else (segment, self._depth[block] - segment.start)

    def depth(self, block: Hashable) -> int:
        """Blocks before this one in its chain."""
        return self._depth[block]

    def segment_of(self, block: Hashable) -> Segment | None:
        return self._of_block.get(block)

    def blocks(self) -> Iterator[Hashable]:
        return iter(self._of_block)

    def insert(self, blocks: Sequence[Hashable], after: Segment | None = None) -> tuple[Segment, list[Segment]]:
        """The segment that ends with the last block, and the segments that are new or were cut for it.

        ``after``: the chain goes on behind this segment's last block.
        """
        node = after or self.root
        touched: list[Segment] = []
        done = 0
        while done < len(blocks):
            child = node.children.get(blocks[done])
            if child is None:
                child = self._append(node, list(blocks[done:]))
                touched.append(child)
                return child, touched
            length = len(child.blocks)
            same = 1
            while same < length and done + same < len(blocks) and child.blocks[same] == blocks[done + same]:
                same += 1
            if same < length:
                upper = self._cut(child, same)
                touched += [upper, child]
                child = upper
            node = child
            done += same
        return node, touched

    def path(self, segment: Segment) -> Iterator[Segment]:
        """From a segment up to the first."""
        while segment.parent is not None:
            yield segment
            segment = segment.parent

    def prune(self, segment: Segment) -> Segment | None:
        """Forgets a segment, and what is above it, as far as nobody needs it. Returns what was joined thereby."""
        while segment.parent is not None and not segment.num_scenes and not segment.children:
            if segment.num_absent < len(segment.blocks) or any(segment.held):
                return None
            parent = segment.parent
            del parent.children[segment.blocks[0]]
            for block in segment.blocks:
                del self._of_block[block], self._depth[block]
            self._gone(segment)
            segment = parent
        return self._join(segment)

    def _join(self, upper: Segment) -> Segment | None:
        """Makes a segment and its only child one, if the same scenes contain both; the child keeps its identity."""
        if upper.parent is None or len(upper.children) != 1:
            return None
        (child,) = upper.children.values()
        if child.num_scenes != upper.num_scenes or child.num_tails or upper.num_tails:
            return None
        child.blocks = upper.blocks + child.blocks
        child.states = upper.states + child.states
        child.held = upper.held + child.held
        child.start, child.parent = upper.start, upper.parent
        child.parent.children[child.blocks[0]] = child
        for block in upper.blocks:
            self._of_block[block] = child
        count(child)
        self._gone(upper)
        return child

    def _gone(self, segment: Segment) -> None:
        """Whoever still has it in a queue sees that it is empty."""
        segment.parent = None
        segment.num_absent = segment.num_evictable = 0
        self.num_segments -= 1

    def _append(self, parent: Segment, blocks: list[Hashable]) -> Segment:
        self._serial += 1
        segment = Segment(blocks, parent, parent.start + len(parent.blocks), self._serial)
        parent.children[blocks[0]] = segment
        for depth, block in enumerate(blocks, segment.start):
            assert block not in self._of_block, "a block key stands for its whole prefix"
            self._of_block[block] = segment
            self._depth[block] = depth
        self.num_segments += 1
        return segment

    def _cut(self, segment: Segment, at: int) -> Segment:
        """Makes the first ``at`` blocks a segment of their own, above the rest; the rest keeps its identity."""
        assert segment.parent is not None and 0 < at < len(segment.blocks)
        self._serial += 1
        upper = Segment(segment.blocks[:at], segment.parent, segment.start, self._serial)
        upper.states, segment.states = segment.states[:at], segment.states[at:]
        upper.held, segment.held = segment.held[:at], segment.held[at:]
        upper.num_scenes, upper.value, upper.last_use = segment.num_scenes, segment.value, segment.last_use
        assert not segment.num_tails, "a last block stands alone"
        segment.parent.children[upper.blocks[0]] = upper
        segment.blocks = segment.blocks[at:]
        segment.parent, segment.start = upper, segment.start + at
        upper.children[segment.blocks[0]] = segment
        for block in upper.blocks:
            self._of_block[block] = upper
        for each in (upper, segment):
            count(each)
        self.num_segments += 1
        return upper


def count(segment: Segment) -> None:
    """Brings the counters up to date with the states."""
    segment.num_absent = segment.states.count(ABSENT)
    segment.num_evictable = num_evictable(segment)


def num_evictable(segment: Segment) -> int:
    """RESIDENT and not held, counted one by one."""
    return sum(state == RESIDENT and not held for state, held in zip(segment.states, segment.held, strict=True))
