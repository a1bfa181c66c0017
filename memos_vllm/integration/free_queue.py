"""vLLM's queue of free blocks, in the order of predicted value.

Retention by reordering, not by pinning: blocks of scenes that are predicted to come next are free
like all others, but leave the queue last. So they count for admission, a live request takes them
when it needs them, and nothing can deadlock; references that are held instead do all three (see
``docs/ARCHITECTURE.md``).

    plain    blocks nobody expects, least recently used first            leaves first
    kept     blocks that are worth something, in no order of their own   the policy says which leaves

A block is worth what the scenes with it are worth together (``core.residency``). The queue tells the
policy what becomes of such blocks, so that a policy's RESIDENT block is exactly a kept one.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from memos_vllm.core.block_tree import RESIDENT
from memos_vllm.core.residency import ResidencyPolicy
from memos_vllm.core.told_values import ToldValues
from memos_vllm.integration.plain_cache import PlainCache

logger = logging.getLogger(__name__)


class KeepingFreeQueue(FreeKVCacheBlockQueue):
    """Takes the place of ``BlockPool.free_block_queue``; all calls are from the engine's loop.

    Args:
        queue: the pool's own, whose order is taken over.
        policy: knows blocks by vLLM's hash with group id.
    """

    def __init__(
        self, queue: FreeKVCacheBlockQueue, policy: ResidencyPolicy, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy = policy
        self._kept: dict[bytes, KVCacheBlock] = {}
        self._hash_of: dict[int, bytes] = {}  # of kept blocks by id
        self._in_use: dict[int, bytes] = {}  # blocks that are worth something and referenced: id and hash
        self._num_plain = 0
        self.plain = PlainCache(now)
        super().__init__(queue.get_all_free_blocks())

    @property
    def num_free_blocks(self) -> int:  # type: ignore[override]
        """Plain and kept; the base class counts with it."""
        return self._num_plain + len(self._kept)

    @num_free_blocks.setter
    def num_free_blocks(self, total: int) -> None:
        self._num_plain = total - len(self._kept)

    @property
    def num_plain_blocks(self) -> int:
        """Free blocks that no predicted scene has."""
        return self._num_plain

    @property
    def num_kept_blocks(self) -> int:
        return len(self._kept)

    def plain_worths(self) -> Iterator[float]:
        """What plain blocks hold is worth, as ``PlainCache.worth``; the one that leaves next is first."""
        block = self.fake_free_list_head.next_free_block
        while block is not None and block is not self.fake_free_list_tail:
            yield self.plain.worth(block)
            block = block.next_free_block

    def keeps(self, block_hash: bytes) -> bool:
        return block_hash in self._kept

    # -- as values change -----------------------------------------------------------------------

    def worth_something(self, block_hash: bytes, block: KVCacheBlock | None) -> None:
        """A block became worth something. ``block``: where it is in the prefix cache, if it is."""
        if block is None or block.block_hash != block_hash:
            return  # absent, as the policy thinks; or a block with several hashes, which is found by its first
        if block.ref_cnt:
            self._in_use[block.block_id] = block_hash
            self._policy.loading([block_hash])
        elif block.block_id not in self._hash_of:
            self.plain.expected(block)
            super().remove(block)
            self._keep(block_hash, block)

    def worth_nothing(self, block_hash: bytes) -> None:
        if (block := self._kept.pop(block_hash, None)) is not None:
            del self._hash_of[block.block_id]
            super().append(block)
        self._policy.absent([block_hash])

    def give_up(self, block_hashes: Iterable[bytes]) -> None:
        """Kept blocks that the policy gave up for better ones: they leave next."""
        blocks = [self._kept.pop(block_hash) for block_hash in block_hashes]
        for block in blocks:
            del self._hash_of[block.block_id]
        super().prepend_n(blocks)

    def lose_track(self) -> None:
        """The prefix cache was emptied: no free block holds anything any more."""
        for block_hash in [*self._kept, *self._in_use.values()]:
            self.worth_nothing(block_hash)
        self._in_use.clear()

    def keep_nothing(self) -> None:
        """Nobody expects anything any more, and nobody will."""
        self._policy = ResidencyPolicy(ToldValues())
        blocks = [*self._kept.values()]
        self._kept.clear()
        self._hash_of.clear()
        self._in_use.clear()
        for block in blocks:
            super().append(block)

    def _keep(self, block_hash: bytes, block: KVCacheBlock) -> None:
        self._kept[block_hash] = block
        self._hash_of[block.block_id] = block_hash
        self._policy.resident([block_hash])

    # -- the queue's own interface --------------------------------------------------------------

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0] if self.num_free_blocks else super().popleft()

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        assert self.num_free_blocks >= n
        popped = super().popleft_n(min(n, self._num_plain))
        self.plain.evicted(popped)
        if len(popped) < n:
            given_up = self._policy.evict(n - len(popped))
            if given_up is None or not self._kept.keys() >= set(given_up):
                # In the middle of an allocation: which blocks leave matters less than that they do.
                logger.error("the policy does not know the blocks that are kept; others leave in place of its choice")
                given_up = list(itertools.islice(self._kept, n - len(popped)))
                self._policy.absent(given_up)
            for block_hash in given_up:
                block = self._kept.pop(block_hash)  # type: ignore[arg-type]
                del self._hash_of[block.block_id]
                popped.append(block)
        return popped

    def remove(self, block: KVCacheBlock) -> None:
        block_hash = self._hash_of.pop(block.block_id, None)
        if block_hash is None:
            self.plain.hit(block)
            super().remove(block)
            return
        del self._kept[block_hash]
        self._in_use[block.block_id] = block_hash
        self._policy.loading([block_hash])

    def append(self, block: KVCacheBlock) -> None:
        was = self._in_use.pop(block.block_id, None)
        if was is not None and was != block.block_hash and was not in self._kept:
            self._policy.absent([was])  # its hash was taken from it while it was in use
        block_hash = block.block_hash
        if block_hash is not None and block_hash not in self._kept and self._policy.value(block_hash) > 0.0:
            self._keep(block_hash, block)
        else:
            self.plain.freed(block)
            super().append(block)

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        for block in blocks:
            self.append(block)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        for block in blocks:  # without a hash
            if (was := self._in_use.pop(block.block_id, None)) is not None and was not in self._kept:
                self._policy.absent([was])
        super().prepend_n(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        return super().get_all_free_blocks() + [self._kept[each] for each in self._policy.order(self._kept)]  # type: ignore[index]

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        blocks = self.get_all_free_blocks()
        ids = [block.block_id for block in blocks]
        return iter(blocks[ids.index(cursor.block_id) + 1 if cursor is not None else 0 :])

    def check_integrity(self) -> None:
        """A kept block is worth something, and RESIDENT for the policy; nothing else is."""
        assert len(self._hash_of) == len(self._kept)
        for block_hash, block in self._kept.items():
            assert block.ref_cnt == 0 and self._policy.value(block_hash) > 0.0
            assert self._policy.state(block_hash) == RESIDENT
        resident = [each for each in self._policy.tree.blocks() if self._policy.state(each) == RESIDENT]
        assert len(resident) == len(self._kept)
