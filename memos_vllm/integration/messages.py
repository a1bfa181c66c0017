"""What travels between the scheduler's process and the workers, inside vLLM's own messages."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from memos_vllm.store.ops import Op, Result


@dataclass
class MemosHandshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: what a block is on this rank."""

    layout: tuple[str, ...]
    block_bytes: int
    layer_groups: int = 0
    """In how many a request's KV comes from host memory; 0: whole."""


@dataclass
class MemosMetadata(KVConnectorMetadata):
    """Scheduler to workers, each step: copies to start."""

    operations: list[Op] = field(default_factory=list)

    loads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Request id to the operations that bring its blocks."""

    hurried: tuple[int, ...] = ()
    """Prefetches under way for which a request has begun to wait."""

    arriving: tuple[int, ...] = ()
    """Loads of which this step's pass may read blocks, while later layers are still on their way."""

    idle: bool = False
    """No forward pass in this step: the worker may wait a moment for a copy to finish."""

    paced: bool = False
    """Requests run, and none waits for a prefetch: prefetches are not to hold them up."""


@dataclass
class MemosWorkerMeta(KVConnectorWorkerMetadata):
    """Workers to scheduler, each step: copies that ended, of all ranks once aggregated."""

    results: list[Result]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> MemosWorkerMeta:
        assert isinstance(other, MemosWorkerMeta)
        return MemosWorkerMeta(self.results + other.results)
