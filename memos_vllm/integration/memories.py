"""REST for memories: add, list, read, change, delete, search. One user sees only his own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from memos_vllm.errors import RequestError
from memos_vllm.integration.distillation_jobs import DistillationJobs
from memos_vllm.integration.rest import (
    Body,
    answering,
    answers_errors,
    parse_body,
    principal,
    refuse_body,
    router_at,
    takes,
)
from memos_vllm.integration.state import MemosState, state_of
from memos_vllm.memory.inputs import CHANGEABLE, MAX_CONTEXT, MAX_NAME_CHARS
from memos_vllm.memory.results import Hit
from memos_vllm.types import Principal

router = router_at("/v1/memories")


class NewMemory(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    type: str = "fact"
    pinned: bool = False
    tags: list[str] = []
    session: str | None = None
    priority: int = 0
    sensitivity: str = "normal"
    valid_from: str | None = None
    ttl_s: float | None = None
    speaker: str | None = Field(default=None, min_length=1, max_length=MAX_NAME_CHARS)
    """Who said it, where that is not the user; found as a word of the memory is."""

    cube: str | None = Field(default=None, min_length=1, max_length=MAX_NAME_CHARS)
    """A collection that search can be kept to."""


class AddBody(NewMemory, Body):
    """One memory, or ``memories``."""

    text: str | None = None  # type: ignore[assignment]
    memories: list[NewMemory] | None = None


class UpdateBody(Body):
    text: str | None = None
    type: str | None = None
    pinned: bool | None = None
    tags: list[str] | None = None
    priority: int | None = None
    sensitivity: str | None = None
    valid_from: str | None = None
    ttl_s: float | None = None
    """From now; 0 for ever."""

    state: str | None = None
    """``activated``, ``archived`` or ``frozen``; stands alone."""


class SearchBody(Body):
    query: str
    top_k: int | None = Field(default=None, ge=1, le=1000)
    type: str | None = None
    tag: str | None = None
    tags: list[str] = []
    session: str | None = None
    cube: str | None = None
    said_from: AwareDatetime | None = Field(default=None, strict=False)
    said_before: AwareDatetime | None = Field(default=None, strict=False)
    include_archived: bool = False
    context: int = Field(default=0, ge=0, le=MAX_CONTEXT)
    """How many memories before and after each hit, in its conversation, come with it."""

    max_tokens: int | None = Field(default=None, ge=0)
    """The hits that fit into it."""


@router.post("", openapi_extra=takes(AddBody))
@answers_errors
async def add(raw_request: Request) -> Any:
    """One memory, or with ``memories`` a list of them, which is stored as a whole or not at all."""
    state = state_of(raw_request)
    body: AddBody = await parse_body(raw_request, AddBody)
    who = principal(raw_request, state, body.user)
    if body.memories is None:
        if body.text is None:
            raise RequestError("'text' is missing; give a text, or 'memories' with a list of memories")
        record = await asyncio.to_thread(state.service.add, who, **_values(body))
        state.metrics.stored("api")
        return record.as_json()
    if beside := body.model_fields_set - {"memories", "user"}:
        raise RequestError(f"'{min(beside)}' stands beside 'memories'; put it into each of them")
    records = await asyncio.to_thread(state.service.add_many, who, [_values(memory) for memory in body.memories])
    state.metrics.stored("api", len(records))
    return {"object": "list", "data": [record.as_json() for record in records]}


def _values(memory: NewMemory) -> dict[str, Any]:
    values = memory.model_dump(include=set(NewMemory.model_fields))
    said = {name: value for name in ("speaker", "cube") if (value := values.pop(name)) is not None}
    return {**values, "origin": {"source": "api", **said}}


@router.get("")
@answers_errors
async def list_memories(
    raw_request: Request,
    user: str | None = None,
    limit: int = 100,
    after: str | None = None,
    type: str | None = None,
    tag: str | None = None,
    session: str | None = None,
    state: str | None = None,
    include_superseded: bool = False,
) -> Any:
    """Memories that are current; by their ``state`` merged and expired ones; all with ``include_superseded``."""
    memos = state_of(raw_request)
    who = principal(raw_request, memos, user)
    await memos.wait_for_writes(who)
    filters = {"type": type, "tag": tag, "session": session, "state": state, "include_superseded": include_superseded}
    page = await asyncio.to_thread(partial(memos.service.list, who, limit=limit, after=after, **filters))
    return {"object": "list", "data": [record.as_json() for record in page.records], "next": page.next}


@router.post("/search", openapi_extra=takes(SearchBody))
@answers_errors
async def search(raw_request: Request) -> Any:
    state = state_of(raw_request)
    body: SearchBody = await parse_body(raw_request, SearchBody)
    who = principal(raw_request, state, body.user)
    await state.wait_for_writes(who)
    wanted = body.model_dump(exclude={"user", "query"})
    hits = await asyncio.to_thread(partial(state.service.search, who, body.query, **wanted))
    state.metrics.searched()
    return {"object": "list", "data": [_hit_as_json(hit) for hit in hits]}


def _hit_as_json(hit: Hit) -> dict[str, Any]:
    context = {"before": hit.before, "after": hit.after} if hit.before or hit.after else {}
    return {
        "score": hit.score,
        "why": hit.why,
        **hit.record.as_json(),
        **{side: [record.as_json() for record in records] for side, records in context.items()},
    }


@router.get("/{memory_id}")
@answers_errors
async def get(raw_request: Request, memory_id: str, user: str | None = None) -> Any:
    state = state_of(raw_request)
    record = await asyncio.to_thread(state.service.get, principal(raw_request, state, user), memory_id)
    return record.as_json()


@router.patch("/{memory_id}", openapi_extra=takes(UpdateBody))
@answers_errors
async def update(raw_request: Request, memory_id: str) -> Any:
    state = state_of(raw_request)
    body: UpdateBody = await parse_body(raw_request, UpdateBody)
    who = principal(raw_request, state, body.user)
    changes = {name: getattr(body, name) for name in body.model_fields_set - {"user"}}
    if not changes:
        raise RequestError(f"nothing to change: give {', '.join(CHANGEABLE)} or state")
    if "state" in changes and len(changes) > 1:
        raise RequestError("'state' stands alone; change the rest in another request")
    if body.state is not None:
        record = await asyncio.to_thread(state.service.life.set_state, who, memory_id, body.state)
    else:
        record = await asyncio.to_thread(partial(state.service.update, who, memory_id, **changes))
        await state.forget_kv(who)
    return record.as_json()


@router.delete("/{memory_id}")
@answers_errors
async def delete(raw_request: Request, memory_id: str, user: str | None = None) -> Any:
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    return await forget(state, who, state.service.delete, who, memory_id)


_INSTEAD = "it removes everything that the user has; to delete some, list them with GET and delete each by its id"


@router.delete("")
@answering(instead=_INSTEAD)
async def delete_all(raw_request: Request, user: str | None = None, adapters: bool = False) -> Any:
    """Removes all that was said and what was made of it; with ``adapters`` also what the user has uploaded."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    await refuse_body(raw_request, f"{_INSTEAD}; ?user= names the user")
    state.ballast.lend(state.planner.forget, who)
    state.builder.forget(who)
    await asyncio.to_thread(DistillationJobs(state.config.data_dir).remove_all, who)
    receipt = await forget(state, who, state.service.delete_all, who)
    if adapters:
        removed = await asyncio.to_thread(state.adapters.registry.delete_all, who)
        receipt["own_adapters"] = {**removed.as_json(), **await state.adapters.remove(removed)}
    return {**receipt, "left": await asyncio.to_thread(_left, state, who)}


def _left(state: MemosState, who: Principal) -> dict[str, Any] | None:
    """What the user still has here."""
    registry = state.adapters.registry
    owned = [each for each in registry.list(who) if each.owner == who]
    default = registry.profile(who)
    if not owned and default is None:
        return None
    references = [f"{each.name}@{version.version}" for each in owned for version in each.versions]
    return {"adapters": references, "default_adapter": default, "delete_with": "DELETE /v1/memories?adapters=true"}


async def forget(state: MemosState, who: Principal, remove: Callable[..., Any], *args: Any) -> Any:
    """Deletes, then removes the KV that may hold the deleted text; the receipt lists both."""
    await state.wait_for_writes(who)
    receipt = await asyncio.to_thread(state.ballast.lend, remove, *args)
    adapters = await state.withdraw_adapters(who)
    kv = await state.forget_kv(who)
    return {"deleted": True, **receipt.as_json(), "kv": kv, "adapters": adapters}
