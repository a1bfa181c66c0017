"""What one of a machine's data-parallel engines may take of the budgets, which are for all of them together.

Only the process that makes vLLM's configuration knows how many there are: an engine of a dense model is told that
it is the only one. So that process notes the number in the connector's configuration, which travels to the engines
and their workers. Both sides of the connector must see the same budget, for the scheduler's side numbers the slots
of the workers' host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos_vllm.config import MemosConfig
from memos_vllm.store.gone_engines import remove_gone

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CONFIG, _NUM_ENGINES = "memos", "memos_engines"


def note_engines(vllm_config: VllmConfig) -> None:
    """Notes how many engines run on this machine. May be called again."""
    if vllm_config.kv_transfer_config is None:
        return
    parallel = vllm_config.parallel_config
    # 0: this machine has the API server alone; the engines' machines make configurations of their own.
    num_engines = max(1, getattr(parallel, "data_parallel_size_local", parallel.data_parallel_size))
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    beside = [each.get("kv_connector_extra_config", {}) for each in extra.get("connectors", ())]
    for each in (extra, *beside):
        if _CONFIG in each:
            each[_NUM_ENGINES] = num_engines


def remove_gone_engines(vllm_config: VllmConfig, data_dir: Path) -> None:
    """At the start of the server: removes KV of engines that there are no more.

    Where engines run on several machines, or each has a server of its own, nothing tells here which are gone.
    """
    parallel = vllm_config.parallel_config
    if getattr(parallel, "data_parallel_size_local", parallel.data_parallel_size) == parallel.data_parallel_size:
        remove_gone(data_dir / "kv", parallel.data_parallel_size)


def num_engines_of(extra_config: Mapping[str, Any]) -> int:
    """Engines that share the budgets, from the connector's configuration; 1 where nobody noted it."""
    return int(extra_config.get(_NUM_ENGINES, 1))


def config_of(extra_config: Mapping[str, Any]) -> MemosConfig:
    """The configuration of one engine, from the connector's: its share of ``kv.host_bytes`` and ``kv.disk_bytes``."""
    config = MemosConfig.model_validate(extra_config[_CONFIG])
    num_engines = num_engines_of(extra_config)
    share = {name: getattr(config.kv, name) // num_engines for name in ("host_bytes", "disk_bytes")}
    return config.model_copy(update={"kv": config.kv.model_copy(update=share)})
