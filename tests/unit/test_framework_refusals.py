"""What the framework refuses of a request to our routes is one sentence, and nothing that vLLM or uvicorn logs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from memos_vllm.config import MemoryConfig
from memos_vllm.integration.endpoints import routers
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from tests.unit.test_memory_routes import state_with

KEY = {"authorization": "Bearer alice"}


def ours() -> FastAPI:
    app = FastAPI()
    for router in routers(development=True):
        app.include_router(router)
    return app


def parameters() -> list[tuple[str, str, str]]:
    """Method, path and name of each parameter that has another type than text."""
    return [
        (method.upper(), re.sub(r"\{\w+\}", "x", path), each["name"])
        for path, methods in ours().openapi()["paths"].items()
        for method, route in methods.items()
        for each in route.get("parameters", [])
        if each["in"] == "query" and each["schema"].get("type") in ("integer", "boolean")
        and path != "/v1/memories/documents"  # checks its own
    ]  # fmt: skip


@pytest.fixture
def seen() -> list[str]:
    """What would be vLLM's to answer."""
    return []


@pytest.fixture
def app(tmp_path: Path, seen: list[str]) -> Iterator[FastAPI]:
    store = MemoryStore(tmp_path, 2**30)
    state = state_with(MemoryService(store, MemoryConfig()), tmp_path)
    made = ours()
    made.state.memos = state

    async def theirs(_: Any, error: Exception) -> Any:
        seen.append(type(error).__name__)

    for kind in (RequestValidationError, HTTPException, Exception):
        made.add_exception_handler(kind, theirs)
    yield made
    store.close()
    state.adapters.registry.close()


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, headers=KEY, raise_server_exceptions=False)


def message_of(response: Any) -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == 400
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    return error["message"]


def test_there_are_such_parameters() -> None:
    assert {name for _, _, name in parameters()} >= {"limit", "include_superseded", "adapters"}


@pytest.mark.parametrize(("method", "path", "name"), parameters(), ids=lambda value: value)
@pytest.mark.parametrize("value", ["x", "", "1" * 5000])
def test_a_value_of_another_type(
    client: TestClient, seen: list[str], method: str, path: str, name: str, value: str
) -> None:
    assert f"'{name}'" in message_of(client.request(method, f"{path}?{name}={value}"))
    assert seen == []


@pytest.mark.parametrize(("method", "path", "name"), [("POST", "/v1/memos/kv/drop", "tier")])
def test_a_parameter_that_is_missing(client: TestClient, seen: list[str], method: str, path: str, name: str) -> None:
    assert f"'{name}'" in message_of(client.request(method, path))
    assert seen == []


@pytest.mark.parametrize("query", ["state=x", "type=x", "limit=0", "after=x", "colour=red"])
def test_an_unknown_value(client: TestClient, seen: list[str], query: str) -> None:
    message_of(client.get(f"/v1/memories?{query}"))
    assert seen == []


@pytest.mark.parametrize("path", ["/v1/memories/documents", "/v1/adapters"])
@pytest.mark.parametrize("boundary", ["", "; boundary=x"])
def test_a_form_that_is_none(client: TestClient, seen: list[str], path: str, boundary: str) -> None:
    response = client.post(path, content=b"junk", headers={"content-type": f"multipart/form-data{boundary}"})
    assert response.status_code in (400, 409) and response.json()["error"]["message"]
    assert seen == []


@pytest.mark.parametrize("path", ["/v1/memories", "/v1/memories/search", "/v1/memories/import"])
def test_a_client_that_leaves_in_its_body(app: FastAPI, seen: list[str], path: str) -> None:
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"", "server": ("x", 80),
        "client": ("x", 1), "headers": [(name.encode(), value.encode()) for name, value in KEY.items()],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400 and seen == []
