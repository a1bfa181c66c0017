"""REST for scenes: an application tells what it knows about what comes next, and sees what is ready."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from memos_vllm.core import scenes as core
from memos_vllm.integration import engine_channel
from memos_vllm.integration.rest import Body, answers_errors, parse_body, principal
from memos_vllm.integration.state import MemosState, state_of

router = APIRouter(prefix="/v1/scenes", tags=["Memos"])


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


@router.post("")
@answers_errors
async def hint(raw_request: Request) -> Any:
    """Takes a hint and starts what follows from it; does not wait for copies."""
    state = state_of(raw_request)
    body: HintBody = await parse_body(raw_request, HintBody)
    who = principal(raw_request, state, body.user)
    named_id = state.planner.scene_id(who, body.session)
    scene_id = state.planner.hinted_id(who, body.session)
    event: core.Event
    match body.event:
        case Hint.OPEN:
            event = core.SessionOpened(scene_id)
        case Hint.TYPING:
            event = core.Typing(scene_id)
        case Hint.WILL_USE:
            event = core.WillUse(scene_id, in_s=body.in_s or 0.0)
        case Hint.TOOL_RUNNING:
            event = core.ToolRunning(scene_id, expected_s=body.in_s)
        case Hint.CLOSED:
            event = core.Closed(named_id)
    state.planner.observe(event)
    return {"scene": named_id, "accepted": state.planner.enabled}


@router.get("")
@answers_errors
async def status(raw_request: Request, session: str | None = None, user: str | None = None) -> Any:
    """Where a scene's KV is, and why it is expected, if it is; the same of the user's next session."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    named = await _describe(state, state.planner.scene_id(who, session))
    return {**named, "next_session": await _describe(state, state.planner.start_id(who))}


async def _describe(state: MemosState, scene_id: str) -> dict[str, Any]:
    replies = await engine_channel.call(state.engine, "scene", {"scene": scene_id})
    known = max(replies, key=lambda reply: reply.get("blocks", 0))
    return {"scene": scene_id, **known, "prediction": state.planner.explain(scene_id)}
