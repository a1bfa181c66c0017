"""A chat request with outside sources, without a model: where passages go, and where they do not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from memos_vllm.config import MemoryConfig
from memos_vllm.errors import SourceError
from memos_vllm.integration import chat
from memos_vllm.integration.chat import MemosField, Turn
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.assembly import SOURCES_HEADING
from memos_vllm.memory.results import Passage, Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.sources.gathering import Sources
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB
from tests.unit.test_memory_routes import state_with

MESSAGES = [{"role": "user", "content": "What about tea?"}]


class Book:
    """Serves Alice with one passage."""

    name, deadline_s = "book", 10.0
    error: Exception | None = None

    def serves(self, who: Principal) -> bool:
        return who == ALICE

    def search(self, query: str, top_k: int) -> Sequence[Passage]:
        if self.error:
            raise self.error
        return [Passage("book", "Tea is hot.", "tea.md", section=("Drinks",))]

    def status(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def state(tmp_path: Path, book: Book) -> Iterator[MemosState]:
    store = MemoryStore(tmp_path, 2**30)
    made = state_with(MemoryService(store, MemoryConfig()), tmp_path)
    made.sources = Sources([book])
    made.service.add(ALICE, "I like tea.")
    yield made
    store.close()
    made.adapters.registry.close()


def ask(state: MemosState, who: Principal = ALICE, **options: Any) -> tuple[Recall, list[Any], Turn]:
    """What was recalled, and the messages that vLLM is given."""
    request = ChatCompletionRequest(model="m", messages=MESSAGES)
    turn = Turn(who, MemosField(**options), list(MESSAGES), [], "r")
    recall, salt = asyncio.run(chat.recall_for(turn, state))
    return chat.add_memory(turn, request, recall, salt, None).told, request.messages, turn


def test_passages_stand_before_the_query_and_are_explained(state: MemosState) -> None:
    recall, messages, turn = ask(state)
    assert messages[-1]["content"] == f"{SOURCES_HEADING}\n- [book: tea.md] Tea is hot.\n\nWhat about tea?"
    assert "I like tea." in messages[0]["content"] and "hot" not in messages[0]["content"]
    (explained,) = [each for each in chat.explain(turn, recall, None)["recalled"] if each["where"] == "source"]
    assert (explained["source"], explained["text"]) == ("book", "Tea is hot.")
    assert explained["citation"] == {"cited": "tea.md", "section": ["Drinks"]}
    assert len(state.service.list(ALICE).records) == 1


@pytest.mark.parametrize(("who", "options"), [(BOB, {}), (ALICE, {"sources": False}), (ALICE, {"recall": False})])
def test_who_may_not_or_does_not_want_is_told_nothing(
    state: MemosState, who: Principal, options: dict[str, Any]
) -> None:
    recall, messages, _ = ask(state, who, **options)
    assert recall.sources == () and "hot" not in str(messages)


def test_a_source_that_fails_is_counted_and_the_chat_goes_on(state: MemosState, book: Book) -> None:
    book.error = SourceError("away")
    count = lambda: REGISTRY.get_sample_value("memos:source_failures_total", {"reason": "error"})  # noqa: E731
    before = count() or 0
    recall, messages, _ = ask(state)
    assert recall.sources == () and "I like tea." in messages[0]["content"] and count() == before + 1
