"""REST: what a user has in the store of what he may have."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from memos_vllm.integration.rest import answers_errors, principal, router_at
from memos_vllm.integration.state import MemosState, state_of
from memos_vllm.types import Principal

router = router_at("/v1/memories")


@router.get("/usage")
@answers_errors
async def usage(raw_request: Request, user: str | None = None) -> Any:
    """Memories and bytes of the user's, with the limits; null where there is none."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    await state.wait_for_writes(who)
    return await usage_of(state, who)


async def usage_of(state: MemosState, who: Principal) -> dict[str, Any]:
    held = await asyncio.to_thread(state.service.holdings, who)
    return {**held.as_json(), **state.service.limits.as_json()}
