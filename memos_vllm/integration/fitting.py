"""Memory gives way where a prompt has no room for it.

How long a prompt is, only vLLM's renderer knows. So its method on the serving object is wrapped, as others are for
adapters: what was rendered with memory and leaves the answer too little room is rendered with less, before anything
of it has reached the engine. A request whose memory fits is rendered once, as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from memos_vllm.config import MemoryConfig
from memos_vllm.memory.assembly import Message
from memos_vllm.memory.results import Recall

ANSWER_TOKENS = 256
"""What memory leaves to the answer of a request that names no ``max_tokens``, or more than it could have even without
memory, which some versions of vLLM cut down silently. Most answers are shorter."""

MIN_CONTEXT_PER_MEMORY = 4
"""Budgets of memory above a quarter of the context are warned of."""

NOTHING = Recall((), ())

logger = logging.getLogger(__name__)

Render = Callable[[ChatCompletionRequest], Awaitable[Any]]


@dataclass(slots=True)
class Prompt:
    """A request with memory, on its way to the renderer."""

    request: ChatCompletionRequest
    recall: Recall
    """What the answer needs, and what counts as used; an adapter may stand for some of it."""

    told: Recall
    """What of it stands in the messages."""

    assembled: Callable[[Recall], list[Message]]
    """New messages with as much of memory."""

    left_out: tuple[str, ...] = ()
    """Ids of memories for which there was no room."""

    num_tokens: int | None = None
    """As rendered in the end; None before."""

    def put(self, told: Recall) -> None:
        self.request.messages = self.assembled(told)  # type: ignore[assignment]

    def lessen(self, told: Recall) -> None:
        """There is room for no more than this."""
        self.put(told)
        gone = self.told.versions - told.versions
        self.left_out = tuple(record.id for record in self.told.records if (record.id, record.version) in gone)
        self.recall = replace(self.recall.without(gone), sources=told.sources)
        self.told = told

    @contextmanager
    def active(self, serving: Any) -> Iterator[None]:
        """vLLM's serving object renders the request, in this block, with as much memory as there is room for."""
        _wrap(serving)
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[Prompt | None] = ContextVar("memos_prompt", default=None)


@dataclass(frozen=True, slots=True)
class _Rendered:
    told: Recall
    result: Any
    """As vLLM's renderer returns it: a conversation and engine inputs, or an error."""

    room: int
    """In tokens, for the answer; negative if vLLM refused the prompt."""


async def fit(prompt: Prompt, render: Render, max_model_len: int) -> Any:
    """What ``render`` returns for the most memory that leaves the answer its room.

    Late memory goes first, with what sources say: without long-lived memory no prefix is found again.

    Raises:
        VLLMValidationError: the request is refused without memory too.
    """
    result = await _fitting(prompt, render, max_model_len)
    prompt.num_tokens = _num_tokens(result)
    return result


async def _fitting(prompt: Prompt, render: Render, max_model_len: int) -> Any:
    if prompt.told == NOTHING:
        return await render(prompt.request)
    as_sent = dict(vars(prompt.request))

    async def rendered(told: Recall) -> _Rendered:
        _restore(prompt.request, as_sent)
        prompt.put(told)
        result = await render(prompt.request)
        return _Rendered(told, result, _room(result, max_model_len))

    asked = _answer_tokens(prompt.request)
    chosen = await _unless_refused(rendered(prompt.told), prompt.told)
    if chosen.room >= asked:
        return chosen.result
    bare = await rendered(NOTHING)  # whether it is memory that is too much
    if bare.room < 0:
        return bare.result
    needed = asked if bare.room >= asked else min(asked, ANSWER_TOKENS)
    standing = replace(prompt.told, late=(), sources=())
    if chosen.room < needed and standing not in (prompt.told, NOTHING):
        chosen = await _unless_refused(rendered(standing), standing)
    if chosen.room < needed:
        chosen = bare
    prompt.lessen(chosen.told)
    return chosen.result


async def _unless_refused(rendering: Awaitable[_Rendered], told: Recall) -> _Rendered:
    try:
        return await rendering
    except VLLMValidationError as error:
        return _Rendered(told, error, -1)


def _restore(request: ChatCompletionRequest, as_sent: Mapping[str, Any]) -> None:
    """Rendering writes into the request, the form of tool calls for one, and is to find it as it was."""
    for name, value in as_sent.items():
        if vars(request)[name] is not value:
            setattr(request, name, value)


def check_budgets(memory: MemoryConfig, max_model_len: int) -> None:
    """Warns of budgets that leave conversations little of the model's context."""
    budget = memory.long_lived_tokens + memory.late_tokens
    if budget * MIN_CONTEXT_PER_MEMORY > max_model_len:
        logger.warning(
            "memory may take %d of the model's %d tokens of context; where it leaves a prompt no room it is left out. "
            "Lower memory.long_lived_tokens (%d) and memory.late_tokens (%d), or raise --max-model-len",
            budget, max_model_len, memory.long_lived_tokens, memory.late_tokens,
        )  # fmt: skip


def _answer_tokens(request: ChatCompletionRequest) -> int:
    named = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return ANSWER_TOKENS if named is None else max(named, 1)


def _room(result: Any, max_model_len: int) -> int:
    num_tokens = _num_tokens(result)
    return -1 if num_tokens is None else max_model_len - num_tokens


def _num_tokens(result: Any) -> int | None:
    """None where vLLM refused the prompt."""
    if not isinstance(result, tuple):
        return None
    return max((len(ids) for each in result[1] if (ids := each.get("prompt_token_ids")) is not None), default=0)


def _wrap(serving: Any) -> None:
    """Once per object. vLLM has no hook between rendering and the engine."""
    if "_memos_fitting" in vars(serving):
        return
    render = serving.render_chat_request

    async def render_chat_request(request: ChatCompletionRequest) -> Any:
        prompt = _current.get()
        if prompt is None or prompt.request is not request:
            return await render(request)
        return await fit(prompt, render, serving.model_config.max_model_len)

    serving.render_chat_request = render_chat_request
    serving._memos_fitting = True
