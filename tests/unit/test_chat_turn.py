"""A chat request's turn, without a model: what is read of it, what is told of its memory, what is noted of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from memos_vllm.config import MemoryConfig
from memos_vllm.integration import chat
from memos_vllm.integration import state as state_module
from memos_vllm.integration.chat import MemosField, Turn
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.assembly import assemble
from memos_vllm.memory.messages import last_user_text
from memos_vllm.memory.results import Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from tests.memory.memory_factories import ALICE, BOB, says
from tests.unit.test_memory_routes import state_with


@pytest.fixture
def state(tmp_path: Path) -> Iterator[MemosState]:
    store = MemoryStore(tmp_path, 2**30)
    made = state_with(MemoryService(store, MemoryConfig(long_lived_tokens=20)), tmp_path)
    yield made
    store.close()
    made.adapters.registry.close()


def turn_of(text: str, **options: Any) -> Turn:
    return Turn(ALICE, MemosField(**options), says(text), [], "r")


def test_what_only_stood_in_the_prompt_is_noted_and_not_used(state: MemosState) -> None:
    tea, cat = (state.service.add(ALICE, text) for text in ("I drink green tea.", "I have a black cat."))
    turn = turn_of("Which tea do I drink?", remember=False)
    recall, _ = asyncio.run(chat.recall_for(turn, state))
    assert [record.id for record in recall.long_lived] == [tea.id, cat.id]
    asyncio.run(chat.end_turn(turn, recall, "scene", state, []))
    assert [state.service.get(ALICE, each.id).state for each in (tea, cat)] == ["activated", "generated"]
    for each in (tea, cat):
        (event,) = state.service.life.events(ALICE, each.id)
        assert (event.kind, event.detail) == ("recalled", {"where": "long_lived", "scene": "scene"})


def test_explain_counts_what_had_no_room(state: MemosState) -> None:
    for number in range(5):
        state.service.add(ALICE, f"I have the ticket {number}.")
    for explain, left_out in ((True, 5), (False, None)):
        turn = turn_of("Hello", explain=explain)
        recall, _ = asyncio.run(chat.recall_for(turn, state))
        told = chat.explain(turn, recall, None)
        assert 0 < len(recall.long_lived) < 5
        assert told["not_standing"] == (left_out and left_out - len(recall.long_lived))


def test_a_users_next_request_waits_for_what_his_turn_is_writing(
    state: MemosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "READ_YOUR_WRITES_TIMEOUT_S", 60.0)

    async def play() -> list[str]:
        announced = state.announce(ALICE)
        following = asyncio.create_task(chat.recall_for(turn_of("What is my favourite drink?", remember=False), state))
        await chat.recall_for(Turn(BOB, MemosField(), says("Hello"), [], "r"), state)  # nothing of his is written
        assert not following.done()
        await chat.end_turn(turn_of(FACT), Recall((), ()), "scene", state, [announced])
        recall, _ = await following
        return [record.text for record in recall.records]

    assert asyncio.run(play()) == [FACT]


def test_a_write_that_does_not_end_holds_up_a_request_for_a_moment_only(
    state: MemosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "READ_YOUR_WRITES_TIMEOUT_S", 0.01)

    async def play() -> bool:
        announced = state.announce(ALICE)
        await asyncio.wait_for(chat.recall_for(turn_of("Hello", remember=False), state), timeout=30)
        return announced.done()

    assert not asyncio.run(play())


FACT = "My favourite drink is tea."
PARTS = [{"type": "text", "text": FACT}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("content", [FACT, PARTS, [{"type": "image_url", "image_url": {"url": "http://x"}}, *PARTS]])
@pytest.mark.parametrize(
    "before",
    [
        {"role": "assistant", "content": "ok"},
        {"role": "assistant", "content": PARTS},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": PARTS, "tool_calls": [CALL]},
        {"role": "assistant", "content": PARTS, "function_call": CALL["function"]},  # vLLM has an iterator of these
        {"role": "tool", "tool_call_id": "c", "content": PARTS},
        {"role": "developer", "content": PARTS},
    ],
    ids=["text", "parts", "calls", "parts and calls", "function call", "tool", "developer"],
)
def test_content_is_read_in_every_shape_and_left_for_vllm(before: dict[str, Any], content: Any) -> None:
    sent = [before, {"role": "user", "content": content}]
    request = ChatCompletionRequest.model_validate_json(json.dumps({"model": "m", "messages": sent}))
    messages = [chat._as_dict(message) for message in request.messages]
    for _ in range(2):
        assert last_user_text(messages) == FACT
        for told in (messages, assemble(messages)):
            assert [message["content"] for message in told] == [before["content"], content]
            assert told[0].get("tool_calls") == before.get("tool_calls")
