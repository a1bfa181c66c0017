"""Prediction learns from how long prompts and answers were; nobody waits for that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from memos_vllm.config import MemoryConfig
from memos_vllm.integration import chat
from memos_vllm.integration.chat import MemosField, Turn
from memos_vllm.integration.fitting import Prompt
from memos_vllm.integration.lengths import Lengths
from memos_vllm.memory.results import Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.unit.test_memory_routes import state_with

SAYS = 'Write "completion_tokens": 99'
OPENING = f"data: {json.dumps({'choices': [{'delta': {'role': 'assistant'}}]})}\n\n"
TOKENS = [f"data: {json.dumps({'choices': [{'delta': {'content': SAYS}}]})}\n\n" for _ in range(5)]
USAGE = f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 40, 'completion_tokens': 7}})}\n\n"
DONE = "data: [DONE]\n\n"
BODY = {"choices": [{"message": {"content": SAYS}}], "usage": {"prompt_tokens": 40, "completion_tokens": 12}}


async def chunks_of(parts: list[str]) -> AsyncIterator[str]:
    for part in parts:
        yield part


async def sent(response: Response) -> list[Any]:
    """What the client gets, and then what runs in the background."""
    body = [chunk async for chunk in response.body_iterator] if isinstance(response, StreamingResponse) else []
    assert response.background is not None
    await response.background()
    return body


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize(
    ("response", "output_tokens"),
    [
        (lambda: JSONResponse(BODY), 12),
        (lambda: JSONResponse({"choices": BODY["choices"]}), None),
        (lambda: StreamingResponse(chunks_of([OPENING, *TOKENS, DONE])), 5),
        (lambda: StreamingResponse(chunks_of([OPENING, *TOKENS, USAGE, DONE])), 7),
        (lambda: StreamingResponse(chunks_of([DONE])), None),
    ],
    ids=["whole", "without usage", "stream", "stream with usage", "nothing"],
)
def test_the_planner_is_told_how_long_prompt_and_answer_were(
    tmp_path: Path, response: Any, output_tokens: int | None, remember: bool
) -> None:
    told: list[tuple[str, Lengths]] = []
    state = state_with(MemoryService(MemoryStore(tmp_path / "m", 2**26), MemoryConfig()), tmp_path)
    state.planner.turn_ended = lambda *seen: told.append(seen)  # type: ignore[method-assign, assignment]
    messages = [{"role": "user", "content": "Hello"}]
    turn = Turn(Principal("shop", "alice"), MemosField(remember=remember), messages, [], "r")
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": messages})
    nothing = Recall((), ())
    prompt = Prompt(request, nothing, nothing, lambda told: messages, num_tokens=40)  # type: ignore[arg-type]

    async def play() -> list[Any]:
        return await sent(chat.finish_turn(turn, prompt, None, "scene", response(), state))

    body = asyncio.run(play())
    assert body in ([], [OPENING, *TOKENS, DONE], [OPENING, *TOKENS, USAGE, DONE], [DONE]), "handed on as it was"
    assert told == [("scene", Lengths(40, output_tokens))]


def test_a_stream_that_the_client_left_counts_as_far_as_it_came() -> None:
    async def play() -> Lengths:
        lengths = Lengths()
        stream = lengths.count(chunks_of([OPENING, *TOKENS, DONE]))
        for _ in range(3):
            await anext(stream)
        return lengths

    assert asyncio.run(play()).output_tokens == 2
