"""Export and import over HTTP: whose it is, what is too large, what is refused, and that files do not stay."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.config import IdentityConfig, MemoryConfig, MemosConfig
from memos_vllm.integration import portability
from memos_vllm.integration.endpoints import routers
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from tests.memory.memory_factories import Clock
from tests.unit.test_memory_routes import state_with

EXPORT, IMPORT = "/v1/memories/export", "/v1/memories/import"
KEYS = {"app": {"tenant": "shop"}, "carol": {"tenant": "shop", "user": "carol"}}
LIMIT = 20_000


@pytest.fixture
def state(tmp_path: Path) -> Iterator[MemosState]:
    store = MemoryStore(tmp_path / "memory", 2**30)
    config = MemoryConfig(max_user_memories=3, max_import_bytes=LIMIT)
    made = state_with(MemoryService(store, config, now=Clock()), tmp_path)
    identity = IdentityConfig.model_validate({"keys": KEYS})
    made.config = made.config.model_copy(update={"identity": identity, "memory": config})
    yield made
    store.close()
    made.adapters.registry.close()


@pytest.fixture
def call(state: MemosState) -> Callable[..., Any]:
    app = FastAPI()
    for router in routers(development=False):
        app.include_router(router)
    app.state.memos = state
    client = TestClient(app, raise_server_exceptions=False)

    def call(method: str, path: str, key: str = "carol", **options: Any) -> Any:
        return client.request(method, path, headers={"authorization": f"Bearer {key}"}, **options)

    return call


def add(call: Callable[..., Any], text: str, key: str = "carol", **values: Any) -> Any:
    return call("POST", "/v1/memories", key, json={"text": text, **values}).json()


def test_one_call_gives_all_and_one_takes_it(call: Callable[..., Any]) -> None:
    memory, bob = add(call, "I like 烏龍茶.", tags=["tea"]), add(call, "What Bob said.", "app", user="bob")
    told = call("GET", EXPORT)
    assert told.headers["content-type"] == "application/jsonl" and "attachment" in told.headers["content-disposition"]
    header, only = (json.loads(line) for line in told.content.splitlines())
    assert (header["format"], header["version"], header["memories"]) == ("memos-memories", 1, 1)
    assert only["memory"] == memory
    assert call("GET", f"{EXPORT}?user=bob", "app").content.count(bob["id"].encode()) == 1
    receipt = call("POST", f"{IMPORT}?user=dora", "app", content=told.content)
    assert receipt.json() == {
        "object": "import", "memories": 1, "known": 0, "versions": 0, "links": 0, "mapped": {},
    }  # fmt: skip
    dora = call("GET", "/v1/memories?user=dora", "app").json()["data"]
    assert dora == [{**memory, "user": "dora"}]
    assert call("POST", IMPORT, content=told.content).json()["known"] == 1


def test_nobody_reaches_another_user(call: Callable[..., Any]) -> None:
    for method, path in (("GET", EXPORT), ("POST", IMPORT)):
        assert call(method, f"{path}?user=bob").status_code == 403
        assert call(method, path, "").status_code == 401
        assert call(method, path, "app").status_code == 400


def test_what_is_refused_leaves_nothing(call: Callable[..., Any]) -> None:
    for number in range(3):
        add(call, f"Note {number}.")
    told = call("GET", EXPORT).content
    add(call, "One more.", "app", user="dora")
    many = call("POST", f"{IMPORT}?user=dora", "app", content=told)
    assert many.status_code == 409 and "memory.max_user_memories (3)" in many.text
    broken = call("POST", f"{IMPORT}?user=erin", "app", content=told.replace(b'"text":"Note 1."', b'"text":1'))
    assert broken.status_code == 400 and "line 3: 'text' must be a string" in broken.json()["error"]["message"]
    assert len(call("GET", "/v1/memories?user=dora", "app").json()["data"]) == 1
    assert call("GET", "/v1/memories?user=erin", "app").json()["data"] == []


@pytest.mark.parametrize("says_its_length", [True, False])
def test_what_is_too_large_is_refused(call: Callable[..., Any], says_its_length: bool) -> None:
    pieces = [b"x" * 1000] * (LIMIT // 1000 + 1)
    response = call("POST", IMPORT, content=b"".join(pieces) if says_its_length else iter(pieces))
    assert response.status_code == 413 and "memory.max_import_bytes" in response.json()["error"]["message"]


def test_no_file_stays(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, made = portability._spool, []

    def noted(config: MemosConfig) -> Any:
        made.append(spool(config))
        return made[-1]

    monkeypatch.setattr(portability, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(portability, "_spool", noted)
    add(call, "x" * 5000)
    before = sorted(os.listdir(tmp_path))
    told = call("GET", EXPORT).content
    assert call("POST", IMPORT, content=told).status_code == 200
    assert call("POST", IMPORT, content=told[:-9]).status_code == 400
    assert call("POST", IMPORT, content=b"x" * (LIMIT + 1)).status_code == 413
    assert sorted(os.listdir(tmp_path)) == before
    assert [file.closed for file in made] == [True] * 4


def test_a_full_disk_is_507(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for call_it in (lambda: call("GET", EXPORT), lambda: call("POST", IMPORT, content=b"x")):
        with open("/dev/full", "r+b", buffering=0) as full:
            monkeypatch.setattr(portability, "_spool", lambda config, full=full: full)
            response = call_it()
        assert response.status_code == 507 and "has no room" in response.json()["error"]["message"]
