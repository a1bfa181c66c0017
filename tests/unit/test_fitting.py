"""Memory gives way where a prompt has no room for it: what is dropped when, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from memos_vllm.compat.error_response import ErrorResponse
from memos_vllm.config import MemoryConfig
from memos_vllm.integration import chat
from memos_vllm.integration.chat import MemosField, Turn
from memos_vllm.integration.fitting import ANSWER_TOKENS, Prompt, check_budgets
from memos_vllm.memory.assembly import LATE_HEADING, LONG_LIVED_HEADING
from memos_vllm.memory.results import Hit, Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from tests.memory.memory_factories import ALICE

WINDOW = 1000
STANDING, LATE = " tea" * 100, " ferry" * 50
ALL, NO_LATE, NONE = "all", "no late", "none"


class Serving:
    """Renders as vLLM does, with a token for each word.

    Args:
        refuses: a prompt that leaves no room for ``max_tokens`` (0.26), or only one that is too long itself (0.32).
        raises: errors, or returns them.
    """

    def __init__(self, *, counts_answer: bool, raises: bool) -> None:
        self.model_config = SimpleNamespace(max_model_len=WINDOW)
        self.counts_answer, self.raises = counts_answer, raises
        self.rendered: list[str] = []

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        text = " ".join(str(message["content"]) for message in request.messages)
        self.rendered.append(ALL if LATE_HEADING in text else NO_LATE if LONG_LIVED_HEADING in text else NONE)
        assert request.response_format is not None, "as the client sent it"
        request.response_format = None
        request.messages[-2]["tool_calls"][0]["function"]["arguments"] = {"parsed": True}
        num_tokens = len(text.split())
        if num_tokens + (request.max_tokens or 1 if self.counts_answer else 0) <= WINDOW:
            return request.messages, [{"prompt_token_ids": [0] * num_tokens}]
        if self.raises:
            raise VLLMValidationError("This model's maximum context length is", parameter="input_tokens")
        return ErrorResponse(error={"message": "too long", "type": "BadRequestError", "code": 400})


@pytest.fixture
def recall(tmp_path: Path) -> Iterator[Recall]:
    store = MemoryStore(tmp_path, 2**30)
    service = MemoryService(store, MemoryConfig())
    standing, late = (service.add(ALICE, text) for text in (STANDING, LATE))
    yield Recall((standing,), (Hit(late, 1.0, {}),))
    store.close()


@pytest.fixture(params=["0.26 raises", "0.26 returns", "0.32 raises"])
def serving(request: pytest.FixtureRequest) -> Serving:
    return Serving(counts_answer="0.26" in request.param, raises="raises" in request.param)


def messages_of(num_words: int) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [called, {"role": "user", "content": "word " * num_words}]


def prompt_of(recall: Recall, num_words: int, **options: Any) -> tuple[Prompt, Turn]:
    messages = messages_of(num_words)
    request = ChatCompletionRequest(model="m", messages=messages, response_format={"type": "text"}, **options)
    turn = Turn(ALICE, MemosField(), messages, [], "r")
    return chat.add_memory(turn, request, recall, "salt", None), turn


def render(prompt: Prompt, serving: Serving) -> Any:
    async def body() -> Any:
        with prompt.active(serving):
            return await serving.render_chat_request(prompt.request)

    return asyncio.run(body())


@pytest.mark.parametrize(
    ("num_words", "tried", "left"),
    [
        (700, [ALL], ALL),
        (800, [ALL, NONE, NO_LATE], NO_LATE),
        (850, [ALL, NONE, NO_LATE], NONE),
    ],
)
def test_late_memory_goes_first_and_what_goes_is_not_used(
    serving: Serving, recall: Recall, num_words: int, tried: list[str], left: str
) -> None:
    prompt, turn = prompt_of(recall, num_words, max_tokens=50)
    conversation, (engine_input,) = render(prompt, serving)
    assert serving.rendered == tried
    assert len(engine_input["prompt_token_ids"]) + 50 <= WINDOW
    assert prompt.num_tokens == len(engine_input["prompt_token_ids"])
    kept = [(LATE.strip(), left == ALL), (STANDING.strip(), left != NONE)]
    for text, is_there in kept:
        assert (text in str(conversation)) == (text in str(prompt.request.messages)) == is_there
    ids = [record.id for record, is_there in zip(recall.records, (left != NONE, left == ALL), strict=True) if is_there]
    assert prompt.told.ids == prompt.recall.ids == ids
    explained = chat.explain(turn, prompt.told, None, prompt.left_out)
    assert [each["id"] for each in explained["recalled"]] == ids
    assert explained["left_out"] == [each for each in recall.ids if each not in ids]
    assert turn.messages[0]["tool_calls"][0]["function"]["arguments"] == "{}", (
        "what the client sent is remembered as it was"
    )


def test_what_does_not_fit_without_memory_is_refused_as_ever(serving: Serving, recall: Recall) -> None:
    prompt, _ = prompt_of(recall, WINDOW + 1, max_tokens=50)
    if serving.raises:
        with pytest.raises(VLLMValidationError, match="maximum context length"):
            render(prompt, serving)
    else:
        assert isinstance(render(prompt, serving), ErrorResponse)
    assert serving.rendered == [ALL, NONE]


@pytest.mark.parametrize(
    ("num_words", "max_tokens", "left"),
    [
        (500, WINDOW, ALL),  # cut down to what is left, with memory or without
        (600, WINDOW, NO_LATE),
        (700, WINDOW, NONE),
        (500, None, ALL),
        (600, None, NO_LATE),
        (WINDOW - ANSWER_TOKENS, None, NONE),
        (WINDOW - 10, None, NONE),
    ],
)
def test_an_answer_without_a_length_that_fits_has_some_room(
    recall: Recall, num_words: int, max_tokens: int | None, left: str
) -> None:
    serving = Serving(counts_answer=False, raises=True)
    prompt, _ = prompt_of(recall, num_words, max_tokens=max_tokens)
    _, (engine_input,) = render(prompt, serving)
    num_tokens = len(engine_input["prompt_token_ids"])
    assert (len(prompt.told.long_lived), len(prompt.told.late)) == {ALL: (1, 1), NO_LATE: (1, 0), NONE: (0, 0)}[left]
    assert num_tokens == num_words or num_tokens <= WINDOW - ANSWER_TOKENS


def test_what_an_adapter_stands_for_takes_no_room_and_stays_used(serving: Serving, recall: Recall) -> None:
    late = recall.late[0].record
    adapter: Any = SimpleNamespace(instead_of={(late.id, late.version)})
    request = ChatCompletionRequest(model="m", messages=[], max_tokens=50, response_format={"type": "text"})
    turn = Turn(ALICE, MemosField(), messages_of(900), [], "r")
    prompt = chat.add_memory(turn, request, recall, "salt", adapter)
    render(prompt, serving)
    assert serving.rendered == [NO_LATE, NONE]
    assert (prompt.told.ids, prompt.recall.ids) == ([], [late.id])


def test_requests_without_memory_and_of_others_are_rendered_once(serving: Serving, recall: Recall) -> None:
    prompt, _ = prompt_of(Recall((), ()), WINDOW - 60, max_tokens=50)
    render(prompt, serving)
    assert prompt.num_tokens == WINDOW - 60
    other, _ = prompt_of(recall, WINDOW - 300, max_tokens=50)

    async def body() -> None:
        with other.active(serving), prompt.active(serving):
            await serving.render_chat_request(other.request)

    other.request.messages = messages_of(WINDOW - 300)
    asyncio.run(body())
    assert serving.rendered == [NONE, NONE]


def test_each_request_of_many_at_a_time_has_its_own_memory(serving: Serving, recall: Recall) -> None:
    prompts = [prompt_of(recall, num_words, max_tokens=50)[0] for num_words in (700, 800, 850) * 3]

    async def one(prompt: Prompt) -> None:
        with prompt.active(serving):
            await asyncio.create_task(serving.render_chat_request(prompt.request))

    async def body() -> None:
        await asyncio.gather(*map(one, prompts))

    asyncio.run(body())
    assert [len(prompt.told.ids) for prompt in prompts] == [2, 1, 0] * 3


@pytest.mark.parametrize(("max_model_len", "warned"), [(2048, True), (4 * 1536 - 1, True), (4 * 1536, False)])
def test_budgets_that_take_much_of_the_context_are_warned_of(
    caplog: pytest.LogCaptureFixture, max_model_len: int, warned: bool
) -> None:
    check_budgets(MemoryConfig(), max_model_len)
    assert [f"1536 of the model's {max_model_len} tokens" in each.getMessage() for each in caplog.records] == (
        [True] if warned else []
    )
