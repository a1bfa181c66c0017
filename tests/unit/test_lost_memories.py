"""What an operator sees of memories that are lost, or will be: counted turns, and the size of the store."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from memos_vllm.config import MemoryConfig
from memos_vllm.integration import chat
from memos_vllm.integration.caretaker import Caretaker
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.abstract_store import StoreSize
from memos_vllm.memory.results import Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MIN_MAP_BYTES, MemoryStore
from tests.memory.memory_factories import ALICE
from tests.unit.test_memory_routes import state_with


@pytest.fixture
def state(tmp_path: Path) -> Iterator[MemosState]:
    """A server without an engine, whose store holds 1 MiB."""
    store = MemoryStore(tmp_path / "memory", MIN_MAP_BYTES)
    made = state_with(MemoryService(store, MemoryConfig()), tmp_path)
    made.planner = SimpleNamespace(turn_ended=lambda *_: None)  # type: ignore[assignment]
    yield made
    store.close()
    made.adapters.registry.close()


def end_turn(state: MemosState, text: str) -> None:
    turn = chat.Turn(ALICE, chat.MemosField(), [{"role": "user", "content": text}], [], "request")
    asyncio.run(chat.end_turn(turn, Recall((), ()), "scene", state, []))


def value(name: str) -> Any:
    return REGISTRY.get_sample_value(name)


def test_a_turn_that_is_not_remembered_is_counted(state: MemosState, monkeypatch: pytest.MonkeyPatch) -> None:
    end_turn(state, "I like tea.")
    assert value("memos:remember_failures_total") == 0
    end_turn(state, "I like " + "milk " * MIN_MAP_BYTES)
    assert value("memos:remember_failures_total") == 1
    assert [record.text for record in state.service.list(ALICE).records] == ["I like tea."]

    def has_a_bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(state.service, "remember", has_a_bug)
    with pytest.raises(ZeroDivisionError):
        end_turn(state, "I like water.")
    assert value("memos:remember_failures_total") == 2


def test_the_store_is_measured(state: MemosState) -> None:
    state.service._retrieval.embedder_failures = 2
    for _ in range(2):
        asyncio.run(Caretaker(state).look_after())
    assert value("memos:store_bytes") == state.service.stats()["file_bytes"] > 0
    assert value("memos:store_limit_bytes") == MIN_MAP_BYTES
    assert value("memos:data_dir_free_bytes") > 0
    assert value("memos:embedder_failures_total") == 2
    state.metrics.store_measured(StoreSize(7, None))
    assert value("memos:store_bytes") == 7 and value("memos:store_limit_bytes") == math.inf
