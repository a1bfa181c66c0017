"""Routes for the operator: what the server does; and, in vLLM's development mode, emptying its tiers.

Where ``identity.keys`` lists an operator of all tenants, what concerns the whole server is for him alone. Where none
is listed, the server is one person's, or keeps nobody apart in this: counts are for everybody, as on ``/metrics``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from memos_vllm.errors import Forbidden, RequestError, StoreError
from memos_vllm.integration import engine_channel
from memos_vllm.integration.rest import answers_errors, error_response, operator, principal, router_at
from memos_vllm.integration.state import MemosState, state_of
from memos_vllm.integration.summary import summarize
from memos_vllm.integration.usage import usage_of
from memos_vllm.types import Principal

router = router_at("/v1/memos")
development_router = router_at("/v1/memos")


@router.get("/status")
@answers_errors
async def status(raw_request: Request, user: str | None = None) -> Any:
    """For the operator all; with several data-parallel engines, ``engines`` has one entry each.

    Others are told of the sources that serve them; of the rest nothing but what they have themselves, where an
    operator is listed.

    ``summary`` is of all engines together, since their start; null while activation memory is off. While the
    database cannot be reached, ``memory`` has an ``error`` in the place of its counts.
    """
    state = state_of(raw_request)
    is_operator = _is_operator(raw_request, state)
    who = _caller(raw_request, state, user)
    sources = state.sources.status(who, all=is_operator)
    if state.config.identity.has_operator and not is_operator:
        return {"memory": None if who is None else await _or_error(usage_of(state, who)), "sources": sources}
    engines = await engine_channel.call(state.engine, "status")
    memory = await _or_error(asyncio.to_thread(state.service.stats))
    accounts = [engine.pop("accounting") for engine in engines if engine["enabled"]]
    summary = summarize(accounts) if accounts else None
    build = await state.builder.status()
    adapters = await state.adapters.status()
    refiner = state.refiner.status() if state.refiner is not None else {"enabled": False}
    parts = {"memory": memory, "build": build, "refiner": refiner, "adapters": adapters, "sources": sources}
    return {"summary": summary, "kv": engines[0], "engines": engines, **parts}


def _is_operator(raw_request: Request, state: MemosState) -> bool:
    """Of the whole server."""
    try:
        return operator(raw_request, state).tenant is None
    except RequestError:
        return False


def _caller(raw_request: Request, state: MemosState, user: str | None) -> Principal | None:
    """None where the request has no identity and claims none."""
    try:
        return principal(raw_request, state, user)
    except RequestError:
        if user is not None:
            raise
        return None


async def _or_error(counts: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The rest is most wanted when the store is away."""
    try:
        return dict(await counts)
    except StoreError as error:
        return {"error": str(error)}


@development_router.post("/kv/drop")
async def drop(raw_request: Request, tier: str) -> Any:
    """Empties a tier, as a benchmark needs it: ``gpu`` (vLLM's prefix cache) or ``host``."""
    state = state_of(raw_request)
    if state.config.identity.has_operator and not _is_operator(raw_request, state):
        return error_response(Forbidden("emptying a tier is for operators of all tenants; send such a key"))
    if tier == "gpu":
        dropped = await state.engine.reset_prefix_cache()
        return JSONResponse({"tier": tier, "dropped": bool(dropped)}, status_code=200 if dropped else 409)
    if tier == "host":
        await engine_channel.call(state.engine, "drop_host")
        return {"tier": tier, "dropped": True}
    return error_response(RequestError(f"'tier' must be gpu or host, not {tier[:100]!r}"))
