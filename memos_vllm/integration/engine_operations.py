"""What the API processes ask of the engine; runs between two of its steps (``engine_channel``)."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from memos_vllm.integration import salts
from memos_vllm.integration.activation_memory import ActivationMemory
from memos_vllm.integration.scene_builds import SceneBuilds
from memos_vllm.store.ops import Op

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

Reply = dict[str, Any] | Future[dict[str, Any]]
"""vLLM waits for a future without holding up the engine."""

OFF = {"enabled": False}


def serve(
    memory: ActivationMemory, op: str, payload: dict[str, Any], engine: EngineCore | None = None
) -> tuple[Reply, list[Op]]:
    """The reply, and the copies that follow from it.

    Args:
        engine: the caller; ``declare`` hashes with its hasher.

    Raises:
        ValueError: there is no such operation.
    """
    memory.accounting.changed()
    match op:
        case "status":
            return memory.status(), []
        case "drop_host":
            memory.tiers.drop_host()
            return memory.status(), []
        case "forget":
            return memory.forget(salts.tag(payload["salt"])), []
        case "forget_adapter":
            return memory.forget(salts.adapter_tag(payload["lora_name"])), []
        case "expect":
            operations = memory.expect(payload["planner"], payload["scenes"], payload.get("busy", ()))
            return memory.guarded(lambda table: {"enabled": True, "blocks": table.expected_blocks()}, OFF), operations
        case "scene":
            return memory.guarded(lambda table: {"enabled": True, **table.state(payload["scene"])}, OFF), []
        case "declare" if memory.builds is None:
            return OFF, []
        case "declare":
            assert engine is not None
            return _declare(memory, engine, **payload), []
        case "build":
            return memory.building(lambda builds: _claim(builds, **payload), OFF), []
        case "give_up_builds":
            memory.building(lambda builds: builds.give_up(salts.adapter_tag(payload["lora_name"])), None)
            return {"enabled": memory.builds is not None}, []
    raise ValueError(f"unknown operation {op!r}")


def _claim(builds: SceneBuilds, planner: str, piece_tokens: int, declared: list[str]) -> Reply:
    """See ``SceneBuilds.claim``."""
    return {"enabled": True, "unknown": builds.unknown(declared), **builds.claim(planner, piece_tokens)}


def _declare(
    memory: ActivationMemory,
    engine: EngineCore,
    scene: str,
    token_ids: list[int],
    salt: str,
    lora: dict[str, Any] | None,
) -> dict[str, Any]:
    """A prefix that no request has had yet is a scene from now on; ``blocks`` 0 if it cannot be one.

    Args:
        lora: arguments of the ``LoRARequest`` that it is to be computed with.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    adapter = LoRARequest(**lora) if lora else None
    request = Request(
        f"memos-declare-{scene}",
        token_ids,
        SamplingParams(max_tokens=1),
        None,
        lora_request=adapter,
        cache_salt=salt,
        block_hasher=engine.request_block_hasher,
    )
    tag, keys = memory.names.tag(request), memory.names.of(request.block_hashes, adapter)
    if tag is None or keys is None or memory.tiers.is_forgotten(tag):
        return {"enabled": True, "blocks": 0}
    memory.register(scene, request, keys)
    return {"enabled": True, "blocks": len(keys)}
