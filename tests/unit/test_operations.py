"""The operator's status without a model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.config import MemosConfig
from memos_vllm.errors import StoreUnavailable
from memos_vllm.integration import engine_channel, operations
from memos_vllm.memory.holdings import Holdings
from memos_vllm.memory.limits import UserLimits
from memos_vllm.memory.results import Passage
from memos_vllm.memory.sources.gathering import Sources
from memos_vllm.types import Principal

KEYS = {"app": {"tenant": "shop"}, "carol": {"tenant": "shop", "user": "carol"}}


class Folder:
    """Serves Carol."""

    name, deadline_s = "contracts", 1.0

    def serves(self, who: Principal) -> bool:
        return who == Principal("shop", "carol")

    def search(self, query: str, top_k: int) -> Sequence[Passage]:
        return []

    def status(self) -> dict[str, Any]:
        return {"name": self.name, "left_out": 1, "problems": {"dismissal of Bob.pdf": "it is damaged"}}


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Any:
    async def call(*_: Any) -> list[dict[str, Any]]:
        return [{"enabled": False}]

    async def adapters() -> dict[str, Any]:
        return {"loaded": 0}

    async def build() -> dict[str, Any]:
        return {"enabled": False, "pending": False}

    monkeypatch.setattr(engine_channel, "call", call)
    return SimpleNamespace(
        config=MemosConfig.model_validate({"identity": {"keys": KEYS}}),
        engine=None,
        builder=SimpleNamespace(status=build),
        refiner=None,
        sources=Sources([Folder()]),
        adapters=SimpleNamespace(status=adapters),
        service=SimpleNamespace(stats=lambda: {"memories": 3}),
    )


def status_of(state: Any, query: str = "", **headers: str) -> Any:
    app = FastAPI()
    app.include_router(operations.router)
    app.state.memos = state
    response = TestClient(app, raise_server_exceptions=False).get(f"/v1/memos/status{query}", headers=headers)
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


COUNTS = {"name": "contracts", "left_out": 1, "failures": {}}


@pytest.mark.parametrize(
    ("query", "key"), [("", None), ("", ""), ("", "somebody"), ("", "app"), ("?user=bob", "app"), ("?user=carol", "x")]
)
def test_a_source_is_told_to_nobody_whom_it_does_not_serve(state: Any, query: str, key: str | None) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    assert status_of(state, query, **headers)["sources"] == []


@pytest.mark.parametrize(("query", "key"), [("", "carol"), ("?user=carol", "carol"), ("?user=carol", "app")])
def test_names_of_files_are_told_to_whom_the_source_serves(state: Any, query: str, key: str) -> None:
    (told,) = status_of(state, query, authorization=f"Bearer {key}")["sources"]
    assert told == {**COUNTS, "problems": {"dismissal of Bob.pdf": "it is damaged"}}


@pytest.mark.parametrize(("operator", "is_told"), [("all", True), ("tenant", False)])
def test_the_operator_is_told_of_sources_that_serve_others(state: Any, operator: str, is_told: bool) -> None:
    keys = {**KEYS, "ops": {"tenant": "operations", "operator": operator}}
    state.config = MemosConfig.model_validate({"identity": {"keys": keys}})
    told = status_of(state, authorization="Bearer ops")["sources"]
    assert told == ([{**COUNTS, "problems": {"dismissal of Bob.pdf": "it is damaged"}}] if is_told else [])


def test_what_a_gateway_sends_for_a_user_is_no_operators(state: Any) -> None:
    keys = {"gateway": {"tenant": "shop", "operator": "all"}}
    state.config = MemosConfig.model_validate({"identity": {"keys": keys, "trusted_user_header": "x-user"}})
    headers = {"authorization": "Bearer gateway", "x-user": "bob"}
    state.service.holdings = lambda who: Holdings(1, 2)
    state.service.limits = UserLimits()
    mine = {"memories": 1, "bytes": 2, "max_memories": None, "max_bytes": None}
    assert status_of(state, **headers) == {"memory": mine, "sources": []}
    headers["x-user"] = ""  # a visitor whom it does not know
    assert status_of(state, **headers).get("memory") != {"memories": 3}
    del headers["x-user"]
    assert status_of(state, **headers)["memory"] == {"memories": 3}


def test_without_the_database_a_user_is_told_so(state: Any) -> None:
    def holdings(who: Principal) -> Any:
        raise StoreUnavailable("the database cannot be reached")

    keys = {**KEYS, "ops": {"tenant": "operations", "operator": "all"}}
    state.config = MemosConfig.model_validate({"identity": {"keys": keys}})
    state.service.holdings = holdings
    told = status_of(state, authorization="Bearer carol")
    assert told["memory"] == {"error": "the database cannot be reached"} and len(told["sources"]) == 1


def test_who_claims_to_be_somebody_needs_a_key(state: Any) -> None:
    app = FastAPI()
    app.include_router(operations.router)
    app.state.memos = state
    assert TestClient(app).get("/v1/memos/status?user=carol").status_code == 401


def test_a_tier_that_there_is_not_is_refused_as_any_wrong_request_is(state: Any) -> None:
    app = FastAPI()
    app.include_router(operations.development_router)
    app.state.memos = state
    response = TestClient(app).post("/v1/memos/kv/drop?tier=disk")
    error = {"message": "'tier' must be gpu or host, not 'disk'", "type": "Bad Request", "param": None, "code": 400}
    assert (response.status_code, response.json()) == (400, {"error": error})
