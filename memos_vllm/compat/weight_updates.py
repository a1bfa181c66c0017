"""A cache of KV beside the GPU's must hear of it when the weights change.

Why: vLLM tells a connector to forget what it has only where a reset of the prefix cache asks for that
(``reset_connector``, in HTTP ``reset_external``). A trainer that updates weights and resets the prefix cache without it
is right on a server without connector, and would be answered from KV of the old weights here. All ways to change
weights in a running engine (weight transfer, ``reload_weights``, ``apply_model``, methods of a worker extension) go to
the workers through ``EngineCore.collective_rpc``, which therefore tells it.
Goes when: vLLM calls a method of the connector after every change of weights.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

LEAVES_WEIGHTS_ALONE = frozenset(
    {
        *("add_lora", "list_loras", "pin_lora", "remove_lora"),  # named by their content (``block_names``)
        *("check_health", "execute_dummy_batch", "profile", "synchronize_device"),
        *("checkpoint_prepare", "checkpoint_restore", "compute_weight_checksums"),
        *("get_cache_block_size_bytes", "get_compilation_match_table", "get_encoder_timing_stats"),
        *("get_kv_cache_spec", "get_kv_connector_handshake_metadata", "get_model_inspection", "get_supported_tasks"),
        *("init_weight_transfer_engine", "shutdown_weight_transfer_engine", "supports_draft_weight_updates"),
        *("release_late_interaction_query_cache", "reset_encoder_cache", "reset_mm_cache"),
        *("save_sharded_state", "save_tensorized_model", "update_max_model_len"),
    }
)
"""Methods of vLLM's workers after which KV is what it was. Of any other name, and of a function, nobody knows; taking
it for a change costs a cache, the opposite mistake a wrong answer."""

_watchers: list[weakref.WeakMethod[Callable[[str], None]]] = []


def watch(on_change: Callable[[str], None]) -> None:
    """Has a bound method called after whatever may have changed the weights of this process's engine.

    It is called between two steps, also where the change failed half-way, with a word on what was called; it is
    held weakly.
    """
    from vllm.v1.engine.core import EngineCore

    _watchers[:] = [each for each in _watchers if each() is not None]
    _watchers.append(weakref.WeakMethod(on_change))
    if not hasattr(EngineCore.collective_rpc, "_memos_original"):
        EngineCore.collective_rpc = _telling(EngineCore.collective_rpc)  # type: ignore[method-assign]


def _telling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)  # vLLM converts arguments by the signature
    def collective_rpc(self: Any, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, method, *args, **kwargs)
        finally:
            if not (isinstance(method, str) and method in LEAVES_WEIGHTS_ALONE):
                _tell(method if isinstance(method, str) else getattr(method, "__name__", "a function"))

    collective_rpc._memos_original = original  # type: ignore[attr-defined]
    return collective_rpc


def _tell(called: str) -> None:
    for watcher in _watchers:
        if (on_change := watcher()) is not None:
            on_change(called)
