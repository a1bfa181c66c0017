"""Whose KV is in the GPU's prefix cache, so that a deletion takes it out there too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memos_vllm.store import tags

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


@dataclass(slots=True)
class OwnedBlocks:
    """Owned by the engine's loop. At most one entry for each block of the pool.

    vLLM gives blocks to others without a word, so what is noted of a block holds as long as it has the hash
    that it had then.
    """

    pool: BlockPool
    _of: dict[int, tuple[Any, bytes]] = field(default_factory=dict)
    """Block id to hash and tag (``store.tags``)."""

    def note(self, block_ids: Iterable[int], tag: bytes) -> None:
        """These blocks are published, as far as they have a hash, and are of this owner."""
        for block_id in block_ids:
            if (block_hash := self.pool.blocks[block_id].block_hash) is not None:
                self._of[block_id] = block_hash, tag

    def evict(self, tag: bytes) -> int:
        """Takes out of the prefix cache all that the owner, or the adapter, has there; how many blocks."""
        gone = tags.with_part((of for _, of in self._of.values()), tag)
        owned = [block_id for block_id, (_, of) in self._of.items() if of in gone]
        noted = {block_id: self._of.pop(block_id)[0] for block_id in owned}
        theirs = {block_id for block_id, of in noted.items() if self.pool.blocks[block_id].block_hash == of}
        self.pool.evict_blocks(theirs)
        return len(theirs)
