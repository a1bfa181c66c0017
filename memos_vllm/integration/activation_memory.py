"""The activation memory of one engine: its tiers, the scenes that it knows, and what keeps count of both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from memos_vllm.compat.kv_cache_specs import is_full_attention
from memos_vllm.compat.sleep_mode import keeps_what_connectors_allocate
from memos_vllm.config import MemosConfig
from memos_vllm.data_dir import kv_dir
from memos_vllm.integration.accounting import Accounting
from memos_vllm.integration.block_names import BlockNames
from memos_vllm.integration.held_blocks import HeldBlocks
from memos_vllm.integration.messages import MemosHandshake
from memos_vllm.integration.model_identity import identity_of
from memos_vllm.integration.owned_blocks import OwnedBlocks
from memos_vllm.integration.scene_builds import SceneBuilds
from memos_vllm.integration.scene_table import SceneTable
from memos_vllm.store.disk_index import DiskIndex
from memos_vllm.store.host_pool import SlotTable
from memos_vllm.store.identity import KVIdentity
from memos_vllm.store.manager import TierManager
from memos_vllm.types import BlockKey

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ActivationMemory:
    """Owned by the engine's loop."""

    pool: BlockPool
    block_size: int
    names: BlockNames
    tiers: TierManager
    held: HeldBlocks
    owned: OwnedBlocks
    accounting: Accounting
    scenes: SceneTable | None
    """None without prediction."""
    builds: SceneBuilds | None
    """None without prediction or without building at idle."""

    def register(self, scene_id: str, request: Request, keys: list[BlockKey]) -> None:
        """These blocks are what the scene is from now on."""
        if self.scenes is None:
            return
        self.scenes.register(scene_id, request, keys)
        if self.builds is not None and keys:
            self.builds.show(scene_id, request, len(keys))

    def forget(self, tag: bytes) -> dict[str, int]:
        """Drops all KV that is filed under a tag from all tiers, the GPU too; what a receipt says of it."""
        if self.builds is not None:
            self.builds.forget(tag)
        num_scenes = self.scenes.forget(tag) if self.scenes is not None else 0
        return {**asdict(self.tiers.forget(tag)), "gpu_blocks": self.owned.evict(tag), "scenes": num_scenes}

    def reset(self) -> set[str]:
        """Nothing saved so far is found again; the requests whose KV is of before."""
        before = self.names.start_generation()
        self.tiers.drop_host()
        if self.scenes is not None:
            self.scenes.clear()
        if self.builds is not None:
            self.builds.clear()
        return before

    def status(self) -> dict[str, Any]:
        slots, disk = self.tiers.slots, self.tiers.disk
        return {
            "enabled": True,
            "block_size": self.block_size,
            "in_flight": self.tiers.num_in_flight,
            "held_blocks": len(self.held),
            "host": {"blocks": len(slots), "capacity_blocks": slots.num_slots},
            "disk": {"blocks": len(disk), "bytes": disk.usage_bytes} if disk else {"blocks": 0, "bytes": 0},
            "totals": asdict(self.tiers.totals),
            "prediction": self._prediction_status(),
            "accounting": self.accounting.status(),
        }

    def _prediction_status(self) -> dict[str, Any]:
        if self.scenes is None:
            return {"enabled": False}
        builds = {} if self.builds is None else self.builds.status()
        return {"enabled": True, **self.scenes.status(), **builds}

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
    owned = OwnedBlocks(pool)
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
        HeldBlocks(pool),
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
        disk = DiskIndex(root, identity, kv.disk_bytes, world_size)
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
