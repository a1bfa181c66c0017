"""REST for the life of memories: MemCubes, logs, merges, links, snapshots. One user sees only his own."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import Field

from memos_vllm.integration.rest import Body, answers_errors, parse_body, principal, router_at, takes
from memos_vllm.integration.state import state_of

router = router_at("/v1/memories")


class MergeBody(Body):
    others: list[str] = Field(alias="with")
    text: str | None = None


class LinkBody(Body):
    to: str
    type: str
    valid_from: str | None = None
    valid_to: str | None = None
    origin: dict[str, Any] = {}


class SnapshotBody(Body):
    name: str


@router.get("/snapshots")
@answers_errors
async def snapshots(raw_request: Request, user: str | None = None) -> Any:
    state = state_of(raw_request)
    found = await asyncio.to_thread(state.service.life.snapshots, principal(raw_request, state, user))
    return {"object": "list", "data": [snapshot.as_json() for snapshot in found]}


@router.post("/snapshots", openapi_extra=takes(SnapshotBody))
@answers_errors
async def take_snapshot(raw_request: Request) -> Any:
    state = state_of(raw_request)
    body: SnapshotBody = await parse_body(raw_request, SnapshotBody)
    who = principal(raw_request, state, body.user)
    await state.wait_for_writes(who)
    return (await asyncio.to_thread(state.service.life.take_snapshot, who, body.name)).as_json()


@router.delete("/snapshots/{snapshot_id}")
@answers_errors
async def remove_snapshot(raw_request: Request, snapshot_id: str, user: str | None = None) -> Any:
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    snapshot = await asyncio.to_thread(state.service.life.remove_snapshot, who, snapshot_id)
    return {"deleted": True, **snapshot.as_json()}


@router.post("/snapshots/{snapshot_id}/rollback")
@answers_errors
async def roll_back(raw_request: Request, snapshot_id: str, user: str | None = None) -> Any:
    """Everything as it was then. What was said since is archived; nothing is lost."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    await state.wait_for_writes(who)
    done = await asyncio.to_thread(state.service.life.roll_back, who, snapshot_id)
    adapters = await state.withdraw_adapters(who)
    return {**done.as_json(), "kv": await state.forget_kv(who), "adapters": adapters}


@router.get("/{memory_id}/cube")
@answers_errors
async def cube(raw_request: Request, memory_id: str, user: str | None = None) -> Any:
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    found = await asyncio.to_thread(state.service.life.cube, who, memory_id)
    found["payload"]["adapters"] = await asyncio.to_thread(state.adapters.registry.distilled_from, who, memory_id)
    return found


@router.get("/{memory_id}/history")
@answers_errors
async def history(raw_request: Request, memory_id: str, user: str | None = None) -> Any:
    """What became this memory: what it superseded or took over, its earlier versions, itself."""
    state = state_of(raw_request)
    found = await asyncio.to_thread(state.service.history, principal(raw_request, state, user), memory_id)
    return {"object": "list", "data": [record.as_json() for record in found]}


@router.get("/{memory_id}/log")
@answers_errors
async def log(raw_request: Request, memory_id: str, user: str | None = None) -> Any:
    state = state_of(raw_request)
    events = await asyncio.to_thread(state.service.life.events, principal(raw_request, state, user), memory_id)
    return {"object": "list", "data": [event.as_json() for event in events]}


@router.post("/{memory_id}/merge", openapi_extra=takes(MergeBody))
@answers_errors
async def merge(raw_request: Request, memory_id: str) -> Any:
    state = state_of(raw_request)
    body: MergeBody = await parse_body(raw_request, MergeBody)
    who = principal(raw_request, state, body.user)
    record = await asyncio.to_thread(state.service.life.merge, who, memory_id, body.others, body.text)
    await state.forget_kv(who)
    return record.as_json()


@router.get("/{memory_id}/links")
@answers_errors
async def links(
    raw_request: Request, memory_id: str, user: str | None = None, at: str | None = None, type: str | None = None
) -> Any:
    """From the memory and to it; with ``at`` those that are true at that time."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    found = await asyncio.to_thread(partial(state.service.life.links, who, memory_id, at=at, type=type))
    return {"object": "list", "data": [link.as_json() for link in found]}


@router.post("/{memory_id}/links", openapi_extra=takes(LinkBody))
@answers_errors
async def link(raw_request: Request, memory_id: str) -> Any:
    state = state_of(raw_request)
    body: LinkBody = await parse_body(raw_request, LinkBody)
    who = principal(raw_request, state, body.user)
    options = body.model_dump(include={"valid_from", "valid_to", "origin"})
    made = await asyncio.to_thread(partial(state.service.life.link, who, memory_id, body.to, body.type, **options))
    return made.as_json()


@router.post("/links/{link_id}/end")
@answers_errors
async def end_link(raw_request: Request, link_id: str, user: str | None = None) -> Any:
    """From now on it is not true; it stays readable."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    return (await asyncio.to_thread(state.service.life.end_link, who, link_id)).as_json()


@router.delete("/links/{link_id}")
@answers_errors
async def remove_link(raw_request: Request, link_id: str, user: str | None = None) -> Any:
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    ended = await asyncio.to_thread(partial(state.service.life.end_link, who, link_id, remove=True))
    return {"deleted": True, **ended.as_json()}
