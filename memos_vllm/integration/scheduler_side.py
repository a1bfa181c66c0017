"""Scheduler side of the connector: decides what is loaded and saved, from the engine's loop only.

match       a request asks how much of its prompt is off the GPU     (before allocation)
plan_load   its blocks are allocated: copies are planned             (same step)
plan_save   a request finished: new prefix blocks are planned        (blocks held meanwhile)
take_metadata / complete     to the workers and back, every step
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from memos_vllm.compat.kv_cache_specs import is_full_attention
from memos_vllm.config import MemosConfig
from memos_vllm.data_dir import kv_dir
from memos_vllm.integration import engine_channel, salts
from memos_vllm.integration.accounting import Accounting
from memos_vllm.integration.engine_metrics import MemosStats
from memos_vllm.integration.messages import MemosHandshake, MemosMetadata, MemosWorkerMeta
from memos_vllm.integration.model_identity import adapter_digest, identity_of
from memos_vllm.integration.scene_builds import SceneBuilds
from memos_vllm.integration.scene_table import SCENE_PARAM, START_PARAM, SceneTable
from memos_vllm.store.disk_index import DiskIndex
from memos_vllm.store.host_pool import SlotTable
from memos_vllm.store.manager import Pending, TierManager
from memos_vllm.store.ops import Op
from memos_vllm.types import BlockKey

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

PREFETCH_PATIENCE_S = 0.05
"""How long a request waits for a prefetch of its own blocks before it loads them itself.

A prefetch goes behind every load that a request waits for, so under steady load it may not end.
"""


class SchedulerSide:
    """State: the tier manager, the operations of the coming step, the GPU blocks held for saves."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: MemosConfig) -> None:
        self._vllm_config = vllm_config
        self._config = config
        self._block_size: int = vllm_config.cache_config.block_size
        self._groups = kv_cache_config.kv_cache_groups
        self._pool: BlockPool | None = None
        self._tiers: TierManager | None = None
        self._scenes: SceneTable | None = None
        self._builds: SceneBuilds | None = None
        self._accounting: Accounting | None = None
        self._arrived: set[str] = set()
        self._operations: list[Op] = []
        self._loads: dict[str, tuple[int, ...]] = {}
        self._matched: dict[str, tuple[int | None, list[BlockKey]]] = {}
        self._loading: dict[str, set[int]] = {}
        self._keys: dict[str, list[BlockKey]] = {}
        self._adapters: dict[tuple[int, str], bytes | None] = {}
        self._adapter_of: dict[str, int] = {}  # of scheduled requests
        self._generation = b""
        self._prefetch_waits: dict[str, float] = {}
        self._failed: set[str] = set()
        self._stale: set[str] = set()
        self._held: dict[int, int] = {}
        engine_channel.serve(self.handle)

    def bind_block_pool(self, pool: BlockPool) -> None:
        self._pool = pool

    def open_tiers(self, handshakes: list[MemosHandshake]) -> None:
        """Opens host and disk tier once all ranks have said what a block is."""
        if reason := self._why_off(handshakes):
            logger.warning("activation memory is off: %s", reason)
            return
        kv = self._config.kv
        world_size = len(handshakes)
        block_bytes = sum(handshake.block_bytes for handshake in handshakes)
        largest = max(handshake.block_bytes for handshake in handshakes)
        identity = identity_of(self._vllm_config, handshakes[0].layout)
        disk = None
        if kv.disk_bytes:
            # Not data_parallel_rank: independent engines of a dense model all have rank 0.
            root = kv_dir(self._config.data_dir, self._vllm_config.parallel_config.data_parallel_index)
            disk = DiskIndex(root, identity, kv.disk_bytes, world_size)
        slots = SlotTable(min(kv.host_bytes // (h.block_bytes * world_size) for h in handshakes))
        self._identity = identity
        if not slots.num_slots:
            logger.warning(
                "activation memory saves nothing: kv.host_bytes is less than one block (%d bytes)", block_bytes
            )
        chunk_blocks = max(1, min(kv.chunk_bytes // largest, slots.num_slots))
        self._tiers = TierManager(slots, disk, chunk_blocks, block_bytes, world_size)
        if self._config.prediction.enabled:
            assert self._pool is not None
            self._scenes = SceneTable(self._pool, self._tiers, self._block_size, chunk_blocks)
            if self._config.prediction.build.enabled:
                scheduler = self._vllm_config.scheduler_config
                self._builds = SceneBuilds(
                    self._scenes,
                    self._block_size,
                    max_step_tokens=min(
                        scheduler.max_num_batched_tokens,
                        scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens,
                    ),
                    max_scene_tokens=self._vllm_config.model_config.max_model_len,
                )
        self._accounting = Accounting(self._tiers, self._scenes)
        logger.info(
            "activation memory: %d bytes a block on %d rank(s), %d host slots, %s on disk, identity %s",
            block_bytes, world_size, slots.num_slots, "nothing" if disk is None else f"{len(disk)} blocks",
            identity.digest().hex()[:16],
        )  # fmt: skip

    def _why_off(self, handshakes: list[MemosHandshake]) -> str | None:
        """Why blocks of this model cannot be kept by their hash; None if they can."""
        if not handshakes:
            return "no worker said what a block is (is another KV connector in front of ours?)"
        if not self._vllm_config.cache_config.enable_prefix_caching:
            return "prefix caching is off"
        if len(self._groups) != 1 or not is_full_attention(self._groups[0].kv_cache_spec):
            return "the model has layers without full attention, whose blocks do not hold a whole prefix"
        if self._vllm_config.parallel_config.decode_context_parallel_size > 1:
            return "decode context parallelism spreads a block over ranks"
        return None

    # -- requests -------------------------------------------------------------------------------

    def added(self, request: Request) -> None:
        """A request came into the engine."""
        if self._builds is not None:
            self._builds.added(request)

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond ``num_computed_tokens`` that can be loaded, and whether asynchronously.

        None: another request loads the same blocks right now, or this one builds a scene and is not alone;
        ask again in the next step. The last token of a prompt is always computed, since its logits are needed.
        """
        self._matched.pop(request.request_id, None)
        if request.lora_request is not None:
            self._adapter_of[request.request_id] = request.lora_request.lora_int_id
        if self._tiers is None or request.request_id in self._failed:
            return 0, False
        if self._builds is not None and self._builds.must_wait(request):
            return None, False
        first = num_computed_tokens // self._block_size
        last = (request.num_tokens - 1) // self._block_size
        self._note_arrival(request, first)
        keys = self._keys_of(request)[first:last]
        match = self._tiers.match(keys)
        if match.pending is Pending.LOAD or (match.pending is Pending.PREFETCH and self._waits(request)):
            return None, False
        num_tokens = match.num_blocks * self._block_size
        self._matched[request.request_id] = (first, [])
        if num_tokens < self._config.kv.min_load_tokens:
            num_tokens = 0
        if self._builds is not None:
            self._builds.scheduled(request, first + num_tokens // self._block_size)
        if not num_tokens:
            return 0, False
        self._matched[request.request_id] = (first, keys[: match.num_blocks])
        return num_tokens, True

    def _note_arrival(self, request: Request, num_resident_blocks: int) -> None:
        """Tells the scene table, once per request, how much of its scene was on the GPU."""
        if self._scenes is None or request.request_id in self._arrived or _scene_of(request) is None:
            return
        self._arrived.add(request.request_id)
        named = [scene_id for param in (SCENE_PARAM, START_PARAM) if (scene_id := _scene_of(request, param))]
        if (scene_id := self._scenes.closest(named, request)) is not None:
            self._scenes.arrived(scene_id, request, num_resident_blocks)
            if self._builds is not None:
                self._builds.used(scene_id)

    def _waits(self, request: Request) -> bool:
        """Whether a request still waits for a prefetch of its first blocks, which others may overtake."""
        now = time.monotonic()
        return now - self._prefetch_waits.setdefault(request.request_id, now) < PREFETCH_PATIENCE_S

    def plan_load(self, request: Request, block_ids: list[int], num_external_tokens: int) -> None:
        first, keys = self._matched.pop(request.request_id, (None, []))
        if first is None or self._tiers is None or self._accounting is None:
            return  # goes on after its load
        operations: list[Op] = []
        num_blocks = num_external_tokens // self._block_size
        assert num_blocks <= len(keys)
        if num_blocks:
            operations = self._tiers.plan_load(keys[:num_blocks], block_ids[first : first + num_blocks])
        if self._builds is None or not self._builds.is_build(request):  # nobody waits for a build's first token
            self._accounting.admitted(request, (request.num_tokens - 1) // self._block_size, first, operations)
        if not operations:
            return
        self._operations += operations
        self._loads[request.request_id] = tuple(operation.op_id for operation in operations)
        self._loading[request.request_id] = {operation.op_id for operation in operations}

    def plan_save(self, request: Request, block_ids: list[int]) -> None:
        """Plans the save of a finished request's full blocks that no tier holds yet."""
        if self._accounting is not None:
            self._accounting.finished(request)
        self._matched.pop(request.request_id, None)
        self._adapter_of.pop(request.request_id, None)
        keys = self._keys_of(request) if self._tiers is not None else []
        self._keys.pop(request.request_id, None)
        self._arrived.discard(request.request_id)
        self._failed.discard(request.request_id)
        self._prefetch_waits.pop(request.request_id, None)
        num_computed = min(request.num_computed_tokens, request.num_tokens - 1)  # the last was sampled, not computed
        if self._builds is not None:
            self._operations += self._builds.finished(request, num_computed)
        stale = request.request_id in self._stale
        self._stale.discard(request.request_id)
        tag = self._tag(request)
        if self._tiers is None or self._pool is None or tag is None:
            return
        if request.request_id in self._loading:
            return  # aborted while its blocks were being loaded: they hold nothing yet
        if self._tiers.is_forgotten(tag):
            # Deleted while it ran: what it published is out of reach under the new salt, and goes too.
            self._pool.evict_blocks({block for block in block_ids if not self._pool.blocks[block].is_null})
            return
        if stale:
            return
        num_blocks = min(num_computed // self._block_size, len(block_ids), len(keys))
        if any(self._pool.blocks[block].is_null for block in block_ids[:num_blocks]):
            return
        if self._scenes is not None and (scene_id := _scene_of(request)) is not None:
            self._register(scene_id, request, keys[:num_blocks])
        operations = self._tiers.plan_save(keys[:num_blocks], block_ids[:num_blocks], tag)
        if not operations:
            return
        held = [block for operation in operations for block in operation.block_ids]
        self._pool.touch([self._pool.blocks[block] for block in held])
        for block in held:
            self._held[block] = self._held.get(block, 0) + 1
        self._operations += operations

    def _register(self, scene_id: str, request: Request, keys: list[BlockKey]) -> None:
        assert self._scenes is not None
        self._scenes.register(scene_id, request, keys)
        if self._builds is not None and keys:
            self._builds.show(scene_id, request, len(keys))

    def _tag(self, request: Request) -> bytes | None:
        """What a deletion finds the request's KV by; None: the request is not to be saved."""
        save = self._config.kv.save
        if save == "none" or (save == "memory" and not salts.is_memory_salt(request.cache_salt)):
            return None
        return salts.tag_of(request.cache_salt, request.lora_request)

    def _keys_of(self, request: Request) -> list[BlockKey]:
        """Keys of all full blocks so far; a waiting request is matched in every step, so kept."""
        keys = self._keys.setdefault(request.request_id, [])
        if len(keys) < len(request.block_hashes):
            adapter = self._adapter_digest(request)
            if adapter is None:
                return []
            keys += self._names(request.block_hashes[len(keys) :], adapter)
        return keys

    def _names(self, block_hashes: Sequence[BlockHash], adapter: bytes) -> list[BlockKey]:
        return [self._identity.block_key(bytes(of), adapter, self._generation) for of in block_hashes]

    def _adapter_digest(self, request: Request) -> bytes | None:
        """Read once per loaded adapter, so that weights that change on disk later do not rename its KV."""
        if (lora := request.lora_request) is None:
            return b""
        loaded = (lora.lora_int_id, lora.lora_path)
        if lora.load_inplace:
            # Id and path stay while the content changes, for later requests too: it cannot be named again.
            self._adapters[loaded] = None
        if loaded not in self._adapters:
            self._adapters[loaded] = adapter_digest(lora)
        return self._adapters[loaded]

    # -- steps ----------------------------------------------------------------------------------

    def take_metadata(self, *, idle: bool) -> MemosMetadata:
        metadata = MemosMetadata(self._operations, self._loads, idle)
        self._operations, self._loads = [], {}
        return metadata

    def complete(self, meta: MemosWorkerMeta) -> None:
        assert self._tiers is not None and self._pool is not None and self._accounting is not None
        self._accounting.changed()
        completion, follow_up = self._tiers.complete(meta.results)
        self._operations += follow_up
        released = []
        for block in completion.released_blocks:
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
            released.append(self._pool.blocks[block])
        # Deepest first, as vLLM frees a request: the head of a prefix is then evicted last.
        self._pool.free_blocks(reversed(released))
        for request_id, op_ids in list(self._loading.items()):
            if op_ids & completion.failed_ops and request_id in self._keys:
                self._failed.add(request_id)  # it is computed; a second attempt could fail for ever
                self._accounting.load_failed(request_id)
            op_ids -= completion.finished_ops
            if not op_ids:
                del self._loading[request_id]
        if self._scenes is not None:
            self._operations += self._scenes.complete(completion.finished_ops, completion.failed_ops)

    def take_stats(self) -> MemosStats | None:
        return self._accounting.take() if self._accounting is not None else None

    @property
    def has_work(self) -> bool:
        """Whether the engine must go on stepping for copies, with or without requests."""
        return self._tiers is not None and self._tiers.num_in_flight > 0

    @property
    def holds_blocks(self) -> bool:
        return bool(self._held) or (self._scenes is not None and self._scenes.num_loading_blocks > 0)

    def reset_cache(self) -> None:
        """The weights changed, or the operator wants no older KV: nothing saved so far is found again."""
        self._generation = secrets.token_bytes(16)
        self._stale |= self._keys.keys()  # what runs has KV of the old weights
        self._keys.clear()
        self._matched.clear()
        if self._tiers is not None:
            self._tiers.drop_host()
        if self._scenes is not None:
            self._scenes.clear()
        if self._builds is not None:
            self._builds.clear()

    # -- operator -------------------------------------------------------------------------------

    def handle(self, op: str, payload: dict[str, Any], engine: EngineCore | None = None) -> dict[str, Any]:
        """Serves the API processes; runs between two steps of the engine.

        Args:
            engine: the caller; ``declare`` hashes with its hasher.
        """
        if op == "adapters":
            return {"in_use": sorted(set(self._adapter_of.values()))}
        if self._tiers is None or self._accounting is None:
            return {"enabled": False}
        self._accounting.changed()
        match op:
            case "status":
                return self._status()
            case "drop_host":
                self._tiers.drop_host()
                return self._status()
            case "forget":
                return self._forget(salts.tag(payload["salt"]))
            case "forget_adapter":
                return self._forget(salts.adapter_tag(payload["lora_name"]))
            case "expect" if self._scenes is not None:
                self._operations += self._scenes.expect(payload["planner"], payload["scenes"], payload.get("busy", ()))
                return {"enabled": True, "blocks": self._scenes.expected_blocks()}
            case "scene" if self._scenes is not None:
                return {"enabled": True, **self._scenes.state(payload["scene"])}
            case "declare" if self._builds is not None:
                assert engine is not None
                return self._declare(engine, **payload)
            case "build" if self._builds is not None:
                claim = self._builds.claim(payload["planner"], payload["piece_tokens"])
                return {"enabled": True, "unknown": self._builds.unknown(payload["declared"]), **claim}
            case "expect" | "scene" | "declare" | "build":
                return {"enabled": False}
        raise ValueError(f"unknown operation {op!r}")

    def _declare(
        self, engine: EngineCore, scene: str, token_ids: list[int], salt: str, lora: dict[str, Any] | None
    ) -> dict[str, Any]:
        """A prefix that no request has had yet is a scene from now on; ``blocks`` 0 if it cannot be one.

        Args:
            lora: arguments of the ``LoRARequest`` that it is to be computed with.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.v1.request import Request

        assert self._tiers is not None and self._builds is not None
        request = Request(
            f"memos-declare-{scene}",
            token_ids,
            SamplingParams(max_tokens=1),
            None,
            lora_request=LoRARequest(**lora) if lora else None,
            cache_salt=salt,
            block_hasher=engine.request_block_hasher,
        )
        tag, digest = self._tag(request), self._adapter_digest(request)
        if tag is None or digest is None or self._tiers.is_forgotten(tag):
            return {"enabled": True, "blocks": 0}
        keys = self._names(request.block_hashes, digest)
        self._register(scene, request, keys)
        return {"enabled": True, "blocks": len(keys)}

    def _forget(self, tag: bytes) -> dict[str, int]:
        assert self._tiers is not None
        if self._builds is not None:
            self._builds.forget(tag)
        num_scenes = self._scenes.forget(tag) if self._scenes is not None else 0
        return {**asdict(self._tiers.forget(tag)), "scenes": num_scenes}

    def _status(self) -> dict[str, Any]:
        assert self._tiers is not None and self._accounting is not None
        slots, disk = self._tiers.slots, self._tiers.disk
        return {
            "enabled": True,
            "block_size": self._block_size,
            "in_flight": self._tiers.num_in_flight,
            "held_blocks": len(self._held),
            "host": {"blocks": len(slots), "capacity_blocks": slots.num_slots},
            "disk": {"blocks": len(disk), "bytes": disk.usage_bytes} if disk else {"blocks": 0, "bytes": 0},
            "totals": asdict(self._tiers.totals),
            "prediction": self._prediction_status(),
            "accounting": self._accounting.status(),
        }

    def _prediction_status(self) -> dict[str, Any]:
        if self._scenes is None:
            return {"enabled": False}
        builds = {} if self._builds is None else self._builds.status()
        return {"enabled": True, **self._scenes.status(), **builds}

    def shutdown(self) -> None:
        if self._tiers is not None and self._tiers.disk is not None:
            self._tiers.disk.close()
        self._tiers = self._builds = None


def _scene_of(request: Request, param: str = SCENE_PARAM) -> str | None:
    """The scene that an API process named for a request with memory."""
    scene_id = (request.kv_transfer_params or {}).get(param)
    return scene_id if isinstance(scene_id, str) and salts.is_memory_salt(request.cache_salt) else None
