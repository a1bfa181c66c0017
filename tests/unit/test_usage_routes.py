"""What a user has of what he may have, over the routes; a chat of one who has too much; and the operator's list."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

from memos_vllm.config import IdentityConfig, MemoryConfig
from memos_vllm.errors import LimitReached
from memos_vllm.integration import chat, over_limit
from memos_vllm.integration.endpoints import routers
from memos_vllm.integration.over_limit import OverLimit
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.results import Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.memory.memory_factories import Clock
from tests.unit.test_memory_routes import state_with

KEYS = {
    "app": {"tenant": "shop"},
    "carol": {"tenant": "shop", "user": "carol"},
    "ops": {"tenant": "operations", "operator": "all"},
    "shop-ops": {"tenant": "shop", "operator": "tenant"},
}
CAROL = Principal("shop", "carol")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(tmp_path: Path, clock: Clock) -> Iterator[MemosState]:
    store = MemoryStore(tmp_path / "memory", 2**30)
    config = MemoryConfig(max_user_memories=3, max_user_bytes=50_000)
    made = state_with(MemoryService(store, config, now=clock), tmp_path)
    made.config = made.config.model_copy(update={"identity": IdentityConfig.model_validate({"keys": KEYS})})
    made.planner = SimpleNamespace(turn_ended=lambda *_: None)  # type: ignore[assignment]
    yield made
    store.close()
    made.adapters.registry.close()


@pytest.fixture
def call(state: MemosState) -> Callable[..., Any]:
    """All routes, as a server has them."""
    app = FastAPI()
    for router in routers(development=True):
        app.include_router(router)
    app.state.memos = state
    client = TestClient(app, raise_server_exceptions=False)

    def call(method: str, path: str, key: str = "carol", **options: Any) -> Any:
        return client.request(method, path, headers={"authorization": f"Bearer {key}"}, **options)

    return call


def add(call: Callable[..., Any], text: str, key: str = "carol", **values: Any) -> Any:
    return call("POST", "/v1/memories", key, json={"text": text, **values})


def test_a_user_sees_what_he_has_of_what_he_may(call: Callable[..., Any]) -> None:
    usage = lambda query="", key="carol": call("GET", f"/v1/memories/usage{query}", key).json()  # noqa: E731
    assert usage() == {"memories": 0, "bytes": 0, "max_memories": 3, "max_bytes": 50_000}
    memory = add(call, "I like tea.").json()["id"]
    assert usage()["memories"] == 1 and 100 < usage()["bytes"] < 1000
    assert usage("?user=carol", "app") == usage() and usage("?user=bob", "app")["memories"] == 0
    assert call("GET", "/v1/memories/usage?user=bob").status_code == 403
    call("DELETE", f"/v1/memories/{memory}")
    assert usage()["bytes"] == 0


def test_what_is_too_much_is_refused_with_409_as_a_whole(call: Callable[..., Any], state: MemosState) -> None:
    def stored(origin: str) -> float:
        return REGISTRY.get_sample_value("memos:memories_stored_total", {"origin": origin}) or 0.0

    for number in range(2):
        assert add(call, f"note {number}").status_code == 200
    document = "\n\n".join(f"{word} " * 100 for word in ("one", "two")).encode()
    refused = [
        call("POST", "/v1/memories", json={"memories": [{"text": "a"}, {"text": "b"}]}),
        call("POST", "/v1/memories/documents?name=a.txt", content=document),
        add(call, "x" * 60_000),
    ]
    for each in refused:
        assert each.status_code == 409, each.text
        error = each.json()["error"]
        assert error["code"] == 409 and "allows; nothing of it was stored. Delete memories" in error["message"]
    assert "memory.max_user_memories (3)" in refused[0].text and "memory.max_user_bytes (50000)" in refused[2].text
    assert call("GET", "/v1/memories/usage").json()["memories"] == 2
    assert call("GET", "/v1/memories/documents").json()["data"] == []
    assert (stored("api"), stored("document")) == (2, 0)
    assert add(call, "another user", "app", user="bob").status_code == 200


def end_turn(state: MemosState, text: str, who: Principal = CAROL) -> None:
    turn = chat.Turn(who, chat.MemosField(), [{"role": "user", "content": text}], [], "request")
    asyncio.run(chat.end_turn(turn, Recall((), ()), "scene", state, []))


def test_a_chat_beyond_the_limit_is_counted_and_told_of_once_an_hour(
    state: MemosState, caplog: pytest.LogCaptureFixture
) -> None:
    at = [0.0]
    state.over_limit = OverLimit(lambda: at[0])
    limited = lambda: REGISTRY.get_sample_value("memos:remember_limited_total")  # noqa: E731
    for drink in ("tea", "milk", "water"):
        end_turn(state, f"I like {drink}.")
    assert limited() == 0
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            end_turn(state, "I like cocoa.")
        assert limited() == 5 and REGISTRY.get_sample_value("memos:remember_failures_total") == 0
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "shop/carol" in caplog.text and "memory.max_user_memories (3)" in caplog.text
        end_turn(state, "I like tea.")
        assert limited() == 5, "what is known needs no room"
        end_turn(state, "I like cocoa.", Principal("shop", "bob"))
        at[0] = over_limit.REPEAT_S - 1.0
        end_turn(state, "I like cocoa.")
        assert len(caplog.records) == 1
        at[0] += 1.0
        end_turn(state, "I like cocoa.")
        assert len(caplog.records) == 2 and limited() == 7
    assert len(state.service.list(CAROL).records) == 3


def test_of_how_many_users_a_process_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(over_limit, "MAX_USERS", 2)
    told = OverLimit(lambda: 0.0)
    for number in (1, 2, 1, 3, 3, 1):
        told.tell(Principal("shop", str(number)), LimitReached("too much"))
    assert len(told._told) == 2
    assert [record.args[0].user for record in caplog.records] == ["1", "2", "3", "1"]


def test_the_operator_lists_users_and_never_what_they_say(call: Callable[..., Any], clock: Clock) -> None:
    began = clock.now.isoformat()
    for user in ("bob", "carol", "dora"):
        add(call, f"a secret of {user}", "app", user=user)
        clock.forward(1)
    add(call, "of somebody", "unlisted")
    listed = call("GET", "/v1/memos/users?tenant=shop", "ops").json()
    assert [each["user"] for each in listed["data"]] == ["bob", "carol", "dora"] and listed["next"] is None
    first = listed["data"][0]
    assert set(first) == {"tenant", "user", "memories", "bytes", "last_used_at"}
    assert (first["tenant"], first["memories"], first["last_used_at"]) == ("shop", 1, began)
    everybody = call("GET", "/v1/memos/users", "ops")
    assert len(everybody.json()["data"]) == 4 and "secret" not in everybody.text
    paged, after = [], ""
    while after is not None:
        page = call("GET", f"/v1/memos/users?limit=3{after}", "ops").json()
        paged += page["data"]
        after = None if page["next"] is None else f"&after={page['next']}"
    assert paged == everybody.json()["data"]
    assert call("GET", "/v1/memos/users", "shop-ops").json() == listed
    assert call("GET", "/v1/memos/users?tenant=shop", "shop-ops").json() == listed


@pytest.mark.parametrize(
    ("key", "query", "status"),
    [
        ("", "", 401), ("carol", "", 403), ("app", "", 403), ("unlisted", "", 403), ("app", "?tenant=shop", 403),
        ("shop-ops", "?tenant=other", 403), ("ops", "?after=x", 400), ("ops", "?limit=0", 400), ("ops", "?user=x", 400),
    ],
)  # fmt: skip
def test_nobody_else_lists_users(call: Callable[..., Any], key: str, query: str, status: int) -> None:
    assert call("GET", f"/v1/memos/users{query}", key).status_code == status


def test_an_operators_key_acts_for_users_as_any_other(call: Callable[..., Any]) -> None:
    assert add(call, "a note", "ops", user="x").json()["tenant"] == "operations"
    assert call("GET", "/v1/memories?user=carol", "ops").json()["data"] == []


def test_where_an_operator_is_listed_others_are_told_of_themselves_alone(
    call: Callable[..., Any], state: MemosState
) -> None:
    add(call, "one")
    add(call, "two", "app", user="bob")

    def fails(*_: Any) -> Any:
        raise AssertionError("the engine is not asked")

    mine = call("GET", "/v1/memories/usage").json()
    state.engine = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=fails))  # type: ignore[assignment]
    assert call("GET", "/v1/memos/status").json() == {"memory": mine, "sources": []}
    for key in ("app", "shop-ops", "unlisted", ""):
        told = call("GET", "/v1/memos/status", key).json()
        assert set(told) == {"memory", "sources"} and told["memory"] in (None, {**mine, "memories": 0, "bytes": 0})
    assert call("POST", "/v1/memos/kv/drop?tier=gpu").status_code == 403


def test_the_operator_is_told_all(call: Callable[..., Any], state: MemosState) -> None:
    async def off(*_: Any, **__: Any) -> Any:
        return {"enabled": False}

    state.engine = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=off))  # type: ignore[assignment]
    state.builder = SimpleNamespace(status=off)  # type: ignore[assignment]
    add(call, "one")
    told = call("GET", "/v1/memos/status", "ops").json()
    assert told["memory"]["users"] == 1 and {"summary", "kv", "engines", "adapters", "refiner"} <= set(told)
