"""Worker side of the connector: owns this rank's host pool and copy threads, does what it is told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from memos_vllm.compat import layer_waits
from memos_vllm.compat.cpu_affinity import threads_on_all_cores
from memos_vllm.compat.kv_cache_specs import spec_of_layer
from memos_vllm.config import MemosConfig
from memos_vllm.integration.arriving_layers import ArrivingLayers
from memos_vllm.integration.kv_heads import head_views
from memos_vllm.integration.messages import MemosHandshake, MemosMetadata, MemosWorkerMeta
from memos_vllm.integration.model_identity import identity_of, rank_of
from memos_vllm.kernels.kv_copy import BlockCopier, describe_planes, plane_numbers, planes_of
from memos_vllm.store.copy_planner import CopyPlan
from memos_vllm.store.cuda_device import plan_of
from memos_vllm.store.layer_groups import LayerGroup, layer_groups
from memos_vllm.store.link import link_for
from memos_vllm.store.ops import Result
from memos_vllm.store.transfer import TransferWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.002
"""How long a step without a forward pass waits for a running copy.

Without it an engine that has nothing but copies to do polls some 700 times a second. Longer would
delay a request that arrives meanwhile by as much.
"""

FLUSH_TIMEOUT_S = 4.0
"""How long a shutdown goes on writing host copies to disk; vLLM kills its workers after 5 s."""


class WorkerSide:
    """Called by the model runner's thread only; the copies run in the transfer worker's threads."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: MemosConfig) -> None:
        self._vllm_config = vllm_config
        self._num_blocks = kv_cache_config.num_blocks
        self._groups = kv_cache_config.kv_cache_groups
        self._config = config
        self.planes: list[torch.Tensor] = []
        self._transfer: TransferWorker | None = None
        self._handshake: MemosHandshake | None = None
        self._loads: dict[str, set[int]] = {}
        self._arriving = ArrivingLayers()
        self._results: list[Result] = []
        self._idle = False

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Takes the KV cache tensors of this rank; called once, before the first step."""
        names = sorted(kv_caches, key=_layer_order)
        caches = [kv_caches[name] for name in names]
        self.planes = planes = planes_of(caches, self._num_blocks)
        layout = describe_planes(caches, self._num_blocks)
        copier = BlockCopier(planes)
        if self._config.kv.store_dtype == "fp8":
            copier = BlockCopier(planes, head_views(caches, self._num_blocks, self._specs(names)), fp8=True)
            layout += (f"stored as fp8, {copier.row_bytes} bytes",)  # approximate KV is another deployment's
        plan = plan_of(planes[0].device, self._config.data_dir) if planes[0].is_cuda else CopyPlan()
        layers = self._layer_groups(names, caches)
        link = link_for(copier, planes, plan, layers)
        world_size = self._vllm_config.parallel_config.world_size
        self._handshake = MemosHandshake(layout, link.row_bytes, len(layers))
        with nullcontext() if planes[0].is_cuda else threads_on_all_cores():  # a GPU's worker may be bound to its node
            self._transfer = TransferWorker(
                link,
                num_slots=self._config.kv.host_bytes // (link.row_bytes * world_size),
                identity=identity_of(self._vllm_config, layout),
                rank=rank_of(self._vllm_config),
                io_threads=self._config.kv.io_threads,
                pin_memory=planes[0].is_cuda,
            )

    def _layer_groups(self, names: Sequence[str], caches: Sequence[torch.Tensor]) -> list[LayerGroup]:
        """In which a request's loads come; none where a pass could read a layer that it has not asked for."""
        if self._config.kv.layer_groups == 1:
            return []
        if (reason := layer_waits.why_not(self._vllm_config, names)) is not None:
            logger.warning("kv.layer_groups has no effect: %s; a request's KV is loaded whole", reason)
            return []
        groups = layer_groups(self.planes, self._config.kv.layer_groups)
        if len(groups) == 1:
            return []
        numbers = plane_numbers(caches, self._num_blocks)
        self._arriving = ArrivingLayers(groups, dict(zip(names, numbers, strict=True)))
        return groups

    def _specs(self, names: Sequence[str]) -> list[KVCacheSpec]:
        specs: dict[str, KVCacheSpec] = {}
        for group in self._groups:
            specs |= {name: spec_of_layer(group.kv_cache_spec, name) for name in group.layer_names}
        return [specs[name] for name in names]

    def handshake(self) -> MemosHandshake | None:
        return self._handshake

    def start(self, metadata: MemosMetadata) -> None:
        """Starts the copies of a step; returns at once."""
        assert self._transfer is not None
        self._idle = metadata.idle
        self._transfer.pace(metadata.paced)
        for request_id, op_ids in metadata.loads.items():
            self._loads[request_id] = set(op_ids)
        if metadata.operations:
            self._transfer.submit(metadata.operations, after=self._after_queued_work())
        if metadata.hurried:
            self._transfer.hurry(metadata.hurried)
        self._arriving.expect(metadata.arriving)

    def wait_for_layer(self, name: str) -> None:
        """Called by the pass before a layer reads its KV: what is copied after this call is too late for it."""
        if self._arriving.is_whole:
            return
        for op_id, group in self._arriving.take(name):
            self._wait_for(op_id, group)

    def wait_for_all_layers(self) -> None:
        """The same for a pass that does not ask for each layer."""
        for op_id, group in self._arriving.take_all():
            self._wait_for(op_id, group)

    def _wait_for(self, op_id: int, group: int) -> None:
        assert self._transfer is not None
        for event in self._transfer.wait_for_layers(op_id, group):
            torch.cuda.current_stream(self.planes[0].device).wait_event(event)

    def _after_queued_work(self) -> torch.cuda.Event | None:
        """An event behind everything that the compute stream was given so far.

        With asynchronous scheduling a pass that still reads or writes a block may be queued when
        the block is given to a load; the copy must come after it.
        """
        if not torch.cuda.is_available():
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def take_finished_loads(self) -> set[str] | None:
        """Requests whose blocks are all there, or failed; called once a step, before the two below.

        With groups of layers: whose blocks have the first, if a pass can wait for the others.

        Raises:
            RuntimeError: the device refused a copy for a request that runs already; what it computed is wrong.
        """
        assert self._transfer is not None
        if self._idle and self._transfer.in_flight:
            self._transfer.wait(IDLE_WAIT_S)
        self._arriving.begun(self._transfer.take_begun())  # before the results: what has ended is not begun
        self._results = self._transfer.drain()
        self._arriving.ended(self._results)
        ended = {result.op_id for result in self._results}
        finished = set()
        for request_id, op_ids in self._loads.items():
            op_ids -= ended
            if self._arriving.may_run(op_ids):
                finished.add(request_id)
        for request_id in finished:
            del self._loads[request_id]
        return finished or None

    def take_failed_blocks(self) -> set[int]:
        return {block for result in self._results for block in result.failed_blocks}

    def take_results(self) -> MemosWorkerMeta | None:
        results, self._results = self._results, []
        return MemosWorkerMeta(results) if results else None

    def shutdown(self) -> None:
        if self._transfer is not None:
            self._transfer.shutdown(FLUSH_TIMEOUT_S)
            self._transfer = None


def _layer_order(name: str) -> list[tuple[int, str]]:
    """``model.layers.10.attn`` after ``model.layers.9.attn``: the order is part of the file format."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
