"""Scheduler side of the connector: decides what is loaded and saved, from the engine's loop only.

match       a request asks how much of its prompt is off the GPU     (before allocation)
plan_load   its blocks are allocated: copies are planned             (same step)
plan_save   a request finished: new prefix blocks are planned        (blocks held meanwhile)
take_metadata / complete     to the workers and back, every step
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from memos_vllm.compat import weight_updates
from memos_vllm.config import MemosConfig
from memos_vllm.integration import engine_channel, engine_operations, salts
from memos_vllm.integration.activation_memory import ActivationMemory, open_memory
from memos_vllm.integration.engine_metrics import MemosStats
from memos_vllm.integration.messages import MemosHandshake, MemosMetadata, MemosWorkerMeta
from memos_vllm.integration.refiner import is_refining
from memos_vllm.integration.scene_table import SCENE_PARAM, START_PARAM
from memos_vllm.store.manager import Pending
from memos_vllm.store.ops import Op
from memos_vllm.types import BlockKey

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_FURTHER_CHOICE = re.compile(r"[1-9][0-9]*_")
"""How vLLM begins the ids of a request's further choices (``n`` > 1), each a request of its own in the engine. Chat
requests, which alone name scenes, have ids that begin otherwise, whatever the client calls them."""

PREFETCH_PATIENCE_S = 1.0
"""How long a request waits for prefetches of its own blocks, of which none ends, before it loads them itself.

From the moment at which it waits they are as urgent as its own load would be, so they are not any sooner there.
"""

COPY_PATIENCE_S = 1.0
"""How long a request that got no block waits for copies of which none ends."""


class SchedulerSide:
    """State: the memory, the operations of the coming step, and where each request is with its copies."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: MemosConfig) -> None:
        self.memory: ActivationMemory | None = None
        """None before the workers said what a block is, and where blocks cannot be kept."""
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._block_size: int = vllm_config.cache_config.block_size
        self._pool: BlockPool | None = None
        self._operations: list[Op] = []
        self._loads: dict[str, tuple[int, ...]] = {}
        self._adapter_of: dict[str, int] = {}
        """Of the requests that were looked at and have not ended."""
        self._arrived: set[str] = set()
        self._matched: dict[str, tuple[int, list[BlockKey]]] = {}
        self._loading: dict[str, set[int]] = {}
        self._prefetch_waits: dict[str, tuple[int, float]] = {}
        """How many blocks the request had on the GPU, and since when."""
        self._hurried: list[int] = []
        self._is_waited_for = False
        """Whether a request of the coming step waits for a prefetch, or for the blocks that one holds."""
        self._without_blocks: set[str] = set()
        """Requests that were looked at for this step and got no blocks; "" for one that runs."""
        self._progress_at = 0.0
        """When a copy ended last, or the first was started."""
        self._failed: set[str] = set()
        self._stale: set[str] = set()
        engine_channel.serve(self.handle)
        weight_updates.watch(self.weights_changed)

    def bind_block_pool(self, pool: BlockPool) -> None:
        self._pool = pool

    def open_tiers(self, handshakes: list[MemosHandshake]) -> None:
        assert self._pool is not None
        self.memory = open_memory(self._vllm_config, self._kv_cache_config, self._config, self._pool, handshakes)

    # -- requests -------------------------------------------------------------------------------

    def added(self, request: Request) -> None:
        """A request came into the engine."""
        if self.memory is not None:
            self.memory.building(lambda builds: builds.added(request), None)

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond ``num_computed_tokens`` that can be loaded, and whether asynchronously.

        None: another request loads the same blocks right now, or this one builds a scene and is not alone;
        ask again in the next step. The last token of a prompt is always computed, since its logits are needed.
        """
        self._matched.pop(request.request_id, None)
        if request.lora_request is not None:
            self._adapter_of[request.request_id] = request.lora_request.lora_int_id
        if (memory := self.memory) is None or request.request_id in self._failed:
            return 0, False
        if memory.building(lambda builds: builds.must_wait(request), False):
            return None, False
        if memory.gpu_is_outdated:
            self._stale.add(request.request_id)
        first = num_computed_tokens // self._block_size
        last = (request.num_tokens - 1) // self._block_size
        self._note_arrival(memory, request, first)
        keys = memory.names.keys(request)[first:last]
        pending = memory.tiers.pending(keys)
        if pending is Pending.LOAD:
            return None, False
        if pending is Pending.PREFETCH and self._waits(request, first):
            self._is_waited_for = True
            self._hurried += memory.tiers.hurry(memory.names.first_keys(request, last))
            return None, False
        match = memory.tiers.match(keys)
        num_tokens = match.num_blocks * self._block_size
        self._without_blocks.add(request.request_id)
        self._matched[request.request_id] = (first, [])
        if num_tokens < self._config.kv.min_load_tokens:
            num_tokens = 0
        num_cached_blocks = first + num_tokens // self._block_size
        memory.building(lambda builds: builds.scheduled(request, num_cached_blocks), None)
        if not num_tokens:
            return 0, False
        self._matched[request.request_id] = (first, keys[: match.num_blocks])
        return num_tokens, True

    def _note_arrival(self, memory: ActivationMemory, request: Request, num_resident_blocks: int) -> None:
        """Tells the scene table, once per request of a client, how much of its scene was on the GPU."""
        if memory.scenes is None or request.request_id in self._arrived or _scene_of(request) is None:
            return
        if _FURTHER_CHOICE.match(request.request_id):
            return  # it finds what the first one has, or waits for
        self._arrived.add(request.request_id)
        named = [scene_id for param in (SCENE_PARAM, START_PARAM) if (scene_id := _scene_of(request, param))]
        memory.arrived(named, request, num_resident_blocks)

    def _waits(self, request: Request, num_resident: int) -> bool:
        """Whether a request still waits for a prefetch of its next blocks."""
        now = time.monotonic()
        had, since = self._prefetch_waits.get(request.request_id, (-1, now))
        if num_resident > had:
            self._prefetch_waits[request.request_id] = (num_resident, since := now)
        return now - since < PREFETCH_PATIENCE_S

    def plan_load(self, request: Request, block_ids: list[int], num_external_tokens: int) -> None:
        self._without_blocks.discard(request.request_id)
        matched = self._matched.pop(request.request_id, None)
        if matched is None or (memory := self.memory) is None:
            return  # goes on after its load
        first, keys = matched
        operations: list[Op] = []
        num_blocks = num_external_tokens // self._block_size
        assert num_blocks <= len(keys)
        if num_blocks:
            blocks = block_ids[first : first + num_blocks]
            operations = memory.tiers.plan_load(keys[:num_blocks], blocks, in_groups=memory.layer_groups > 1)
        is_build = memory.building(lambda builds: builds.is_build(request), False)
        if not is_build and not is_refining(request):  # nobody waits for their first token
            memory.admitted(request, (request.num_tokens - 1) // self._block_size, first, operations)
        if not operations:
            return
        self._operations += operations
        self._loads[request.request_id] = tuple(operation.op_id for operation in operations)
        self._loading[request.request_id] = {operation.op_id for operation in operations}

    def plan_save(self, request: Request, block_ids: list[int]) -> None:
        """Plans the save of a finished request's full blocks that no tier holds yet."""
        stale = request.request_id in self._stale
        self._let_go(request.request_id)
        if (memory := self.memory) is None:
            return
        memory.accounting.finished(request)
        keys = memory.names.keys(request)
        memory.names.drop(request.request_id)
        num_computed = min(request.num_computed_tokens, request.num_tokens - 1)  # the last was sampled, not computed
        self._operations += memory.building(lambda builds: builds.finished(request, num_computed), [])
        if salts.is_memory_salt(request.cache_salt):
            memory.owned.note(block_ids, salts.tag_of(request.cache_salt, request.lora_request))
        tag = memory.names.tag(request)
        if tag is None or request.request_id in self._loading:
            return  # in the latter case aborted while its blocks were being loaded: they hold nothing yet
        if memory.tiers.is_forgotten(tag):
            # Deleted while it ran: what it published is out of reach under the new salt, and goes too.
            memory.pool.evict_blocks({block for block in block_ids if not memory.pool.blocks[block].is_null})
            return
        num_blocks = min(num_computed // self._block_size, len(block_ids), len(keys))
        if stale or is_refining(request) or any(memory.pool.blocks[block].is_null for block in block_ids[:num_blocks]):
            return
        if (scene_id := _scene_of(request)) is not None:
            is_whole = request.num_computed_tokens >= request.num_prompt_tokens
            memory.register(scene_id, request, keys[:num_blocks], is_whole=is_whole)
        operations = memory.tiers.plan_save(keys[:num_blocks], block_ids[:num_blocks], tag)
        memory.held.hold(block for operation in operations for block in operation.block_ids)
        self._operations += operations

    def _let_go(self, request_id: str) -> None:
        """Nothing is remembered of an ended request but the load that may be under way."""
        for by_request in (self._matched, self._adapter_of, self._prefetch_waits):
            by_request.pop(request_id, None)
        for requests in (self._arrived, self._failed, self._stale):
            requests.discard(request_id)

    # -- steps ----------------------------------------------------------------------------------

    def take_metadata(self, *, idle: bool, step: SchedulerOutput | None = None) -> MemosMetadata:
        arriving: tuple[int, ...] = ()
        if self.memory is not None:
            if step is not None:
                arriving = self.memory.arriving.read_by(step)
            is_starved = bool(self._without_blocks)
            self._is_waited_for |= is_starved and self.memory.num_loading_blocks > 0
            self.memory.guarded(lambda scenes: scenes.room.new_step(is_starved=is_starved), None)
            if self._operations and self.memory.tiers.num_in_flight == len(self._operations):
                self._progress_at = time.monotonic()
        paced = not (idle or self._is_waited_for)
        metadata = MemosMetadata(self._operations, self._loads, tuple(self._hurried), arriving, idle, paced)
        self._operations, self._loads, self._hurried, self._is_waited_for = [], {}, [], False
        self._without_blocks.clear()
        return metadata

    def complete(self, meta: MemosWorkerMeta) -> None:
        memory = self.memory
        assert memory is not None
        memory.accounting.changed()
        completion, follow_up = memory.tiers.complete(meta.results)
        self._progress_at = time.monotonic()
        self._operations += follow_up
        memory.held.release(completion.released_blocks)
        for request_id in filter(None, map(memory.arriving.request_of, completion.failed_ops)):
            self._load_failed(memory, request_id)
        memory.arriving.end(completion.finished_ops)
        for request_id, op_ids in list(self._loading.items()):
            if op_ids & completion.failed_ops:
                self._load_failed(memory, request_id)
            op_ids -= completion.finished_ops
            if not op_ids:
                del self._loading[request_id]
        self._operations += memory.complete(completion.finished_ops, completion.failed_ops)

    def _load_failed(self, memory: ActivationMemory, request_id: str) -> None:
        if request_id in memory.names:
            self._failed.add(request_id)  # it is computed; a second attempt could fail for ever
            memory.accounting.load_failed(request_id)

    def usable(self, request_ids: Iterable[str]) -> None:
        """These requests may run, perhaps before their loads have ended; called behind ``complete`` of the step."""
        if (memory := self.memory) is None:
            return
        for request_id in request_ids:
            for op_id in self._loading.pop(request_id, ()):
                memory.arriving.add(op_id, request_id, memory.tiers.blocks_of(op_id))

    def take_stats(self) -> MemosStats | None:
        return self.memory.take_stats() if self.memory is not None else None

    @property
    def has_work(self) -> bool:
        """Whether the engine must go on stepping for copies, with or without requests."""
        return self.memory is not None and self.memory.tiers.num_in_flight > 0

    @property
    def holds_blocks(self) -> bool:
        if (memory := self.memory) is None:
            return False
        return len(memory.held) > 0 or memory.num_loading_blocks > 0

    def will_free_blocks(self) -> bool:
        """Asked when a running request got no block: whether it may wait for copies that hold some.

        Prefetches among them are then no longer paced. Copies that get nowhere (a disk that does not answer) are
        not waited for: vLLM preempts, as it would without us.
        """
        self._without_blocks.add("")  # whoever it is
        return self.holds_blocks and time.monotonic() - self._progress_at < COPY_PATIENCE_S

    def reset_cache(self) -> None:
        """The operator, or vLLM itself, wants no older KV: nothing saved so far is found again."""
        self._matched.clear()
        if self.memory is not None:
            self._stale |= self.memory.reset()

    def weights_changed(self, called: str) -> None:
        """The same after a call that may have changed the weights; see ``ActivationMemory.weights_changed``."""
        self._matched.clear()
        if (memory := self.memory) is None:
            return
        self._stale |= memory.weights_changed()
        logger.warning(
            "%r may have changed the weights: KV that was saved before is not used any more%s", called,
            ", and none is saved until the prefix cache was reset (POST /reset_prefix_cache)"
            if memory.gpu_is_outdated else "",
        )  # fmt: skip

    # -- operator -------------------------------------------------------------------------------

    def handle(self, op: str, payload: dict[str, Any], engine: EngineCore | None = None) -> engine_operations.Reply:
        """Serves the API processes, between two steps of the engine; see ``engine_operations``."""
        if op == "adapters":
            return {"in_use": sorted(set(self._adapter_of.values()))}
        if op == "num_requests":
            assert engine is not None
            return {"num_requests": engine.scheduler.get_num_unfinished_requests()}
        if self.memory is None:
            return {"enabled": False}
        reply, operations = engine_operations.serve(self.memory, op, payload, engine)
        self._operations += operations
        return reply

    def shutdown(self) -> None:
        if self.memory is not None:
            self.memory.close()
        self.memory = None


def _scene_of(request: Request, param: str = SCENE_PARAM) -> str | None:
    """The scene that an API process named for a request with memory."""
    scene_id = (request.kv_transfer_params or {}).get(param)
    return scene_id if isinstance(scene_id, str) and salts.is_memory_salt(request.cache_salt) else None
