"""The KV connector: vLLM's hooks, passed on to the side that this process is.

vLLM makes one instance in the scheduler's process and one in each worker. Both sides are plain
objects (``scheduler_side``, ``worker_side``); this class only speaks vLLM's interface, which is the
one part that changes between versions.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from memos_vllm import data_dir
from memos_vllm.compat import layer_waits
from memos_vllm.integration import engine_share, salts
from memos_vllm.integration.engine_metrics import MemosPromMetrics, MemosStats
from memos_vllm.integration.messages import MemosHandshake, MemosMetadata, MemosWorkerMeta
from memos_vllm.integration.scheduler_side import SchedulerSide
from memos_vllm.integration.worker_side import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class MemosConnector(KVConnectorBase_V1):
    """Activation memory: saves prefixes of finished requests, loads them when a request has them."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra_config = self._kv_transfer_config.kv_connector_extra_config
        config = engine_share.config_of(extra_config)
        self.scheduler_side: SchedulerSide | None = None
        self.worker_side: WorkerSide | None = None
        self._secret = b""
        if role == KVConnectorRole.SCHEDULER:
            if (num_engines := engine_share.num_engines_of(extra_config)) > 1:
                logger.info(
                    "this engine is one of %d of this machine: it takes %d bytes of kv.host_bytes, %d of kv.disk_bytes",
                    num_engines, config.kv.host_bytes, config.kv.disk_bytes,
                )  # fmt: skip
            self._secret = data_dir.secret(config.data_dir)
            self.scheduler_side = SchedulerSide(vllm_config, kv_cache_config, config)
        else:
            self.worker_side = WorkerSide(vllm_config, kv_cache_config, config)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: a dropped save is a later miss

    # -- scheduler side -------------------------------------------------------------------------

    @property
    def _scheduler(self) -> SchedulerSide:
        assert self.scheduler_side is not None
        return self.scheduler_side

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._scheduler.bind_block_pool(gpu_block_pool)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], MemosHandshake]) -> None:
        self._scheduler.open_tiers([item for item in metadata.values() if isinstance(item, MemosHandshake)])

    def set_xfer_handshake_metadata(self, metadata: dict[int, MemosHandshake]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): item for rank, item in metadata.items()})  # before 0.32

    def on_new_request(self, request: Request) -> None:
        # A client may send anything here, and vLLM itself reads it as a mapping right after this call.
        if not isinstance(request.kv_transfer_params, dict):
            request.kv_transfer_params = None
        # Endpoints that are not ours pass on any salt; with one of ours comes the right to say which scene this is.
        if salts.is_memory_salt(request.cache_salt) and not salts.is_genuine(self._secret, request.cache_salt):
            request.cache_salt = salts.foreign(request.cache_salt)
        self._scheduler.added(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.plan_load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> MemosMetadata:
        idle = scheduler_output.total_num_scheduled_tokens == 0
        return self._scheduler.take_metadata(idle=idle, step=scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, MemosWorkerMeta):
            self._scheduler.complete(meta)
        if connector_output.finished_recving:
            self._scheduler.usable(connector_output.finished_recving)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.plan_save(request, block_ids)
        return False, None

    def reset_cache(self) -> bool:
        self._scheduler.reset_cache()
        return True

    def has_pending_push_work(self) -> bool:
        return self._scheduler.has_work

    def has_pending_block_frees(self) -> bool:
        return self._scheduler.will_free_blocks()

    # -- worker side ----------------------------------------------------------------------------

    @property
    def _worker(self) -> WorkerSide:
        assert self.worker_side is not None
        return self.worker_side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> MemosHandshake | None:
        return self._worker.handshake() if self.worker_side else None

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        # Here and not in start_load_kv, which from 0.32 on runs after the forward pass: a load
        # would then wait for the pass of another request.
        self._worker.start(connector_metadata)
        if connector_metadata.arriving and not layer_waits.layers_ask():
            self._worker.wait_for_all_layers()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.take_finished_loads()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> MemosWorkerMeta | None:
        return self._worker.take_results()

    # -- metrics: from the scheduler side to an API process ---------------------------------------

    def get_kv_connector_stats(self) -> MemosStats | None:
        return self.scheduler_side.take_stats() if self.scheduler_side is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> MemosStats:
        return MemosStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> MemosPromMetrics:
        return MemosPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- both -----------------------------------------------------------------------------------

    def shutdown(self) -> None:
        for side in (self.scheduler_side, self.worker_side):
            if side is not None:
                side.shutdown()


if MemosConnector.__name__ not in KVConnectorFactory._registry:
    # Beside another connector, vLLM's MultiConnector looks up by name alone whose stats have come.
    KVConnectorFactory.register_connector(MemosConnector.__name__, __name__, MemosConnector.__name__)
