"""Routes for the operator: what the tiers hold; and, in vLLM's development mode, emptying them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from memos_vllm.errors import RequestError, StoreError
from memos_vllm.integration import engine_channel
from memos_vllm.integration.rest import answers_errors, principal
from memos_vllm.integration.state import MemosState, state_of
from memos_vllm.integration.summary import summarize
from memos_vllm.types import Principal

router = APIRouter(prefix="/v1/memos", tags=["Memos"])
development_router = APIRouter(prefix="/v1/memos", tags=["Memos"])


@router.get("/status")
@answers_errors
async def status(raw_request: Request, user: str | None = None) -> Any:
    """Counts, for everybody; with several data-parallel engines, ``engines`` has one entry each.

    Which files of a folder cannot be read is told to users whom it serves.

    ``summary`` is of all engines together, since their start; null while activation memory is off. While the
    database cannot be reached, ``memory`` has an ``error`` in the place of its counts.
    """
    state = state_of(raw_request)
    who = _caller(raw_request, state, user)
    engines = await engine_channel.call(state.engine, "status")
    memory = await _memory(state)
    accounts = [engine.pop("accounting") for engine in engines if engine["enabled"]]
    summary = summarize(accounts) if accounts else None
    build = await state.builder.status()
    adapters = await state.adapters.status()
    refiner = state.refiner.status() if state.refiner is not None else {"enabled": False}
    sources = state.sources.status(who)
    parts = {"memory": memory, "build": build, "refiner": refiner, "adapters": adapters, "sources": sources}
    return {"summary": summary, "kv": engines[0], "engines": engines, **parts}


def _caller(raw_request: Request, state: MemosState, user: str | None) -> Principal | None:
    """None where the request has no identity and claims none."""
    try:
        return principal(raw_request, state, user)
    except RequestError:
        if user is not None:
            raise
        return None


async def _memory(state: MemosState) -> dict[str, Any]:
    """The rest is most wanted when the store is away."""
    try:
        return dict(await asyncio.to_thread(state.service.stats))
    except StoreError as error:
        return {"error": str(error)}


@development_router.post("/kv/drop")
async def drop(raw_request: Request, tier: str) -> Any:
    """Empties a tier, as a benchmark needs it: ``gpu`` (vLLM's prefix cache) or ``host``."""
    state = state_of(raw_request)
    if tier == "gpu":
        dropped = await state.engine.reset_prefix_cache()
        return JSONResponse({"tier": tier, "dropped": bool(dropped)}, status_code=200 if dropped else 409)
    if tier == "host":
        await engine_channel.call(state.engine, "drop_host")
        return {"tier": tier, "dropped": True}
    return JSONResponse({"error": {"message": "tier must be gpu or host", "code": 400}}, status_code=400)
