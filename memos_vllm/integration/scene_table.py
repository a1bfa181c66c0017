"""Scenes in the engine: which predicted prefixes are on the GPU, and bringing them there.

A *scene* is an ordered token prefix that a coming request will probably have, with its salt and
adapter. The table learns scenes from finished requests (``known_scenes``), and is told by the API
processes what each of them is worth. From that follows what a block is worth, and which blocks to bring
in place of which (``core.residency``, the policy that ``benchmarks.trace`` measures). The algorithm
(MemOS, arXiv 2507.03724, next-scene prediction; vLLM RFC 57103 asks for the same primitive):

    value      of each block, when the API processes say what they expect
    plan       the most valuable blocks that a tier holds and the GPU does not
    reserve    free blocks, of what nobody expects first; never more than the budget
    load       asynchronously, in chunks, behind every load that a request waits for
    publish    each block's hash, once every rank has its copy
    keep       blocks that are worth something leave the free queue last (``free_queue``)

No forward pass, no request, no pin: references are held only while the copy runs, and a live
request that needs the blocks takes them.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from memos_vllm.core.residency import ResidencyPolicy
from memos_vllm.core.told_values import BUSY_VALUE, UNIT, ToldValues
from memos_vllm.integration.free_queue import KeepingFreeQueue
from memos_vllm.integration.known_scenes import KnownScenes, Prefetch, Scene, SceneState
from memos_vllm.integration.owned_blocks import OwnedBlocks
from memos_vllm.integration.prefetch_room import PrefetchRoom
from memos_vllm.integration.scene_loads import Places, SceneLoads
from memos_vllm.integration.scene_totals import SceneTotals
from memos_vllm.integration.unused_blocks import UnusedBlocks
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

START_PARAM = "memos_start"
"""Key by which it names the scene of the user's next session as well; it counts as the one that is closer."""

KEEP_SHARE = 0.9
"""Share of the pool that blocks of predicted scenes may take; the rest stays plain for whoever comes unexpected."""

TRACKED_BLOCKS = 1024
"""Blocks of scenes that the policy comes to know at once, or those of one scene; 2 us each on the same core."""


@dataclass(slots=True)
class SceneTable:
    """Owned by the engine's loop.

    Args:
        pool: vLLM's block pool; its free queue is replaced.
        tiers: where blocks are off the GPU.
        chunk_blocks: blocks per copy.
        owned: told of what is published.
    """

    pool: BlockPool
    tiers: TierManager
    block_size: int
    chunk_blocks: int
    owned: OwnedBlocks
    totals: SceneTotals = field(default_factory=SceneTotals)
    queue: KeepingFreeQueue = field(init=False)
    known: KnownScenes = field(init=False)
    _values: ToldValues = field(default_factory=ToldValues)
    _policy: ResidencyPolicy = field(init=False)
    _places: dict[str, dict[bytes, int]] = field(default_factory=dict)
    """Of the scenes that the policy tracks, i.e. that are told and known: block hash to position."""
    _cached: Any = field(init=False)
    """The pool's prefix cache that the policy knows; a reset puts another one in its place."""
    _failed: set[bytes] = field(default_factory=set)
    """Blocks whose load failed; not again before the next word of a planner."""
    loads: SceneLoads = field(init=False)
    room: PrefetchRoom = field(init=False)
    _unused: UnusedBlocks = field(init=False)
    _planned: list[Op] = field(default_factory=list)
    """Copies that are not handed over yet."""
    _num_arrivals: int = 0

    def __post_init__(self) -> None:
        self._policy = ResidencyPolicy(self._values, watch_worth=True, in_use_from=BUSY_VALUE * UNIT)
        self.queue = KeepingFreeQueue(self.pool.free_block_queue, self._policy)
        self.pool.free_block_queue = self.queue
        self.known = KnownScenes(self.pool.enable_kv_cache_events)
        self._cached = self.pool.cached_block_hash_to_block
        self.loads = SceneLoads(self.pool, self.tiers, self.block_size)
        self.room = PrefetchRoom(self.pool, self.tiers, self.chunk_blocks)
        self._unused = UnusedBlocks(self.pool)

    # -- learning ------------------------------------------------------------------------------

    def register(self, scene_id: str, request: Request, keys: Sequence[BlockKey], *, is_whole: bool = True) -> bool:
        """A request ended; its full blocks are what the scene is from now on. Whether that is so.

        Args:
            is_whole: it had its prompt computed. Of a scene that is known, the beginning alone says nothing new.
        """
        known = self.known.get(scene_id)
        if not keys or (not is_whole and known is not None and known.keys[: len(keys)] == list(keys)):
            return False
        self.known.show(scene_id, request, keys)
        self._track(scene_id)
        while (overdue := self.known.overdue()) is not None:
            self._remove(overdue)
        self._refile()
        return True

    def _remove(self, scene_id: str) -> None:
        self.known.remove(scene_id)
        self._track(scene_id)

    def clear(self) -> None:
        """Forgets all scenes; what is under way is not published."""
        self.loads.fail()
        for scene in list(self.known):
            self._remove(scene.scene_id)
        self._refile()

    def closest(self, scene_ids: Iterable[str], request: Request) -> str | None:
        """Of the scenes that a request names, the known one that it shares most blocks with."""
        known = [scene for scene_id in scene_ids if (scene := self.known.get(scene_id)) is not None]
        best = max(known, key=lambda scene: scene.num_shared_blocks(request), default=None)
        return None if best is None else best.scene_id

    def arrived(self, scene_id: str, request: Request, num_resident_blocks: int) -> None:
        """A request with this scene asks for its blocks for the first time.

        Args:
            num_resident_blocks: leading blocks of the request in the GPU's prefix cache.
        """
        scene = self.known.get(scene_id)
        if scene is None:
            return
        num_shared = scene.num_shared_blocks(request)
        scene.arrived(num_shared)
        self._num_arrivals += 1
        self._policy.used(scene_id, num_shared, self._num_arrivals)
        if not num_shared:
            self.totals.other += 1
        elif num_resident_blocks >= num_shared:
            self.totals.ready += 1
        elif self.loads.has(scene_id):
            self.totals.late += 1
        else:
            self.totals.missed += 1

    def use(self, request: Request, num_blocks: int) -> int:
        """A request was given its leading blocks on the GPU; how many of them a prefetch had brought for it."""
        num_prefetched = self._unused.use(request, num_blocks)
        self.totals.used_blocks += num_prefetched
        return num_prefetched

    def forget(self, tag: bytes) -> int:
        """Forgets the scenes of a deleted salt or adapter; how many there were. ``owned`` knows their blocks."""
        gone = self.known.with_tag(tag)
        for scene in gone:
            self._remove(scene.scene_id)
        self._refile()
        self.loads.fail(tag)
        return len(gone)

    # -- value ---------------------------------------------------------------------------------

    def expect(self, planner: str, scenes: Sequence[tuple[float, str]], busy: Sequence[str] = ()) -> list[Op]:
        """Says anew which scenes come next; returns the first copies.

        Args:
            planner: the API process that says so; its earlier word is void, that of others stands.
            scenes: value and id.
            busy: scenes that requests are using: kept above all, and left to those requests to load.
        """
        self._values.tell(planner, scenes, busy)
        for scene_id in [each for each in self._places if not self._values.value(each)]:
            self._track(scene_id)
        self._policy.update()
        self._refile()
        self._failed.clear()
        return self.advance()

    def _track(self, scene_id: str) -> None:
        """Has the policy know of a scene what is known now, if it is worth anything."""
        scene = self.known.get(scene_id)
        if scene is not None and self._values.value(scene_id):
            self._policy.track(scene_id, scene.hashes)
            self._places[scene_id] = {each: place for place, each in enumerate(scene.hashes)}
        elif self._places.pop(scene_id, None) is not None:
            self._policy.forget(scene_id)

    def _follow(self) -> None:
        """Has the policy know of scenes that are told and not tracked yet, some at a time."""
        num_blocks = 0
        for scene_id in self._values:  # the most valuable first
            if scene_id not in self._places and scene_id in self.known:
                self._track(scene_id)
                num_blocks += len(self._places[scene_id])
                if num_blocks >= TRACKED_BLOCKS:
                    break
        if num_blocks:
            self._refile()

    def _refile(self) -> None:
        """Has the free queue follow what became worth something or nothing."""
        for hashes in self._policy.take_turned():
            for block_hash in reversed(hashes):  # the last block is then the first to leave
                if self._policy.value(block_hash) > 0.0:
                    self.queue.worth_something(block_hash, self._resident(block_hash))
                else:
                    self.queue.worth_nothing(block_hash)

    # -- materialising -------------------------------------------------------------------------

    def advance(self) -> list[Op]:
        """Starts what is worth most of what is missing, as far as the share in flight allows."""
        if self._cached is not self.pool.cached_block_hash_to_block:
            self._cached = self.pool.cached_block_hash_to_block
            self.queue.lose_track()
        self._follow()
        self._give_up_excess()
        busy = self._values.busy()
        places = Places(  # the most valuable first, as they are looked for
            (scene, self._places[scene_id])
            for scene_id in self._values
            if scene_id in self._places and scene_id not in busy and (scene := self.known.get(scene_id)) is not None
        )

        def is_at_hand(block_hash: Any) -> bool:
            place = places.find(block_hash)
            if place is None or block_hash in self._failed:
                return False
            if (block := self._resident(block_hash)) is not None:
                return block.block_hash == block_hash  # else it has several, and is kept by its first
            scene, index = place
            return not self.tiers.is_on_its_way(scene.keys[index]) and self.tiers.holds(scene.keys[index])

        while True:
            # Plain blocks run short only where live requests hold them; then a prefetch takes the place of
            # a block that is worth less, or waits.
            plan = self._policy.plan(
                self.room.num_startable(self.num_loading_blocks),
                max(0, min(self._num_addable, self.queue.num_plain_blocks)),
                is_at_hand,
                self.queue.plain_worths(),
            )
            self.room.started(len(plan.fetch))
            self.queue.give_up(plan.evict)
            missing = [block_hash for block_hash in plan.fetch if not self._keep_resident(block_hash)]
            runs = list(places.runs(missing, self.chunk_blocks))
            with self.tiers.keeping(key for scene, first, end in runs for key in scene.keys[first:end]):
                for scene, first, end in runs:
                    self._planned += self.loads.start(scene, first, end)
            if len(missing) == len(plan.fetch):
                return self.take_planned()

    def take_planned(self) -> list[Op]:
        planned, self._planned = self._planned, []
        return planned

    def _keep_resident(self, block_hash: Any) -> bool:
        """Whether a block that is to come is on the GPU still, among those that leave next; then it stays."""
        block = self._resident(block_hash)
        if block is not None:
            self.queue.worth_something(block_hash, block)
        return block is not None

    @property
    def _num_addable(self) -> int:
        """Blocks by which those that are worth something may become more."""
        return self.budget_blocks - self._policy.num_resident

    def _give_up_excess(self) -> None:
        excess = self._policy.coldest(max(0, -self._num_addable))
        self._policy.absent(excess)
        self.queue.give_up(excess)

    def complete(self, finished_ops: set[int], failed_ops: set[int]) -> list[Op]:
        """Publishes and releases what has arrived; returns the copies that follow."""
        for load in self.loads.ended(finished_ops, failed_ops):
            if load.failed:
                self.totals.failed_blocks += len(load.blocks)
                self._failed.update(load.hashes)  # not again and again
                # What a live request brought meanwhile, and gave back, is on the GPU all the same.
                self._policy.absent(each for each in load.hashes if not self.queue.keeps(each))
            else:
                published = self.loads.publish(load)
                self._unused.add(published)
                self.owned.note((block.block_id for block in load.blocks), load.tag)
                self.totals.prefetched_blocks += len(published)
            self.loads.release(load)
        if len(self._unused) > self.pool.num_gpu_blocks:
            self.count_wasted()
        return self.advance()

    def retire(self) -> SceneLoads:
        """Expects nothing any more, whatever state this is in; copies under way, whose blocks must be released."""
        self.queue.keep_nothing()
        self.loads.fail()
        return self.loads

    # -- what only a forward pass can bring -----------------------------------------------------

    @property
    def expected(self) -> list[Scene]:
        """Scenes that are expected and that no request is using, most valuable first."""
        busy = self._values.busy()
        known = (self.known.get(each) for each in self._values if each in self._places and each not in busy)
        return [scene for scene in known if scene is not None]

    def is_resident(self, scene: Scene, index: int) -> bool:
        return self._resident(scene.hashes[index]) is not None

    def is_absent(self, scene: Scene, index: int) -> bool:
        """Whether a block is neither on the GPU, nor on its way there, nor in a tier."""
        key = scene.keys[index]
        return not (self.is_resident(scene, index) or self.tiers.is_on_its_way(key) or self.tiers.holds(key))

    def has_room(self, scene: Scene, first: int, end: int) -> bool:
        """Whether these blocks may be computed: nobody expects the blocks that they take, or they are worth more."""
        if end - first > self.queue.num_plain_blocks:
            return False
        excess = end - first - max(0, self._num_addable)
        below = self._policy.value(scene.hashes[end - 1]) / self._policy.swap_gain
        return excess <= 0 or len(self._policy.coldest(excess, below)) == excess

    # -- looking --------------------------------------------------------------------------------

    def expected_blocks(self) -> dict[str, int]:
        """Size of each expected scene, in blocks."""
        return {scene_id: len(places) for scene_id, places in self._places.items()}

    @property
    def budget_blocks(self) -> int:
        """Blocks that expected scenes may have together."""
        return int(KEEP_SHARE * self.pool.num_gpu_blocks)

    @property
    def num_loading_blocks(self) -> int:
        return self.loads.num_blocks

    def state(self, scene_id: str) -> dict[str, Any]:
        """What an application may know about its scene."""
        scene = self.known.get(scene_id)
        if scene is None:
            none = {"blocks": 0, "resident_blocks": 0, "adapter": None}
            return {"state": SceneState.UNKNOWN, "prefetch": Prefetch.NONE, **none}
        resident = 0
        while resident < scene.num_blocks and self._resident(scene.hashes[resident]):
            resident += 1
        if resident == scene.num_blocks:
            state = SceneState.READY
        elif self.loads.has(scene_id):
            state = SceneState.LOADING
        elif self.tiers.match(scene.keys[resident:]).num_blocks or resident:
            state = SceneState.STORED
        else:
            state = SceneState.ABSENT
        lora = scene.request.lora_request
        return {
            "state": state,
            "prefetch": self._prefetch(scene, state),
            "blocks": scene.num_blocks,
            "resident_blocks": resident,
            "adapter": None if lora is None else lora.lora_name,
        }

    def _prefetch(self, scene: Scene, state: SceneState) -> Prefetch:
        if scene.scene_id not in self._places:
            return Prefetch.NONE
        if state is SceneState.READY:
            return Prefetch.COMPLETED
        if state is SceneState.LOADING:
            return Prefetch.ACCEPTED
        return Prefetch.DEFERRED if self._failed.isdisjoint(scene.hashes) else Prefetch.FAILED

    def status(self) -> dict[str, Any]:
        self.count_wasted()
        return {
            "scenes": len(self.known),
            "expected": len(self._places),
            "kept_blocks": self.queue.num_kept_blocks,
            "loading_blocks": self.num_loading_blocks,
            **asdict(self.totals),
        }

    def check_integrity(self) -> None:
        """Free, plain and kept blocks add up, and every block is in exactly one part."""
        free = self.queue.get_all_free_blocks()
        assert len(free) == self.queue.num_free_blocks == len({block.block_id for block in free})
        assert all(block.ref_cnt == 0 for block in free)
        self.queue.check_integrity()
        self._policy.check_integrity()

    def count_wasted(self, limit: int | None = None) -> int:
        """Looks which of the unused blocks are gone, all of them or the next ``limit``; how many are."""
        num_gone = self._unused.take_gone(limit)
        self.totals.wasted_blocks += num_gone
        return num_gone

    def _resident(self, block_hash: Hashable) -> KVCacheBlock | None:
        return self.pool.cached_block_hash_to_block.get_one_block(block_hash)
