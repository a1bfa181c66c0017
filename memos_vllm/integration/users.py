"""REST for the operator: who has memories here, how much, and when he was last there. Never what they say."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import Request

from memos_vllm.errors import Forbidden
from memos_vllm.integration.rest import answers_errors, operator, router_at
from memos_vllm.integration.state import state_of

router = router_at("/v1/memos")


@router.get("/users")
@answers_errors
async def users(raw_request: Request, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Any:
    """Users who have memories, page by page; without ``tenant`` all that the key may see."""
    state = state_of(raw_request)
    allowed = operator(raw_request, state).tenant
    if allowed is not None and tenant not in (None, allowed):
        raise Forbidden(f"this key is an operator's of its own tenant; for {tenant!r} use one with 'operator: all'")
    read = partial(state.service.users, tenant=allowed or tenant, limit=limit, after=after)
    page = await asyncio.to_thread(read)
    data = [
        {
            "tenant": who.tenant,
            "user": who.user,
            **held.as_json(),
            "last_used_at": None if held.last_used_at is None else held.last_used_at.isoformat(),
        }
        for who, held in page.users
    ]
    return {"object": "list", "data": data, "next": page.next}
