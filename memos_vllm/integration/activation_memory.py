"""The activation memory of one engine: its tiers, the scenes that it knows, and what keeps count of both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from memos_vllm.compat.kv_cache_specs import is_full_attention
from memos_vllm.compat.sleep_mode import keeps_what_connectors_allocate
from memos_vllm.config import MemosConfig
from memos_vllm.data_dir import kv_dir
from memos_vllm.integration.accounting import Accounting
from memos_vllm.integration.arriving_loads import ArrivingLoads
from memos_vllm.integration.block_names import BlockNames
from memos_vllm.integration.engine_metrics import MemosStats
from memos_vllm.integration.held_blocks import HeldBlocks
from memos_vllm.integration.messages import MemosHandshake
from memos_vllm.integration.model_identity import identity_of
from memos_vllm.integration.owned_blocks import OwnedBlocks
from memos_vllm.integration.scene_builds import SceneBuilds
from memos_vllm.integration.scene_loads import SceneLoads
from memos_vllm.integration.scene_table import SceneTable
from memos_vllm.store.disk_index import DiskIndex
from memos_vllm.store.host_pool import SlotTable
from memos_vllm.store.identity import KVIdentity
from memos_vllm.store.manager import TierManager
from memos_vllm.store.ops import Op
from memos_vllm.types import BlockKey

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

SWEEP_BLOCKS = 32
"""Prefetched blocks that a step looks at, to see whether they have left the GPU; some 10 microseconds."""


@dataclass(slots=True)
class ActivationMemory:
    """Owned by the engine's loop."""

    pool: BlockPool
    block_size: int
    names: BlockNames
    tiers: TierManager
    held: HeldBlocks
    arriving: ArrivingLoads
    layer_groups: int
    """In how many requests' KV comes from the host, on every rank; 0: whole."""
    owned: OwnedBlocks
    accounting: Accounting
    scenes: SceneTable | None
    """None without prediction."""
    builds: SceneBuilds | None
    """None without prediction or without building at idle."""
    fault: str | None = None
    """Why prediction was given up."""
    _outdated_cache: Any = None
    """The GPU's prefix cache that may hold KV of other weights; a reset puts another one in its place."""
    _last_loads: SceneLoads | None = None
    """Prefetches that were under way then."""
    _last_planned: list[Op] = field(default_factory=list)

    def guarded(self, work: Callable[[SceneTable], _T], otherwise: _T) -> _T:
        """What ``work`` returns; ``otherwise`` without prediction, and from the first error on.

        Prediction only makes requests cheap. An error in it must not end the engine, so it ends prediction until
        the server restarts: what it kept is plain again, and what it was loading is never published.
        """
        return otherwise if self.scenes is None else self._attempt(partial(work, self.scenes), otherwise)

    def building(self, work: Callable[[SceneBuilds], _T], otherwise: _T) -> _T:
        """The same for what is computed at idle; ``otherwise`` also where that is switched off."""
        return otherwise if self.builds is None else self._attempt(partial(work, self.builds), otherwise)

    def _attempt(self, work: Callable[[], _T], otherwise: _T) -> _T:
        assert self.scenes is not None
        try:
            return work()
        except Exception as error:
            logger.exception("an error in next-scene prediction; it is switched off until the server restarts")
            self.fault = f"{type(error).__name__}: {error}"
            self._last_loads, self._last_planned = self.scenes.retire(), self.scenes.take_planned()
            self.scenes = self.builds = None
            self.accounting.prediction_failed()
            return otherwise

    def complete(self, finished_ops: set[int], failed_ops: set[int]) -> list[Op]:
        """Takes the ends of copies; the copies that follow."""
        following = self.guarded(lambda scenes: scenes.complete(finished_ops, failed_ops), [])
        if self._last_loads is not None:
            for load in self._last_loads.ended(finished_ops, failed_ops):
                self._last_loads.release(load)
        return following + self._take_last_planned()

    def expect(self, planner: str, scenes: Sequence[tuple[float, str]], busy: Sequence[str]) -> list[Op]:
        """See ``SceneTable.expect``."""
        return self.guarded(lambda table: table.expect(planner, scenes, busy), []) + self._take_last_planned()

    def _take_last_planned(self) -> list[Op]:
        planned, self._last_planned = self._last_planned, []
        return planned

    @property
    def num_loading_blocks(self) -> int:
        """GPU blocks that prefetches hold."""
        loads = self.scenes.loads if self.scenes is not None else self._last_loads
        return 0 if loads is None else loads.num_blocks

    def arrived(self, named: Iterable[str], request: Request, num_resident_blocks: int) -> None:
        """A request with one of these scenes asks for its blocks for the first time."""

        def work(scenes: SceneTable) -> str | None:
            if (scene_id := scenes.closest(named, request)) is not None:
                scenes.arrived(scene_id, request, num_resident_blocks)
            return scene_id

        if (scene_id := self.guarded(work, None)) is not None:
            self.building(lambda builds: builds.used(scene_id), None)

    def admitted(self, request: Request, num_asked: int, num_resident: int, loads: Sequence[Op]) -> None:
        """A request was given its blocks; see ``Accounting.admitted``."""
        if self.accounting.is_new(request):
            num_prefetched = self.guarded(lambda scenes: scenes.use(request, num_resident), 0)
            self.accounting.admitted(request, num_asked, num_resident, num_prefetched, loads)

    def register(self, scene_id: str, request: Request, keys: list[BlockKey], *, is_whole: bool = True) -> None:
        """These blocks are what the scene is from now on; see ``SceneTable.register``."""
        if self.guarded(lambda scenes: scenes.register(scene_id, request, keys, is_whole=is_whole), False):
            self.building(lambda builds: builds.show(scene_id, request, len(keys)), None)

    def forget(self, tag: bytes) -> Future[dict[str, int]]:
        """Drops all KV that is filed under a tag from all tiers, the GPU too; nobody finds it any more.

        Returns:
            What a receipt says of it, once the files are gone for good.
        """
        self.building(lambda builds: builds.forget(tag), None)
        num_scenes = self.guarded(lambda scenes: scenes.forget(tag), 0)
        dropped = self.tiers.forget(tag)
        told = {"host_blocks": dropped.host_blocks, "disk_blocks": dropped.disk_blocks}
        told |= {"gpu_blocks": self.owned.evict(tag), "scenes": num_scenes}
        receipt: Future[dict[str, int]] = Future()
        if dropped.removal is None:
            receipt.set_result(told)
        else:
            dropped.removal.add_done_callback(lambda _: receipt.set_result(told))
        return receipt

    def reset(self) -> set[str]:
        """Nothing saved so far is found again; the requests whose KV is of before."""
        before = self.names.start_generation()
        self.tiers.drop_host()
        self.guarded(lambda scenes: scenes.clear(), None)
        self.building(lambda builds: builds.clear(), None)
        return before

    def weights_changed(self) -> set[str]:
        """``reset``, and what is in the GPU's prefix cache now is left to vLLM, which may go on using it."""
        before = self.reset()
        if before or any(block.block_hash is not None for block in self.pool.blocks):
            self._outdated_cache = self.pool.cached_block_hash_to_block
        return before

    @property
    def gpu_is_outdated(self) -> bool:
        """Whether a request may find KV of other weights on the GPU. What it has is then not saved: it would be found
        when the GPU's prefix cache was reset, and after that nothing may be of those weights."""
        return self._outdated_cache is self.pool.cached_block_hash_to_block

    def take_stats(self) -> MemosStats | None:
        """What is new since the last call; at the end of every step."""
        if self.guarded(lambda scenes: scenes.count_wasted(SWEEP_BLOCKS), 0):
            self.accounting.changed()
        return self.accounting.take()

    def status(self) -> dict[str, Any]:
        slots, disk = self.tiers.slots, self.tiers.disk
        return {
            "enabled": True,
            "block_size": self.block_size,
            "in_flight": self.tiers.num_in_flight,
            "held_blocks": len(self.held),
            "layer_groups": self.layer_groups,
            "awaits_prefix_cache_reset": self.gpu_is_outdated,
            "host": {"blocks": len(slots), "capacity_blocks": slots.num_slots},
            "disk": {"blocks": len(disk), "bytes": disk.usage_bytes} if disk else {"blocks": 0, "bytes": 0},
            "totals": asdict(self.tiers.totals),
            "prediction": self._prediction_status(),
            "accounting": self.accounting.status(),
        }

    def _prediction_status(self) -> dict[str, Any]:
        if self.scenes is None:
            return {"enabled": False, "fault": self.fault}
        builds = {} if self.builds is None else self.builds.status()
        return {"enabled": True, "fault": None, **self.scenes.status(), **builds}

    def close(self) -> None:
        if self.tiers.disk is not None:
            self.tiers.disk.close()


def open_memory(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    config: MemosConfig,
    pool: BlockPool,
    handshakes: Sequence[MemosHandshake],
) -> ActivationMemory | None:
    """Opens host and disk tier once all ranks have said what a block is; None where blocks cannot be kept."""
    if reason := _why_off(vllm_config, kv_cache_config, handshakes):
        logger.warning("activation memory is off: %s", reason)
        return None
    block_size: int = vllm_config.cache_config.block_size
    identity = identity_of(vllm_config, handshakes[0].layout)
    tiers = _open_tiers(vllm_config, config, identity, handshakes)
    held, owned = HeldBlocks(pool), OwnedBlocks(pool)
    scenes = SceneTable(pool, tiers, block_size, tiers.chunk_blocks, owned) if config.prediction.enabled else None
    builds = None
    if scenes is not None and config.prediction.build.enabled:
        scheduler = vllm_config.scheduler_config
        builds = SceneBuilds(
            scenes,
            block_size,
            max_step_tokens=min(
                scheduler.max_num_batched_tokens,
                scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens,
            ),
            max_scene_tokens=vllm_config.model_config.max_model_len,
        )
    return ActivationMemory(
        pool,
        block_size,
        BlockNames(identity, config.kv.save),
        tiers,
        held,
        ArrivingLoads(held),
        min(handshake.layer_groups for handshake in handshakes),
        owned,
        Accounting(tiers, scenes),
        scenes,
        builds,
    )


def _why_off(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, handshakes: Sequence[MemosHandshake]
) -> str | None:
    """Why blocks of this model cannot be kept by their hash; None if they can."""
    groups = kv_cache_config.kv_cache_groups
    if not handshakes:
        return "no worker said what a block is (is another KV connector in front of ours?)"
    if not vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching is off"
    if len(groups) != 1 or not is_full_attention(groups[0].kv_cache_spec):
        return "the model has layers without full attention, whose blocks do not hold a whole prefix"
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        return "decode context parallelism spreads a block over ranks"
    if vllm_config.model_config.enable_sleep_mode and not keeps_what_connectors_allocate():
        return "in sleep mode this vLLM would lose what copies KV; start without --enable-sleep-mode, or take vLLM 0.32"
    return None


def _open_tiers(
    vllm_config: VllmConfig, config: MemosConfig, identity: KVIdentity, handshakes: Sequence[MemosHandshake]
) -> TierManager:
    kv = config.kv
    world_size = len(handshakes)
    block_bytes = sum(handshake.block_bytes for handshake in handshakes)
    largest = max(handshake.block_bytes for handshake in handshakes)
    disk = None
    if kv.disk_bytes:
        # Not data_parallel_rank: independent engines of a dense model all have rank 0.
        root = kv_dir(config.data_dir, vllm_config.parallel_config.data_parallel_index)
        disk = DiskIndex(root, identity, kv.disk_bytes, world_size, kv.disk_reserve_bytes)
    slots = SlotTable(min(kv.host_bytes // (each.block_bytes * world_size) for each in handshakes))
    if not slots.num_slots:
        logger.warning("activation memory saves nothing: kv.host_bytes is less than one block (%d bytes)", block_bytes)
    logger.info(
        "activation memory: %d bytes a block on %d rank(s), %d host slots, %s on disk, identity %s",
        block_bytes, world_size, slots.num_slots, "nothing" if disk is None else f"{len(disk)} blocks",
        identity.digest().hex()[:16],
    )  # fmt: skip
    chunk_blocks = max(1, min(kv.chunk_bytes // largest, slots.num_slots))
    return TierManager(slots, disk, chunk_blocks, block_bytes, world_size)
