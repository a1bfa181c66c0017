"""Prefetches under way: chunks of scenes on their way into GPU blocks."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos_vllm.integration.known_scenes import Scene
from memos_vllm.store import tags
from memos_vllm.store.manager import TierManager
from memos_vllm.store.ops import Op

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(slots=True)
class SceneLoad:
    """One chunk."""

    scene: Scene
    first: int
    """Position of the first block in the scene."""
    blocks: list[KVCacheBlock]
    op_ids: set[int]
    failed: bool = False
    """It arrives, and is not published."""

    @property
    def hashes(self) -> list[bytes]:
        return self.scene.hashes[self.first : self.first + len(self.blocks)]

    @property
    def tag(self) -> bytes:
        """Whose the blocks are."""
        return self.scene.tag


class SceneLoads:
    """Blocks are referenced from ``start`` to ``release``, and by hash they are found from ``publish`` on."""

    def __init__(self, pool: BlockPool, tiers: TierManager, block_size: int) -> None:
        self._pool = pool
        self._tiers = tiers
        self._block_size = block_size
        self._loads: list[SceneLoad] = []

    def __iter__(self) -> Iterator[SceneLoad]:
        return iter(self._loads)

    @property
    def num_blocks(self) -> int:
        return sum(len(load.blocks) for load in self._loads)

    def has(self, scene_id: str) -> bool:
        return any(load.scene.scene_id == scene_id for load in self._loads)

    def start(self, scene: Scene, first: int, end: int) -> list[Op]:
        """Reserves free blocks for a run of a scene's blocks; the copies."""
        blocks = self._pool.get_new_blocks(end - first)
        try:
            block_ids = [block.block_id for block in blocks]
            operations = self._tiers.plan_load(scene.keys[first:end], block_ids, prefetch=True)
        except BaseException:
            self._pool.free_blocks(blocks)
            raise
        self._loads.append(SceneLoad(scene, first, blocks, {operation.op_id for operation in operations}))
        return operations

    def fail(self, tag: bytes | None = None) -> None:
        """What is under way will not be published: all of it, or what a deletion names."""
        for load in self._loads:
            load.failed |= tag is None or tag in tags.parts(load.scene.tag)

    def ended(self, finished_ops: Collection[int], failed_ops: Collection[int]) -> Iterator[SceneLoad]:
        """Chunks whose last copy ended. Each has its blocks until the caller releases it."""
        for load in self._loads:
            load.failed |= not load.op_ids.isdisjoint(failed_ops)
            load.op_ids.difference_update(finished_ops)
        yield from [load for load in self._loads if not load.op_ids]

    def publish(self, load: SceneLoad) -> list[bytes]:
        """Lets requests find the blocks; their hashes. One that a live request computed meanwhile is left out."""
        hashes = load.scene.hashes
        by_index = [None] * load.first + load.blocks  # vLLM looks at the part from `first` on only
        published: list[bytes] = []
        for resident, group in itertools.groupby(
            range(load.first, len(by_index)),
            lambda index: self._pool.cached_block_hash_to_block.get_one_block(hashes[index]) is not None,
        ):
            indices = list(group)
            if resident:
                continue
            first, end = indices[0], indices[-1] + 1
            self._pool.cache_full_blocks(load.scene.request, by_index, first, end, self._block_size, 0)
            published += hashes[first:end]
        return published

    def release(self, load: SceneLoad) -> None:
        """The last block is then the first to leave."""
        self._loads.remove(load)
        self._pool.free_blocks(reversed(load.blocks))


class Places:
    """Where blocks are in the scenes that may be loaded."""

    def __init__(self, scenes: Iterable[tuple[Scene, Mapping[bytes, int]]]) -> None:
        self._scenes = list(scenes)
        self._last: tuple[Scene, Mapping[bytes, int]] | None = None

    def find(self, block_hash: Hashable) -> tuple[Scene, int] | None:
        """A scene with this block, that of the block before if it has both, and the position in it."""
        if self._last is None or block_hash not in self._last[1]:
            self._last = next((each for each in self._scenes if block_hash in each[1]), None)
        return None if self._last is None else (self._last[0], self._last[1][block_hash])  # type: ignore[index]

    def runs(self, hashes: Sequence[Any], max_blocks: int) -> Iterator[tuple[Scene, int, int]]:
        """Cuts into chunks of one scene's consecutive blocks: the scene, the first position, the end."""
        scene, first, end = None, 0, 0
        for block_hash in hashes:
            place = self.find(block_hash)
            assert place is not None
            if scene is place[0] and end == place[1] and end - first < max_blocks:
                end += 1
                continue
            if scene is not None:
                yield scene, first, end
            scene, first, end = place[0], place[1], place[1] + 1
        if scene is not None:
            yield scene, first, end
