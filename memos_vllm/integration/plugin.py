"""What ``--plugin memos`` switches on in a process.

Runs at the flag, in the process that parses it, and in ``register`` in every process that inherits
the flag from the environment. Each step may run twice.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from importlib.metadata import entry_points
from typing import Any

from memos_vllm import activation, data_dir
from memos_vllm.compat import cpu_lora, hashing
from memos_vllm.config import MemosConfig, load
from memos_vllm.errors import MemosError
from memos_vllm.integration import logs
from memos_vllm.integration.engine_share import note_engines, remove_gone_engines

CONNECTOR = "MemosConnector"
CONNECTOR_MODULE = "memos_vllm.integration.connector"
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
    "vllm.endpoint_plugins",
)


def activate() -> None:
    logs.join_vllm()
    hashing.make_block_hashes_stable()
    cpu_lora.skip_tokens_without_adapter()
    _allow_endpoint_plugin()
    _wrap_engine_config()


def _allow_endpoint_plugin() -> None:
    """Endpoint plugins load only when named in ``VLLM_PLUGINS``.

    Unset means "all others load": the other groups are then listed in full, or they would be
    switched off. Endpoint plugins of others stay as they were, unlisted.
    """
    if "VLLM_PLUGINS" in os.environ:
        names = [name for name in os.environ["VLLM_PLUGINS"].split(",") if name]
    else:
        groups = [group for group in _PLUGIN_GROUPS if group != "vllm.endpoint_plugins"]
        names = sorted({entry.name for group in groups for entry in entry_points(group=group)})
    if "memos" not in names:
        names.append("memos")
    os.environ["VLLM_PLUGINS"] = ",".join(names)


def _wrap_engine_config() -> None:
    """Adds the KV connector to the engine's configuration, whatever the order of the options."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, "_memos_original"):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            config = load(activation.config_path())
            data_dir.acquire(config.data_dir)
        except MemosError as error:
            raise SystemExit(f"memos: {error}") from error
        if getattr(self, "kv_offloading_size", None):
            raise SystemExit(
                "memos: --kv-offloading-size puts another KV connector in the place of ours; leave it out "
                "(kv.host_bytes in the configuration is what memos keeps in host memory)"
            )
        self.kv_transfer_config = connector_config(self.kv_transfer_config, config)
        engine_config = original(self, *args, **kwargs)
        note_engines(engine_config)
        if data_dir.is_holder(config.data_dir):
            remove_gone_engines(engine_config, config.data_dir)
        return engine_config

    create_engine_config._memos_original = original  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def connector_config(existing: Any, config: MemosConfig) -> Any:
    """The connector's configuration, beside the user's own connector if there is one."""
    from vllm.config import KVTransferConfig

    extra = {"memos": config.model_dump(mode="json")}
    if existing is None:
        return KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_connector_module_path=CONNECTOR_MODULE,
            kv_role="kv_both",
            # vLLM's default fails the request when a load fails; ours is recomputed.
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=extra,
        )
    if CONNECTOR in str(existing.kv_connector_extra_config) or existing.kv_connector == CONNECTOR:
        return existing  # called twice
    ours = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    _check_combines(existing)
    theirs = {field.name: getattr(existing, field.name) for field in dataclasses.fields(existing)}
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": [ours, theirs]},
    )


def _check_combines(existing: Any) -> None:
    """Refuses a connector that greets its workers as ours does: vLLM passes on one greeting only."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    connector = KVConnectorFactory.get_connector_class(existing)
    if connector.get_handshake_metadata is not KVConnectorBase_V1.get_handshake_metadata:
        raise SystemExit(
            f"memos: --plugin memos cannot run beside the KV connector {existing.kv_connector}; "
            "leave out one of the two"
        )
