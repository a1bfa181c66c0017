"""What a user's next session will start with: system prompt and long-lived memory, before any request of it.

    seen       each turn shows how the application's prompts start: system prompt, tools, template options
    prepare    long-lived memory as it is now, chosen and assembled as for a session's first turn, and the adapter
    render     by vLLM's own chat endpoint, twice with different questions: what both begin with is the start
    declare    the engine hashes it and knows it as a scene, to be loaded or built like any other

A start is declared anew when the application's part, the user's memory or his adapter has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from memos_vllm.integration import engine_channel, salts
from memos_vllm.integration.adapter_gate import AdapterGate, Coming
from memos_vllm.integration.home_engine import HomeEngines
from memos_vllm.integration.scene_builds import lora_arguments
from memos_vllm.memory.assembly import DEFAULT_FORMAT, Message, PromptFormat, assemble
from memos_vllm.memory.service import MemoryService
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

logger = logging.getLogger(__name__)

MAX_USERS = 1000
"""Whose starts are known; those who came last."""

_QUESTIONS = ("a", "1")
"""Any two that share no first token."""

_RENDERED = {
    "model", "tools", "tool_choice", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort",
    "add_special_tokens", "mm_processor_kwargs",
}  # fmt: skip
"""Fields of a request that decide how it is rendered. Of one that is missing here an old value may be used, for
a start that no request then has; nothing is wrong by that."""


@dataclass(slots=True)
class SessionStart:
    """One user's."""

    who: Principal
    request: ChatCompletionRequest
    """The last one, without its conversation."""
    lead: list[Message]
    """Its messages before the first of the user."""
    client_salt: str | None
    serving: OpenAIServingChat
    scene_id: str
    adapter: str | None = None
    """As the last request named it; None: whatever a request gets that names none."""
    coming: Coming = field(default_factory=Coming)
    """The adapter that it was declared with."""
    declared: tuple[int, int, int] | None = None
    """The user's memory (``seq``, KV epoch) and the index of adapters as of the last declaration."""
    num_blocks: int = 0
    """What the engine made of it."""

    def same_prompt(self, other: SessionStart) -> bool:
        mine, theirs = (each.request.model_dump(include=_RENDERED) for each in (self, other))
        return (self.lead, self.client_salt, self.adapter, mine) == (
            other.lead, other.client_salt, other.adapter, theirs
        )  # fmt: skip


def start_of(
    who: Principal,
    request: ChatCompletionRequest,
    messages: Sequence[Message],
    serving: OpenAIServingChat,
    scene_id: str,
    adapter: str | None = None,
) -> SessionStart:
    """What a request shows, before memory and our salt are put into it.

    Args:
        messages: as the client sent them.
        scene_id: of the user's next session.
        adapter: as the request names it.
    """
    bare = request.model_copy(update={"messages": [], "cache_salt": None, "kv_transfer_params": None, "n": 1})
    lead = [dict(message) for message in takewhile(lambda each: each.get("role") in ("system", "developer"), messages)]
    return SessionStart(who, bare, lead, request.cache_salt, serving, scene_id, adapter)


class SessionStarts:
    """Owned by the API process's event loop.

    Args:
        salt_of: the ``cache_salt`` of a user's requests in a KV epoch.
    """

    def __init__(
        self,
        engine: EngineClient,
        service: MemoryService,
        salt_of: Callable[[Principal, int], str],
        adapters: AdapterGate,
        homes: HomeEngines,
        form: PromptFormat = DEFAULT_FORMAT,
    ) -> None:
        self._engine, self._homes = engine, homes
        self._service = service
        self._salt_of = salt_of
        self._adapters = adapters
        self._form = form
        self._starts: OrderedDict[str, SessionStart] = OrderedDict()

    def seen(self, start: SessionStart) -> None:
        """A turn came."""
        known = self._starts.pop(start.scene_id, None)
        if known is not None and known.same_prompt(start):
            start = known  # with what is declared of it
        self._starts[start.scene_id] = start
        if len(self._starts) > MAX_USERS:
            self._starts.popitem(last=False)

    def forget(self, scene_id: str) -> None:
        self._starts.pop(scene_id, None)

    def declared(self, scene_ids: Sequence[str], engine: int) -> list[str]:
        """Of these scenes, those that the engine should know as starts."""
        starts = [start for each in scene_ids if (start := self._starts.get(each)) is not None and start.num_blocks]
        return [start.scene_id for start in starts if self._homes.of(start.who) == engine]

    def lost(self, scene_ids: Sequence[str]) -> None:
        """The engine does not know these any more."""
        for scene_id in scene_ids:
            if (start := self._starts.get(scene_id)) is not None:
                start.declared, start.num_blocks = None, 0

    def stamp(self) -> tuple[int, int]:
        """Changes whenever any user's memory or adapter did."""
        return self._service.stamp(), self._adapters.registry.stamp()

    async def declare_changed(self, scene_ids: Sequence[str]) -> dict[str, int]:
        """Declares those of these starts that have changed since; their size in blocks."""
        declared: dict[str, int] = {}
        for start, version in await asyncio.to_thread(self._changed, scene_ids):
            prepared = await asyncio.to_thread(self._service.prepare, start.who)
            coming = await asyncio.to_thread(
                self._adapters.coming, start.who, start.adapter, start.serving, start.request.model, prepared.long_lived
            )
            if start.num_blocks and start.declared and start.declared[:2] == version[:2] and start.coming == coming:
                start.declared = version  # it is another adapter that has changed
                continue
            # Before the work: a start that cannot be rendered is not tried again until it has changed.
            start.declared, start.num_blocks, start.coming = version, 0, coming
            self._adapters.expected.expect(start.scene_id, start.who, coming.reference)
            left = [each for each in prepared.long_lived if (each.id, each.version) not in coming.instead_of]
            token_ids = await _render(start, [record.text for record in left], self._form)
            if not token_ids or self._starts.get(start.scene_id) is not start:
                continue
            if (prepared.seq, prepared.kv_epoch) != version[:2]:
                start.declared = None  # changed meanwhile
                continue
            # The salt of this very text: a deletion from now on finds it, before or after it is built.
            salt = salts.combine(self._salt_of(start.who, prepared.kv_epoch), start.client_salt)
            payload: dict[str, Any] = {"scene": start.scene_id, "token_ids": token_ids, "salt": salt}
            payload["lora"] = lora_arguments(coming.lora)
            reply = await engine_channel.call_one(self._engine, self._homes.of(start.who), "declare", payload)
            if reply.get("blocks"):
                start.num_blocks = declared[start.scene_id] = reply["blocks"]
        return declared

    def _changed(self, scene_ids: Sequence[str]) -> list[tuple[SessionStart, tuple[int, int, int]]]:
        """With their version as of now."""
        starts = [start for scene_id in scene_ids if (start := self._starts.get(scene_id)) is not None]
        adapters = self._adapters.registry.stamp()
        versions = [(*self._service.memory_version(start.who), adapters) for start in starts]
        return [each for each in zip(starts, versions, strict=True) if each[0].declared != each[1]]


async def _render(start: SessionStart, memory: Sequence[str], form: PromptFormat) -> list[int]:
    """Tokens that a first turn has in front of its question; none if vLLM refuses the request."""
    rendered: list[list[int]] = []
    for question in _QUESTIONS:
        messages = assemble([*start.lead, {"role": "user", "content": question}], memory, form=form)
        result = await start.serving.render_chat_request(start.request.model_copy(update={"messages": messages}))
        if not isinstance(result, tuple):
            logger.info("the next session of a user cannot be prepared: %s", result)
            return []
        rendered.append(list(result[1][0]["prompt_token_ids"]))
    one, other = rendered
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
