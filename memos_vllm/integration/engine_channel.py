"""From an API process to the engine's loop and back, over vLLM's own utility calls.

A utility call names an attribute of EngineCore and runs between two steps, so the callee needs no
lock. Any call wakes an idle engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
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


def num_engines(engine_client: EngineClient) -> int:
    """How many data-parallel engines this API process sends requests to."""
    return max(1, len(_engines(engine_client)))


async def call(engine_client: EngineClient, op: str, payload: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Runs an operation on every engine (one per data-parallel rank); one reply each."""
    ranks = range(num_engines(engine_client))
    return list(await asyncio.gather(*(call_one(engine_client, rank, op, payload) for rank in ranks)))


async def call_one(
    engine_client: EngineClient, rank: int, op: str, payload: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Runs an operation on one engine.

    Args:
        rank: of the engine, from 0 on, among those that this process sends requests to.
    """
    core = engine_client.engine_core  # type: ignore[attr-defined]
    engines = _engines(engine_client)
    if len(engines) > 1:
        return await core._call_utility_async(_METHOD, op, payload or {}, engine=engines[rank])
    return await core.call_utility_async(_METHOD, op, payload or {})


def _engines(engine_client: EngineClient) -> Sequence[Any]:
    return getattr(engine_client.engine_core, "core_engines", ())  # type: ignore[attr-defined]
