"""The chat endpoint: recall before, remember after, vLLM's own endpoint in between.

A request without memory is handed to vLLM as it came. One with memory gets the user's memory in its
messages and the user's salt; everything else (templates, tools, streaming, errors) stays vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.background import BackgroundTask, BackgroundTasks
from vllm.entrypoints.openai.chat_completion import api_router as stock
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from memos_vllm.errors import LimitReached, MemosError, RequestError
from memos_vllm.integration import identity, memory_default, salts
from memos_vllm.integration.adapter_gate import Choice
from memos_vllm.integration.fitting import Prompt
from memos_vllm.integration.lengths import Lengths
from memos_vllm.integration.refiner import REFINE_PARAM
from memos_vllm.integration.rest import error_response
from memos_vllm.integration.scene_builds import BUILD_PARAM
from memos_vllm.integration.scene_table import SCENE_PARAM, START_PARAM
from memos_vllm.integration.session_start import SessionStart, start_of
from memos_vllm.integration.state import MemosState, state_of
from memos_vllm.memory.assembly import DEFAULT_FORMAT, Message, PromptFormat, assemble
from memos_vllm.memory.messages import last_user_text
from memos_vllm.memory.recall import with_sources
from memos_vllm.memory.results import Recall
from memos_vllm.memory.sources.gathering import Gathering
from memos_vllm.types import Principal

logger = logging.getLogger(__name__)
router = APIRouter()

RECALLED_HEADER = "x-memos-recalled"
ADAPTER_HEADER = "x-memos-adapter"
_MAX_HEADER_IDS = 50
"""A proxy refuses long headers; ``explain`` tells all."""
_END_OF_STREAM = "data: [DONE]"


class MemosField(BaseModel):
    """The ``memos`` field of a chat request. ``true`` and ``false`` stand for all defaults and off."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user: str | None = None
    """Which of an application's users; refused where the API key stands for one user."""

    session: str | None = Field(default=None, min_length=1, max_length=256)
    """Keeps the long-lived memory, hence the prompt's prefix, unchanged over the session's turns."""

    recall: bool = True
    remember: bool = True
    top_k: int | None = Field(default=None, ge=1, le=1000)
    sources: bool = True
    """Whether outside sources are asked, where the server has any."""

    adapter: str | None = Field(default=None, min_length=1, max_length=128)
    """Parametric memory for this request, ``name`` or ``name@version``; absent: the user's default."""

    explain: bool = False
    """Adds what was recalled, and why, to the response (not to a stream)."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One chat request with memory."""

    who: Principal
    options: MemosField
    messages: list[dict[str, Any]]
    """As the client sent them."""

    tools: list[dict[str, Any]]
    request_id: str
    """Provenance of what is remembered; the id of the completion ends with it."""

    as_of: tuple[int, int] | None = None
    """``MemoryService.memory_version`` when the request came: if all is deleted later, the turn is not remembered."""

    @property
    def starts_conversation(self) -> bool:
        return all(message.get("role") != "assistant" for message in self.messages)


@router.post(
    "/v1/chat/completions",
    dependencies=[Depends(validate_json_request)],
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Response:
    state = state_of(raw_request)
    try:
        turn = read_turn(request, raw_request, state)
        if turn is None:
            return await stock.create_chat_completion(request, raw_request)
        state.homes.route(raw_request, turn.who)
        start = next_start(turn, request, raw_request, state)
        turn, (recall, salt) = await asyncio.gather(begin(turn, state), recall_for(turn, state))
        serving = raw_request.app.state.openai_serving_chat
        adapter = await state.adapters.use(turn.who, turn.options.adapter, serving, request.model, recall.long_lived)
    except MemosError as error:
        return error_response(error)
    with ExitStack() as cleanup:
        if adapter is not None:
            cleanup.callback(adapter.close)
        prompt = add_memory(turn, request, recall, salt, adapter, state.prompt_format)
        scene_id = announce_turn(turn, start, adapter, request, state)
        response = None
        try:
            with prompt.active(serving), adapter.active() if adapter is not None else nullcontext():
                response = await stock.create_chat_completion(request, raw_request)
        finally:
            if response is None or response.status_code != 200:  # an error, or the client is gone
                state.planner.turn_ended(scene_id)
        if response is None or response.status_code != 200:
            return response
        if isinstance(response, StreamingResponse):
            response.body_iterator = _closing(response.body_iterator, cleanup.pop_all())
    return finish_turn(turn, prompt, adapter, scene_id, response, state)


def announce_turn(
    turn: Turn, start: SessionStart | None, adapter: Choice | None, request: ChatCompletionRequest, state: MemosState
) -> str:
    """Tells planner, gate and builder of the turn, and the engine by the request; returns its scene."""
    starts_session = start is not None and turn.starts_conversation
    scene_id = state.planner.turn_started(turn.who, turn.options.session, starts_session=starts_session)
    state.adapters.expected.expect(scene_id, turn.who, None if adapter is None else adapter.reference)
    request.kv_transfer_params = {**(request.kv_transfer_params or {}), SCENE_PARAM: scene_id}
    if start is not None:
        request.kv_transfer_params[START_PARAM] = start.scene_id
        state.builder.turn_seen(start)
    return scene_id


async def _closing(chunks: AsyncIterator[Any], cleanup: ExitStack) -> AsyncIterator[Any]:
    """Cleans up when the stream ends or is dropped."""
    with cleanup:
        async for chunk in chunks:
            yield chunk


def read_turn(request: ChatCompletionRequest, raw_request: Request, state: MemosState) -> Turn | None:
    """What the request wants of memory; None if nothing. Takes our field out of the request.

    Raises:
        RequestError: a ``memos`` field of the wrong shape, or no right to what it asks for.
    """
    salts.check_client_salt(request.cache_salt)
    if request.kv_transfer_params:
        for ours in (SCENE_PARAM, START_PARAM, BUILD_PARAM, REFINE_PARAM):
            request.kv_transfer_params.pop(ours, None)
    value = (request.model_extra or {}).pop("memos", None)
    options = parse_field(value)
    if options is None:
        if value is False or not memory_default.is_on(raw_request.headers, state):
            return None
        options = MemosField()
    who = identity.resolve(raw_request.headers, state.config.identity, options.user).principal
    if options.user is None:
        memory_default.warn_of_openai_user(who, request.user, state)
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    return Turn(who, options, [_as_dict(message) for message in request.messages], tools, request.request_id)


async def begin(turn: Turn, state: MemosState) -> Turn:
    if not turn.options.remember:
        return turn
    return replace(turn, as_of=await asyncio.to_thread(state.service.memory_version, turn.who))


def parse_field(value: Any) -> MemosField | None:
    """``memos`` of a request; None where it is absent, null or false."""
    if value is None or value is False:
        return None
    if value is True:
        return MemosField()
    shape = f"'memos' is true, false or an object with {', '.join(MemosField.model_fields)}"
    if not isinstance(value, dict):
        raise RequestError(f"{shape}, not {repr(value)[:100]}")
    try:
        return MemosField.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(["memos", *(str(part) for part in problem["loc"])])
        raise RequestError(f"'{where}': {problem['msg']}; {shape}") from error


def next_start(
    turn: Turn, request: ChatCompletionRequest, raw_request: Request, state: MemosState
) -> SessionStart | None:
    """What the turn shows of how the user's next session starts; None if that is not to be prepared."""
    serving = stock.chat(raw_request)
    if serving is None or not state.builder.enabled or not turn.options.recall:
        return None
    start_id = state.planner.start_id(turn.who)
    return start_of(turn.who, request, turn.messages, serving, start_id, turn.options.adapter)


async def recall_for(turn: Turn, state: MemosState) -> tuple[Recall, str]:
    """What memory and outside sources have for this turn, and the user's salt."""
    asked = None
    if turn.options.recall and turn.options.sources:  # they are searched while memory is recalled
        asked = state.sources.begin(turn.who, last_user_text(turn.messages))
    await state.wait_for_writes(turn.who)
    recall, salt = await asyncio.to_thread(_recall, turn, state)
    if asked is not None:
        recall = await _with_sources(recall, asked, state)
    return recall, salt


def add_memory(
    turn: Turn,
    request: ChatCompletionRequest,
    recall: Recall,
    salt: str,
    adapter: Choice | None,
    form: PromptFormat = DEFAULT_FORMAT,
) -> Prompt:
    """Puts memory into the request's messages and the user's salt into its cache key.

    Returns:
        What of the recall was put; the adapter may stand for the rest. Rendering puts less where there is no room.
    """
    told = recall if adapter is None else recall.without(adapter.instead_of)
    prompt = Prompt(request, recall, told, partial(messages_with, turn, form=form))
    prompt.put(told)
    request.cache_salt = salts.combine(salt, request.cache_salt)
    return prompt


def messages_with(turn: Turn, told: Recall, form: PromptFormat = DEFAULT_FORMAT) -> list[Message]:
    """The client's messages with memory in place. All are new: vLLM's renderer writes into what it renders."""
    return assemble(
        deepcopy(turn.messages),
        [record.text for record in told.long_lived],
        [hit.record.text for hit in told.late],
        [passage.quoted for passage in told.sources],
        form,
    )


def _recall(turn: Turn, state: MemosState) -> tuple[Recall, str]:
    # The salt first: a deletion in between then leaves KV under the old salt, never the reverse.
    salt = state.salt(turn.who)
    if not turn.options.recall:
        return Recall((), ()), salt
    with state.metrics.recalling():
        options = turn.options
        recall = state.service.recall(
            turn.who, turn.messages, session=options.session, top_k=options.top_k, count_left_out=options.explain
        )
    return recall, salt


async def _with_sources(recall: Recall, asked: Gathering, state: MemosState) -> Recall:
    with state.metrics.waiting_for_sources():
        gathered = await asked.finish()
    for reason in gathered.failures:
        state.metrics.source_failed(reason)
    late_tokens, share = state.config.memory.late_tokens, state.config.sources.share
    return with_sources(recall, gathered.passages, late_tokens, share, state.count_tokens)


def finish_turn(
    turn: Turn, prompt: Prompt, adapter: Choice | None, scene_id: str, response: Response, state: MemosState
) -> Response:
    """Says what was recalled; once the answer is out, has the turn remembered and the next one predicted."""
    if turn.options.explain and isinstance(response, JSONResponse):
        body = json.loads(bytes(response.body))
        body["memos"] = explain(turn, prompt.told, adapter, prompt.left_out)
        explained = JSONResponse(body, background=response.background)
        explained.headers.update({k: v for k, v in response.headers.items() if not k.startswith("content-")})
        response = explained
    state.recalls.count(prompt.recall.ids)
    state.metrics.recalled(prompt.told)
    response.headers[RECALLED_HEADER] = ",".join(prompt.told.ids[:_MAX_HEADER_IDS])
    if adapter is not None:
        response.headers[ADAPTER_HEADER] = adapter.header
    announced: list[asyncio.Future[None]] = []
    lengths = Lengths(prompt.num_tokens)
    if isinstance(response, StreamingResponse):
        response.body_iterator = lengths.count(response.body_iterator)
    else:
        lengths.read(bytes(response.body))
    if not turn.options.remember:
        pass
    elif isinstance(response, StreamingResponse):
        response.body_iterator = _announcing_end(response.body_iterator, turn.who, state, announced)
    else:
        announced.append(state.announce(turn.who))
    end = BackgroundTask(end_turn, turn, prompt.recall, scene_id, state, announced, lengths)
    response.background = BackgroundTasks([task for task in (response.background, end) if task])
    return response


async def _announcing_end(
    chunks: AsyncIterator[Any], who: Principal, state: MemosState, announced: list[asyncio.Future[None]]
) -> AsyncIterator[Any]:
    """The client sees the end of the stream before the turn is written; its next request waits."""
    async for chunk in chunks:
        if isinstance(chunk, str) and chunk.startswith(_END_OF_STREAM):
            announced.append(state.announce(who))
        yield chunk


async def end_turn(
    turn: Turn,
    recall: Recall,
    scene_id: str,
    state: MemosState,
    announced: list[asyncio.Future[None]],
    lengths: Lengths | None = None,
) -> None:
    """The answer is out: predicts what comes next, writes what the user said, and notes which memories were used.

    A write that fails, or that the user's limit does not allow, is logged and counted; nobody waits for it any more.
    """
    state.planner.turn_ended(scene_id, lengths)
    superseded = False
    try:
        if turn.options.remember:
            cause = {"session": turn.options.session, "request": turn.request_id}
            remember = partial(state.service.remember, **cause, tools=turn.tools, as_of=turn.as_of)
            records = await asyncio.to_thread(remember, turn.who, turn.messages)
            superseded = any(record.supersedes for record in records)
            # The others were known: their origin is the turn that told them first.
            state.metrics.stored("chat", sum(record.origin.get("request") == turn.request_id for record in records))
    except LimitReached as error:
        state.metrics.remember_limited()
        state.over_limit.tell(turn.who, error)
    except Exception as error:
        state.metrics.remember_failed()
        if not isinstance(error, MemosError):
            raise
        logger.error("a turn of %s was not remembered: %s", turn.who, error)
    finally:
        for done in announced:
            state.written(turn.who, done)
    used = {
        "long_lived": [record.id for record in recall.long_lived],
        "late": [hit.record.id for hit in recall.late],
    }
    standing = set(used["long_lived"]).difference(recall.answering)
    try:
        detail = {"standing": standing, "session": turn.options.session, "scene": scene_id}
        note = partial(state.service.life.used, turn.who, used, **detail)
        await asyncio.to_thread(note)
        if superseded:
            await state.withdraw_adapters(turn.who)
    except MemosError as error:
        logger.error("what a turn of %s used was not noted: %s", turn.who, error)


def explain(turn: Turn, recall: Recall, adapter: Choice | None, left_out: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "user": turn.who.user,
        "adapter": None if adapter is None else adapter.header,
        "recalled": [
            *({"where": "long_lived", **record.as_json()} for record in recall.long_lived),
            *({"where": "late", "score": hit.score, "why": hit.why, **hit.record.as_json()} for hit in recall.late),
            *({"where": "source", **passage.as_json()} for passage in recall.sources),
        ],
        "not_standing": recall.left_out,
        "left_out": list(left_out),
    }


def _as_dict(message: Any) -> dict[str, Any]:
    out = message.model_dump(exclude_none=True) if isinstance(message, BaseModel) else dict(message)
    if "tool_calls" in out:  # pydantic's iterator, which only one of vLLM and us could read
        out["tool_calls"] = list(out["tool_calls"] or ())
    if not isinstance(out.get("content"), str | list | None):  # another such
        out["content"] = list(out["content"])
    return out
