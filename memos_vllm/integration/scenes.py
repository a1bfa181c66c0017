"""REST for scenes: an application tells what it knows about what comes next, and sees what is ready."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Any

from fastapi import Request
from pydantic import Field

from memos_vllm.core import scenes as core
from memos_vllm.integration import engine_channel
from memos_vllm.integration.rest import Body, answers_errors, parse_body, principal, refuse_body, router_at, takes
from memos_vllm.integration.state import MemosState, state_of
from memos_vllm.types import Principal

router = router_at("/v1/scenes")


class Hint(StrEnum):
    OPEN = "open"
    TYPING = "typing"
    WILL_USE = "will_use"
    TOOL_RUNNING = "tool_running"
    CLOSED = "closed"


class HintBody(Body):
    """What an application knows about a session: it was opened, its user types, it will be used."""

    event: Hint = Field(strict=False)
    session: str | None = Field(default=None, min_length=1, max_length=256)
    in_s: float | None = Field(default=None, ge=0, le=7 * 86400)
    """In how many seconds; for ``will_use`` and ``tool_running``."""

    adapter: str | None = Field(default=None, min_length=1, max_length=128)
    """That the coming request will name; absent: what the last one had, or the user's default."""


@router.post("", openapi_extra=takes(HintBody))
@answers_errors
async def hint(raw_request: Request) -> Any:
    """Takes a hint and starts what follows from it; does not wait for copies."""
    state = state_of(raw_request)
    body: HintBody = await parse_body(raw_request, HintBody)
    who = principal(raw_request, state, body.user)
    named_id = state.planner.scene_id(who, body.session)
    scene_ids = {state.planner.hinted_id(who, body.session)}
    if await state.adapters.expected.hint(named_id, who, body.adapter):
        state.planner.know(named_id, who)  # the first request of a session has an adapter, if no KV yet
        scene_ids.add(named_id)
    if body.event is Hint.CLOSED:
        scene_ids = {named_id}
    for scene_id in sorted(scene_ids):
        state.planner.observe(_event(body, scene_id))
    return {"scene": named_id, "accepted": state.planner.enabled}


def _event(body: HintBody, scene_id: str) -> core.Event:
    match body.event:
        case Hint.OPEN:
            return core.SessionOpened(scene_id)
        case Hint.TYPING:
            return core.Typing(scene_id)
        case Hint.WILL_USE:
            return core.WillUse(scene_id, in_s=body.in_s or 0.0)
        case Hint.TOOL_RUNNING:
            return core.ToolRunning(scene_id, expected_s=body.in_s)
        case Hint.CLOSED:
            return core.Closed(scene_id)


@router.get("")
@answers_errors
async def status(raw_request: Request, session: str | None = None, user: str | None = None) -> Any:
    """Where a scene's KV is, whether its adapter is loaded, and why it is expected; the same of the next session."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    named = await _describe(state, who, state.planner.scene_id(who, session))
    return {**named, "next_session": await _describe(state, who, state.planner.start_id(who))}


@router.delete("")
@answers_errors
async def drop(raw_request: Request, user: str | None = None) -> Any:
    """Activation to plaintext: removes a user's KV from every tier; texts and adapters stay.

    What is asked for is computed again, and what is expected again is built again.
    """
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    await refuse_body(raw_request, "it drops all of the user's KV, and ?user= names the user")
    await state.wait_for_writes(who)
    await asyncio.to_thread(state.service.drop_kv, who)
    return {"dropped": True, "kv": await state.forget_kv(who)}


async def _describe(state: MemosState, who: Principal, scene_id: str) -> dict[str, Any]:
    replies = await engine_channel.call(state.engine, "scene", {"scene": scene_id})
    known = max(replies, key=lambda reply: reply.get("blocks", 0))
    adapter = await state.adapters.expected.next_adapter(scene_id, who)
    return {"scene": scene_id, **known, "next_adapter": adapter, "prediction": state.planner.explain(scene_id)}
