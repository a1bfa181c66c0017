"""The operator's status without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.errors import StoreUnavailable
from memos_vllm.integration import engine_channel, operations


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Any:
    async def call(*_: Any) -> list[dict[str, Any]]:
        return [{"enabled": False}]

    async def adapters() -> dict[str, Any]:
        return {"loaded": 0}

    async def build() -> dict[str, Any]:
        return {"enabled": False, "pending": False}

    monkeypatch.setattr(engine_channel, "call", call)
    part = SimpleNamespace(status=dict)
    return SimpleNamespace(
        engine=None,
        builder=SimpleNamespace(status=build),
        refiner=None,
        sources=part,
        adapters=SimpleNamespace(status=adapters),
        service=SimpleNamespace(stats=lambda: {"memories": 3}),
    )


def status_of(state: Any) -> Any:
    app = FastAPI()
    app.include_router(operations.router)
    app.state.memos = state
    response = TestClient(app, raise_server_exceptions=False).get("/v1/memos/status")
    assert response.status_code == 200, response.text
    return response.json()


def test_the_status_counts_memories(state: Any) -> None:
    assert status_of(state)["memory"] == {"memories": 3}


def test_without_the_database_the_rest_is_told(state: Any) -> None:
    def stats() -> Any:
        raise StoreUnavailable("the database cannot be reached")

    state.service.stats = stats
    told = status_of(state)
    assert told["memory"] == {"error": "the database cannot be reached"}
    assert told["kv"] == {"enabled": False} and told["adapters"] == {"loaded": 0}
