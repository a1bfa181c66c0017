"""vLLM's queue of free blocks, in the order of predicted value.

Retention by reordering, not by pinning: blocks of scenes that are predicted to come next are free
like all others, but leave the queue last. So they count for admission, a live request takes them
when it needs them, and nothing can deadlock; references that are held instead do all three (see
``docs/ARCHITECTURE.md``).

    plain           blocks nobody expects, least recently used first       leaves first
    kept, a part    blocks of one predicted scene, its last block first    least valuable scene first
    per scene

Telling a new order costs one step per scene, not per block, so that a pool of many thousand blocks
does not stop the engine at every turn's end.
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
        self._parts: dict[str, FreeKVCacheBlockQueue] = {}  # by scene, least valuable first
        self._part_of: dict[int, str] = {}  # kept blocks by id
        self._claims: dict[bytes, list[str]] = {}  # scenes that have the block with this hash
        self._num_plain = 0
        super().__init__(queue.get_all_free_blocks())

    @property
    def num_free_blocks(self) -> int:  # type: ignore[override]
        """Plain and kept; the base class counts with it."""
        return self._num_plain + len(self._part_of)

    @num_free_blocks.setter
    def num_free_blocks(self, total: int) -> None:
        self._num_plain = total - len(self._part_of)

    @property
    def num_plain_blocks(self) -> int:
        """Free blocks that no predicted scene has."""
        return self._num_plain

    @property
    def num_kept_blocks(self) -> int:
        return len(self._part_of)

    def keep(self, scene_id: str, hashes: Iterable[bytes], resident: Iterable[KVCacheBlock]) -> None:
        """From now on keeps a scene's blocks, as the most valuable until ``order`` says otherwise.

        Args:
            hashes: vLLM's hashes (with group id) of its blocks, resident or not.
            resident: those that are, the last one first.
        """
        assert scene_id not in self._parts
        self._parts[scene_id] = FreeKVCacheBlockQueue([])
        for block_hash in hashes:
            self._claims.setdefault(block_hash, []).append(scene_id)
        self._refile(block for block in resident if block.ref_cnt == 0)

    def release(self, scene_id: str, hashes: Iterable[bytes]) -> None:
        """Keeps a scene no more; ``hashes`` as given to ``keep``."""
        for block_hash in hashes:
            claims = self._claims[block_hash]
            claims.remove(scene_id)
            if not claims:
                del self._claims[block_hash]
        self._refile(self._parts[scene_id].get_all_free_blocks())
        del self._parts[scene_id]

    def order(self, scene_ids: Sequence[str]) -> None:
        """The kept scenes, all of them, least valuable first."""
        assert len(scene_ids) == len(self._parts)
        self._parts = {scene_id: self._parts[scene_id] for scene_id in scene_ids}

    def _refile(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            self.remove(block)
            self.append(block)

    # -- the queue's own interface --------------------------------------------------------------

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0] if self.num_free_blocks else super().popleft()

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        assert self.num_free_blocks >= n
        popped = super().popleft_n(min(n, self._num_plain))
        for part in self._parts.values():
            if len(popped) == n:
                break
            forced = part.popleft_n(min(n - len(popped), part.num_free_blocks))
            for block in forced:
                del self._part_of[block.block_id]
            popped += forced
        return popped

    def remove(self, block: KVCacheBlock) -> None:
        if (scene_id := self._part_of.pop(block.block_id, None)) is not None:
            self._parts[scene_id].remove(block)
        else:
            super().remove(block)

    def append(self, block: KVCacheBlock) -> None:
        claims = self._claims.get(block.block_hash) if block.block_hash is not None else None
        if claims:
            self._parts[claims[-1]].append(block)
            self._part_of[block.block_id] = claims[-1]
        else:
            super().append(block)

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        for block in blocks:
            self.append(block)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        return super().get_all_free_blocks() + [
            block for part in self._parts.values() for block in part.get_all_free_blocks()
        ]

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        blocks = self.get_all_free_blocks()
        ids = [block.block_id for block in blocks]
        return iter(blocks[ids.index(cursor.block_id) + 1 if cursor is not None else 0 :])
