"""From an API process to the engine's loop and back, over vLLM's own utility calls.

A utility call names an attribute of EngineCore and runs between two steps, so the callee needs no
lock. Any call wakes an idle engine.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.v1.engine.core import EngineCore

_METHOD = "memos"
Handler = Callable[[str, dict[str, Any], "EngineCore"], dict[str, Any] | Future[dict[str, Any]]]


def serve(handler: Handler) -> None:
    """Makes ``handler`` reachable in this process, which is the engine's."""
    from vllm.v1.engine.core import EngineCore

    def memos(self: Any, op: str, payload: dict) -> Any:  # vLLM converts arguments by annotation
        return handler(op, payload, self)

    setattr(EngineCore, _METHOD, memos)


async def call(engine_client: EngineClient, op: str, payload: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Runs an operation on every engine (one per data-parallel rank); one reply each."""
    core = engine_client.engine_core  # type: ignore[attr-defined]
    if len(getattr(core, "core_engines", ())) > 1:
        return list(await core.call_utility_all_async(_METHOD, op, payload or {}))
    return [await core.call_utility_async(_METHOD, op, payload or {})]
