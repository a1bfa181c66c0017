"""Scenes in the engine: which predicted prefixes are on the GPU, and bringing them there.

A *scene* is an ordered token prefix that a coming request will probably have, with its salt and
adapter. The table learns scenes from finished requests, and is told by the API processes which of
them come next, in order of value. The algorithm, per scene of that order (MemOS, arXiv 2507.03724,
next-scene prediction; vLLM RFC 57103 asks for the same primitive):

    resolve    leading blocks that are resident already; of the rest, what a tier holds
    reserve    free blocks, of what nobody expects first; never more than the budget
    load       asynchronously, in chunks, behind every load that a request waits for
    publish    each block's hash, once every rank has its copy
    keep       resident blocks of predicted scenes leave the free queue last (``free_queue``)

No forward pass, no request, no pin: references are held only while the copy runs, and a live
request that needs the blocks takes them.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from memos_vllm.integration.free_queue import KeepingFreeQueue
from memos_vllm.store.manager import TierManager
from memos_vllm.store.ops import Op
from memos_vllm.types import BlockKey

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

SCENE_PARAM = "memos_scene"
"""Key in ``kv_transfer_params`` by which a request names its scene."""

KEEP_SHARE = 0.9
"""Share of the pool that kept blocks may take; the rest stays plain for whoever comes unexpected."""

IN_FLIGHT_SHARE = 0.25
"""Share of the pool that prefetches may hold at a time; a live request waits for no more than that."""

MAX_KNOWN_BLOCKS = 1_000_000
"""Blocks over all known scenes; about 200 bytes each. The scenes used least recently are forgotten first."""


class SceneState(StrEnum):
    UNKNOWN = "unknown"
    """No finished request has shown what the scene is."""
    ABSENT = "absent"
    """In no tier; only a prefill can bring it."""
    STORED = "stored"
    """Off the GPU, at least in part."""
    LOADING = "loading"
    READY = "ready"
    """Every block is in the GPU's prefix cache."""


@dataclass(slots=True)
class _Shown:
    """What is kept of the request that showed a scene: as much as publishing its blocks takes."""

    block_hashes: list[Any]
    cache_salt: str | None


@dataclass(slots=True, eq=False)
class Scene:
    scene_id: str
    request: _Shown | Request
    keys: list[BlockKey]
    """One per full block."""
    hashes: list[bytes]
    """vLLM's hashes with group id, one per full block."""

    @property
    def num_blocks(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class _Load:
    """One chunk of a prefetch under way."""

    scene: Scene
    first: int
    """Position of the first block in the scene."""
    blocks: list[KVCacheBlock]
    op_ids: set[int]
    failed: bool = False


@dataclass(slots=True)
class SceneTotals:
    """Since the start. An arrival is a request that names a scene which was registered before."""

    ready: int = 0
    """Arrivals that found all they share with the scene on the GPU."""
    late: int = 0
    """Arrivals whose prefetch was under way."""
    missed: int = 0
    """Arrivals that found less, with nothing under way."""
    other: int = 0
    """Arrivals whose prompt shares no block with the scene: memory or system prompt changed."""
    prefetched_blocks: int = 0
    used_blocks: int = 0
    """Prefetched blocks that a request was given."""
    wasted_blocks: int = 0
    """Prefetched blocks that were gone before a request was given them."""
    failed_blocks: int = 0


@dataclass(slots=True)
class SceneTable:
    """Owned by the engine's loop.

    Args:
        pool: vLLM's block pool; its free queue is replaced.
        tiers: where blocks are off the GPU.
        chunk_blocks: blocks per prefetch step.
    """

    pool: BlockPool
    tiers: TierManager
    block_size: int
    chunk_blocks: int
    totals: SceneTotals = field(default_factory=SceneTotals)
    queue: KeepingFreeQueue = field(init=False)
    _scenes: OrderedDict[str, Scene] = field(default_factory=OrderedDict)
    _num_known_blocks: int = 0
    _told: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    """By each API process: value and id of the scenes it expects."""
    _expected: list[str] = field(default_factory=list)
    """Predicted scenes that fit, most valuable first."""
    _wanted: dict[str, int] = field(default_factory=dict)
    """Of the expected ones, those that may still need a load, and their first block not yet seen to."""
    _loads: list[_Load] = field(default_factory=list)
    _unused: dict[bytes, None] = field(default_factory=dict)
    """Hashes of prefetched blocks that no request was given yet; those looked at last are at the end."""

    def __post_init__(self) -> None:
        self.queue = KeepingFreeQueue(self.pool.free_block_queue)
        self.pool.free_block_queue = self.queue

    # -- learning ------------------------------------------------------------------------------

    def register(self, scene_id: str, request: Request, keys: Sequence[BlockKey]) -> None:
        """A request ended; its full blocks are what the scene is from now on."""
        if not keys:
            return
        # vLLM's events of cached blocks tell tokens and more; without them hashes are enough.
        shown = request
        if not self.pool.enable_kv_cache_events:
            shown = _Shown(list(request.block_hashes[: len(keys)]), request.cache_salt)
        if (old := self._scenes.pop(scene_id, None)) is not None:
            self._num_known_blocks -= old.num_blocks
        hashes = [make_block_hash_with_group_id(of, 0) for of in request.block_hashes[: len(keys)]]
        scene = self._scenes[scene_id] = Scene(scene_id, shown, list(keys), hashes)
        self._num_known_blocks += len(keys)
        if old is not None and scene_id in self._expected:
            self.queue.release(scene_id, old.hashes)
            self._keep(scene)
            self._order()
        while self._num_known_blocks > MAX_KNOWN_BLOCKS and len(self._scenes) > 1:
            self._remove(next(iter(self._scenes)))

    def _remove(self, scene_id: str) -> None:
        scene = self._scenes.pop(scene_id)
        self._num_known_blocks -= scene.num_blocks
        self._wanted.pop(scene_id, None)
        if scene_id in self._expected:
            self._expected.remove(scene_id)
            self.queue.release(scene_id, scene.hashes)

    def clear(self) -> None:
        """Forgets all scenes; what is under way is not published."""
        for load in self._loads:
            load.failed = True
        for scene_id in list(self._scenes):
            self._remove(scene_id)

    def arrived(self, scene_id: str, request: Request, num_resident_blocks: int) -> None:
        """A request with this scene asks for its blocks for the first time.

        Args:
            num_resident_blocks: leading blocks of the request in the GPU's prefix cache.
        """
        scene = self._scenes.get(scene_id)
        if scene is None:
            return
        num_shared = _num_shared_blocks(scene, request)
        if not num_shared:
            self.totals.other += 1
        elif num_resident_blocks >= num_shared:
            self.totals.ready += 1
        elif any(load.scene.scene_id == scene_id for load in self._loads):
            self.totals.late += 1
        else:
            self.totals.missed += 1
        self._wanted.pop(scene_id, None)  # the request loads what is missing itself

    def use(self, request: Request, num_blocks: int) -> int:
        """A request was given its leading blocks on the GPU; how many of them a prefetch had brought for it."""
        num_prefetched = 0
        for block_hash in request.block_hashes[:num_blocks] if self._unused else ():
            key = make_block_hash_with_group_id(block_hash, 0)
            if key in self._unused:
                del self._unused[key]
                num_prefetched += 1
        self.totals.used_blocks += num_prefetched
        return num_prefetched

    def forget(self, tag_of: Callable[[str | None], bytes], tag: bytes) -> int:
        """Forgets the scenes of a deleted salt, and their blocks on the GPU; how many scenes there were."""
        gone = [scene_id for scene_id, scene in self._scenes.items() if tag_of(scene.request.cache_salt) == tag]
        for scene_id in gone:
            scene = self._scenes[scene_id]
            resident = [block for index in range(scene.num_blocks) if (block := self._resident(scene, index))]
            self.pool.evict_blocks({block.block_id for block in resident})
            self._remove(scene_id)
        for load in self._loads:
            load.failed |= tag_of(load.scene.request.cache_salt) == tag  # arrives, and is not published
        return len(gone)

    # -- materialising -------------------------------------------------------------------------

    def expect(self, planner: str, scenes: Sequence[tuple[float, str]]) -> list[Op]:
        """Says anew which scenes come next; returns the first copies.

        What does not fit into the budget together with more valuable scenes is left out.

        Args:
            planner: the API process that says so; its earlier word is void, that of others stands.
            scenes: value and id.
        """
        self._told[planner] = list(scenes)
        told = sorted((item for items in self._told.values() for item in items), key=lambda item: -item[0])
        budget = self.budget_blocks
        expected: dict[str, None] = {}
        for scene_id in dict.fromkeys(scene_id for _, scene_id in told):
            scene = self._scenes.get(scene_id)
            if scene is not None and scene.num_blocks <= budget:
                budget -= scene.num_blocks
                expected[scene_id] = None
        known = set(self._expected)
        for scene_id in known - expected.keys():
            self.queue.release(scene_id, self._scenes[scene_id].hashes)
        for scene_id in expected.keys() - known:
            self._keep(self._scenes[scene_id])
        self._expected = list(expected)
        self._order()
        self._wanted = dict.fromkeys(self._expected, 0)
        return self.advance()

    def _keep(self, scene: Scene) -> None:
        resident = (block for index in reversed(range(scene.num_blocks)) if (block := self._resident(scene, index)))
        self.queue.keep(scene.scene_id, scene.hashes, resident)

    def _order(self) -> None:
        self.queue.order(self._expected[::-1])

    def advance(self) -> list[Op]:
        """Starts further chunks as far as the share in flight allows."""
        operations: list[Op] = []
        while self._wanted:
            scene_id = next(iter(self._wanted))
            started = self._start_chunk(self._scenes[scene_id])
            if started is None:
                del self._wanted[scene_id]
            elif started:
                operations += started
            else:
                break  # no room now; goes on when a copy of any kind ends, a finished request's save too
        return operations

    def _start_chunk(self, scene: Scene) -> list[Op] | None:
        """The next chunk of a scene: its copies, [] if there is no room now, None if all is done."""
        first = self._wanted[scene.scene_id]
        while first < scene.num_blocks and (
            self._resident(scene, first) or self.tiers.is_on_its_way(scene.keys[first])
        ):
            first += 1
        if first == scene.num_blocks:
            return None
        match = self.tiers.match(scene.keys[first : first + self.chunk_blocks])
        if not match.num_blocks:
            return None
        in_flight = sum(len(load.blocks) for load in self._loads)
        # Plain blocks only: what is kept fits beside what is expected (``expect``), so plain blocks
        # run short only where live requests hold them, and then a prefetch waits.
        room = min(int(IN_FLIGHT_SHARE * self.pool.num_gpu_blocks) - in_flight, self.queue.num_plain_blocks)
        num_blocks = min(match.num_blocks, room)
        if num_blocks <= 0:
            return []
        blocks = self.pool.get_new_blocks(num_blocks)
        operations = self.tiers.plan_load(
            scene.keys[first : first + num_blocks], [block.block_id for block in blocks], prefetch=True
        )
        self._loads.append(_Load(scene, first, blocks, {operation.op_id for operation in operations}))
        self._wanted[scene.scene_id] = first + num_blocks
        return operations

    def complete(self, finished_ops: set[int], failed_ops: set[int]) -> list[Op]:
        """Publishes and releases what has arrived; returns the copies that follow."""
        done = []
        for load in self._loads:
            load.failed |= bool(load.op_ids & failed_ops)
            load.op_ids -= finished_ops
            if load.op_ids:
                continue
            done.append(load)
            if load.failed:
                self.totals.failed_blocks += len(load.blocks)
                self._wanted.pop(load.scene.scene_id, None)  # not again and again
            else:
                self._publish(load)
        for load in done:
            self._loads.remove(load)
            self.pool.free_blocks(reversed(load.blocks))
        return self.advance()

    def _publish(self, load: _Load) -> None:
        """Publishes runs of blocks; a block that a live request computed meanwhile is left out."""
        scene = load.scene
        by_index = [None] * load.first + load.blocks  # vLLM looks at the part from `first` on only
        for resident, group in itertools.groupby(
            range(load.first, len(by_index)), lambda index: self._resident(scene, index) is not None
        ):
            indices = list(group)
            if resident:
                continue
            first, end = indices[0], indices[-1] + 1
            self.pool.cache_full_blocks(scene.request, by_index, first, end, self.block_size, 0)
            self._unused.update(dict.fromkeys(scene.hashes[first:end]))
            self.totals.prefetched_blocks += end - first
        if len(self._unused) > self.pool.num_gpu_blocks:
            self.count_wasted()

    # -- looking --------------------------------------------------------------------------------

    def expected_blocks(self) -> dict[str, int]:
        """Size of each expected scene, in blocks."""
        return {scene_id: self._scenes[scene_id].num_blocks for scene_id in self._expected}

    @property
    def budget_blocks(self) -> int:
        """Blocks that expected scenes may have together."""
        return int(KEEP_SHARE * self.pool.num_gpu_blocks)

    @property
    def num_loading_blocks(self) -> int:
        return sum(len(load.blocks) for load in self._loads)

    def state(self, scene_id: str) -> dict[str, Any]:
        """What an application may know about its scene."""
        scene = self._scenes.get(scene_id)
        if scene is None:
            return {"state": SceneState.UNKNOWN, "blocks": 0, "resident_blocks": 0}
        resident = 0
        while resident < scene.num_blocks and self._resident(scene, resident):
            resident += 1
        if resident == scene.num_blocks:
            state = SceneState.READY
        elif any(load.scene is scene for load in self._loads):
            state = SceneState.LOADING
        elif self.tiers.match(scene.keys[resident:]).num_blocks or resident:
            state = SceneState.STORED
        else:
            state = SceneState.ABSENT
        return {"state": state, "blocks": scene.num_blocks, "resident_blocks": resident}

    def status(self) -> dict[str, Any]:
        self.count_wasted()
        return {
            "scenes": len(self._scenes),
            "expected": len(self._expected),
            "kept_blocks": self.queue.num_kept_blocks,
            "loading_blocks": self.num_loading_blocks,
            **asdict(self.totals),
        }

    def check_integrity(self) -> None:
        """Free, plain and kept blocks add up, and every block is in exactly one part."""
        free = self.queue.get_all_free_blocks()
        assert len(free) == self.queue.num_free_blocks == len({block.block_id for block in free})
        assert all(block.ref_cnt == 0 for block in free)

    def count_wasted(self, limit: int | None = None) -> int:
        """Looks which of the unused blocks are gone, all of them or the next ``limit``; how many are."""
        num_gone = 0
        for block_hash in list(itertools.islice(self._unused, limit)):
            del self._unused[block_hash]
            if self.pool.cached_block_hash_to_block.get_one_block(block_hash) is None:
                num_gone += 1
            else:
                self._unused[block_hash] = None
        self.totals.wasted_blocks += num_gone
        return num_gone

    def _resident(self, scene: Scene, index: int) -> KVCacheBlock | None:
        return self.pool.cached_block_hash_to_block.get_one_block(scene.hashes[index])


def _num_shared_blocks(scene: Scene, request: Request) -> int:
    """Leading blocks that a request has in common with the scene it names."""
    num_shared = 0
    for of_scene, of_request in zip(scene.request.block_hashes[: scene.num_blocks], request.block_hashes, strict=False):
        if of_scene != of_request:
            break
        num_shared += 1
    return num_shared
