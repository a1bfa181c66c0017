"""GPU blocks that stay until a copy of ours has ended, whatever becomes of their request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class HeldBlocks:
    """A block may be held for several copies; each is one reference in the pool."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def hold(self, block_ids: Iterable[int]) -> None:
        held = list(block_ids)
        self._pool.touch([self._pool.blocks[block] for block in held])
        for block in held:
            self._counts[block] = self._counts.get(block, 0) + 1

    def release(self, block_ids: Iterable[int]) -> None:
        released = []
        for block in block_ids:
            self._counts[block] -= 1
            if not self._counts[block]:
                del self._counts[block]
            released.append(self._pool.blocks[block])
        # Deepest first, as vLLM frees a request: the head of a prefix is then evicted last.
        self._pool.free_blocks(reversed(released))
