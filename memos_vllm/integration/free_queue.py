"""vLLM's queue of free blocks, in the order of predicted value.

Retention by reordering, not by pinning: blocks of scenes that are predicted to come next are free
like all others, but leave the queue last. So they count for admission, a live request takes them
when it needs them, and nothing can deadlock; references that are held instead do all three (see
``docs/ARCHITECTURE.md``).

    plain   blocks nobody expects, least recently used first       leaves first
    kept    blocks of predicted scenes, least valuable first       leaves when plain is empty
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class KeepingFreeQueue(FreeKVCacheBlockQueue):
    """Takes the place of ``BlockPool.free_block_queue``; all calls are from the engine's loop.

    Args:
        queue: the pool's own, whose order is taken over.
    """

    def __init__(self, queue: FreeKVCacheBlockQueue) -> None:
        self._kept = FreeKVCacheBlockQueue([])
        self._kept_ids: set[int] = set()
        self._kept_hashes: frozenset[bytes] | set[bytes] = frozenset()
        self._num_plain = 0
        super().__init__(queue.get_all_free_blocks())

    @property
    def num_free_blocks(self) -> int:  # type: ignore[override]
        """Of both parts; the base class counts with it."""
        return self._num_plain + self._kept.num_free_blocks

    @num_free_blocks.setter
    def num_free_blocks(self, total: int) -> None:
        self._num_plain = total - self._kept.num_free_blocks

    @property
    def num_plain_blocks(self) -> int:
        """Free blocks that no predicted scene has."""
        return self._num_plain

    @property
    def num_kept_blocks(self) -> int:
        return self._kept.num_free_blocks

    def keep(self, hashes: Sequence[bytes], blocks: Iterable[KVCacheBlock]) -> None:
        """Says anew what is kept.

        Args:
            hashes: vLLM's hashes (with group id) of all blocks to keep, resident or not.
            blocks: those of them that are resident, least valuable first; the free ones are put
                into this order.
        """
        self._kept_hashes = set(hashes)
        for block in [block for block in self._kept.get_all_free_blocks() if not self._is_kept(block)]:
            self.remove(block)
            super().append(block)
        for block in blocks:
            if block.ref_cnt == 0:
                self.remove(block)
                self.append(block)

    def _is_kept(self, block: KVCacheBlock) -> bool:
        return block.block_hash is not None and block.block_hash in self._kept_hashes

    # -- the queue's own interface --------------------------------------------------------------

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0] if self.num_free_blocks else super().popleft()

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        assert self.num_free_blocks >= n
        num_plain = min(n, self._num_plain)
        popped = super().popleft_n(num_plain)
        if n > num_plain:
            forced = self._kept.popleft_n(n - num_plain)
            self._kept_ids.difference_update(block.block_id for block in forced)
            popped += forced
        return popped

    def remove(self, block: KVCacheBlock) -> None:
        if block.block_id in self._kept_ids:
            self._kept_ids.discard(block.block_id)
            self._kept.remove(block)
        else:
            super().remove(block)

    def append(self, block: KVCacheBlock) -> None:
        if self._is_kept(block):
            self._kept_ids.add(block.block_id)
            self._kept.append(block)
        else:
            super().append(block)

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        for block in blocks:
            self.append(block)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        return super().get_all_free_blocks() + self._kept.get_all_free_blocks()

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        if cursor is None or cursor.block_id not in self._kept_ids:
            yield from super().iter_blocks_after(cursor)
            cursor = None
        yield from self._kept.iter_blocks_after(cursor)
