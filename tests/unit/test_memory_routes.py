"""The memory routes without a model: what they call, what they answer, and that KV of a deletion goes in the end."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.api_keys import digest_of
from memos_vllm.config import IdentityConfig, MemoryConfig, MemosConfig
from memos_vllm.integration import engine_channel, life, memories, salts
from memos_vllm.integration.adapter_gate import AdapterGate
from memos_vllm.integration.caretaker import Caretaker
from memos_vllm.integration.home_engine import HomeEngines
from memos_vllm.integration.identity import resolve
from memos_vllm.integration.memory_metrics import MemoryMetrics
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.adapters.adapter_factories import open_registry
from tests.memory.memory_factories import Clock

SECRET = b"s" * 32


class Engine:
    """Notes which salts it is told to forget; fails while it is down."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.is_down = False

    async def call(self, _: Any, op: str, payload: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        if self.is_down:
            raise ConnectionError("the engine is down")
        assert op == "forget" and payload
        self.forgotten.append(payload["salt"])
        return [{"gpu_blocks": 3, "host_blocks": 1, "disk_blocks": 2, "scenes": 0}]


class Nobody:
    """In the place of what predicts and builds."""

    def forget(self, who: Principal) -> None:
        pass

    def turn_ended(self, scene_id: str, lengths: object = None) -> None:
        pass


def state_with(service: MemoryService, data_dir: Path) -> MemosState:
    config = MemosConfig(data_dir=data_dir)
    engine: Any = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=None))
    metrics = MemoryMetrics()
    adapters = AdapterGate(engine, open_registry(data_dir / "adapters"), config.adapters, metrics)
    nobody: Any = Nobody()
    return MemosState(
        config, service, engine, HomeEngines(engine), SECRET, nobody, nobody, metrics, adapters, count_tokens=len
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(engine_channel, "call", made.call)
    return made


@pytest.fixture
def state(tmp_path: Path, engine: Engine) -> Iterator[MemosState]:
    store = MemoryStore(tmp_path, 2**30)
    service = MemoryService(store, MemoryConfig(), now=Clock())
    made = state_with(service, tmp_path)
    yield made
    store.close()
    made.adapters.registry.close()


@pytest.fixture
def client(state: MemosState) -> TestClient:
    app = FastAPI()
    for router in (life.router, memories.router):
        app.include_router(router)
    app.state.memos = state
    return TestClient(app, headers={"authorization": "Bearer alice"}, raise_server_exceptions=False)


BOB = {"authorization": "Bearer bob"}


def who(key: str = "alice") -> Principal:
    tenant = hashlib.sha256(key.encode()).hexdigest()
    return Principal(tenant, "")


def add(client: TestClient, text: str, **values: Any) -> str:
    return client.post("/v1/memories", json={"text": text, **values}).json()["id"]


def data(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    return response.json()["data"]


def test_states_by_patch(client: TestClient) -> None:
    memory = add(client, "I like tea.", priority=2, sensitivity="sensitive", ttl_s=60, valid_from="2020-01-01")
    path = f"/v1/memories/{memory}"
    assert client.get(path).json()["expires_at"] is not None
    assert client.patch(path, json={"state": "frozen"}).json()["state"] == "frozen"
    refused = client.patch(path, json={"text": "x"})
    assert refused.status_code == 409 and "frozen" in refused.json()["error"]["message"]
    assert client.patch(path, json={"state": "activated"}).json()["state"] == "activated"
    assert client.patch(path, json={"ttl_s": 0, "priority": -1}).json()["expires_at"] is None
    assert client.patch(path, json={"state": "archived"}).json()["state"] == "archived"
    assert [each["id"] for each in data(client.get("/v1/memories?state=archived"))] == [memory]
    assert data(client.get("/v1/memories?state=frozen")) == []
    assert data(client.post("/v1/memories/search", json={"query": "tea"})) == []
    found = data(client.post("/v1/memories/search", json={"query": "tea", "include_archived": True}))
    assert [each["id"] for each in found] == [memory]
    assert [event["kind"] for event in data(client.get(path + "/log"))] == ["frozen", "activated", "archived"]


def test_an_export_has_what_was_superseded(client: TestClient, state: MemosState) -> None:
    alice = resolve({"authorization": "Bearer alice"}, state.config.identity).principal
    for job in ("baker", "pilot", "farmer"):
        state.service.remember(alice, [{"role": "user", "content": f"My job is {job}."}])
    texts = lambda query: [each["text"] for each in data(client.get(f"/v1/memories{query}"))]  # noqa: E731
    assert texts("") == ["My job is farmer."]
    assert texts("?include_superseded=true") == [f"My job is {job}." for job in ("baker", "pilot", "farmer")]
    page = client.get("/v1/memories?include_superseded=true&limit=2").json()
    assert len(page["data"]) == 2 and texts(f"?include_superseded=true&after={page['next']}") == ["My job is farmer."]


def test_history_cube_and_merge(client: TestClient) -> None:
    kept, copy = add(client, "I like tea.", tags=["a"]), add(client, "Tea is good.", tags=["b"])
    path = f"/v1/memories/{kept}"
    merged = client.post(path + "/merge", json={"with": [copy], "text": "I like good tea."}).json()
    assert (merged["text"], merged["tags"]) == ("I like good tea.", ["a", "b"])
    assert [each["text"] for each in data(client.get(path + "/history"))] == [
        "Tea is good.", "I like tea.", "I like good tea.",
    ]  # fmt: skip
    cube = client.get(path + "/cube").json()
    assert cube["payload"]["text"] == "I like good tea." and len(cube["links"]) == 1


def test_links(client: TestClient) -> None:
    ann, bob = add(client, "Ann bakes."), add(client, "Bob flies.")
    made = client.post(f"/v1/memories/{ann}/links", json={"to": bob, "type": "married_to"}).json()
    assert (made["from"], made["to"], made["valid_to"]) == (ann, bob, None)
    assert data(client.get(f"/v1/memories/{bob}/links")) == [made]
    assert data(client.get(f"/v1/memories/{bob}/links?type=other")) == []
    assert client.post(f"/v1/memories/links/{made['id']}/end").json()["valid_to"] is not None
    assert client.delete(f"/v1/memories/links/{made['id']}").json()["deleted"] is True
    assert data(client.get(f"/v1/memories/{ann}/links")) == []


def test_snapshots_and_rollback(client: TestClient) -> None:
    memory = add(client, "I like tea.")
    snapshot = client.post("/v1/memories/snapshots", json={"name": "before"}).json()
    assert data(client.get("/v1/memories/snapshots")) == [snapshot]
    client.patch(f"/v1/memories/{memory}", json={"text": "I like milk."})
    later = add(client, "Later.")
    done = client.post(f"/v1/memories/snapshots/{snapshot['id']}/rollback").json()
    assert (done["restored"], done["archived"]) == ([memory], [later])
    assert client.get(f"/v1/memories/{memory}").json()["text"] == "I like tea."
    assert client.delete(f"/v1/memories/snapshots/{snapshot['id']}").json()["deleted"] is True
    assert data(client.get("/v1/memories/snapshots")) == []


def test_nobody_else_reaches_any_of_it(client: TestClient) -> None:
    memory, other = add(client, "I like tea."), add(client, "I like milk.")
    link = client.post(f"/v1/memories/{memory}/links", json={"to": other, "type": "related_to"}).json()["id"]
    snapshot = client.post("/v1/memories/snapshots", json={"name": "s"}).json()["id"]
    calls = [
        *(("GET", f"{memory}/{part}", None) for part in ("history", "cube", "log", "links")),
        ("PATCH", memory, {"state": "frozen"}),
        ("POST", f"{memory}/merge", {"with": [other]}),
        ("POST", f"{memory}/links", {"to": other, "type": "x"}),
        ("POST", f"links/{link}/end", None),
        ("DELETE", f"links/{link}", None),
        ("POST", f"snapshots/{snapshot}/rollback", None),
        ("DELETE", f"snapshots/{snapshot}", None),
    ]
    for method, path, body in calls:
        response = client.request(method, f"/v1/memories/{path}", json=body, headers=BOB)
        assert response.status_code == 404, (method, path, response.text)
        assert (
            client.request(method, f"/v1/memories/{path}", json=body, headers={"authorization": ""}).status_code == 401
        )
    assert data(client.get("/v1/memories/snapshots", headers=BOB)) == []
    assert len(data(client.get(f"/v1/memories/{memory}/links"))) == 1


def test_a_new_key_takes_over_what_an_unlisted_one_had(client: TestClient, state: MemosState) -> None:
    """As docs/MEMORY.md tells it."""
    own = add(client, "I like tea.")
    named = add(client, "I like milk.", user="u1")
    tenant = "key-" + hashlib.sha256(b"alice").hexdigest()[:32]
    assert client.get(f"/v1/memories/{own}").json()["tenant"] == tenant
    salt = state.salt(Principal(tenant, "default"))

    def restart_with(keys: dict[str, Any]) -> None:
        identity = IdentityConfig.model_validate({"keys": keys})
        state.config = state.config.model_copy(update={"identity": identity})

    new, old = {"authorization": "Bearer new"}, {"authorization": "Bearer alice"}
    restart_with({digest_of("new"): {"tenant": tenant, "user": "default"}, digest_of("alice"): {"tenant": "retired"}})
    assert [each["id"] for each in data(client.get("/v1/memories", headers=new))] == [own]
    assert salt == state.salt(resolve(new, state.config.identity).principal), "its KV is found, too"
    assert data(client.get("/v1/memories?user=default", headers=old)) == []
    restart_with({digest_of("new"): {"tenant": tenant}})
    assert [each["id"] for each in data(client.get("/v1/memories?user=u1", headers=new))] == [named]
    assert [each["id"] for each in data(client.get("/v1/memories", headers=old))] == [own], "not yet retired"


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("PATCH", "{id}", {"state": "frozen", "text": "x"}, "'state' stands alone"),
        ("PATCH", "{id}", {"state": "merged"}, "'state' can be set to"),
        ("PATCH", "{id}", {"priority": 9}, "'priority'"),
        ("PATCH", "{id}", {"text": " "}, "'text' is empty"),
        ("POST", "", {"text": "x", "ttl_s": -1}, "'ttl_s'"),
        ("POST", "", {"text": "x", "valid_from": "yesterday"}, "'valid_from'"),
        ("POST", "", {"text": "x", "sensitivity": "top"}, "unknown sensitivity"),
        ("POST", "{id}/merge", {"with": []}, "'with'"),
        ("POST", "{id}/links", {"to": "{id}", "type": "x"}, "itself"),
        ("POST", "{id}/links", {"to": "x"}, "'type'"),
        ("POST", "snapshots", {"name": ""}, "'name'"),
        ("POST", "snapshots", {}, "'name'"),
        ("GET", "{id}/links?at=x", None, "'at'"),
        ("GET", "?state=x", None, "unknown state"),
    ],
)
def test_bad_requests_are_one_clear_sentence(client: TestClient, method: str, path: str, body: Any, words: str) -> None:
    memory = add(client, "I like tea.")
    if body and "to" in body:
        body = {**body, "to": body["to"].format(id=memory)}
    separator = "" if not path or path.startswith("?") else "/"
    response = client.request(method, f"/v1/memories{separator}{path.format(id=memory)}", json=body)
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and words in message and "\n" not in message


class TestPastKV:
    def test_a_deletion_removes_it_and_says_so(self, client: TestClient, engine: Engine, state: MemosState) -> None:
        memory = add(client, "I like tea.")
        receipt = client.delete(f"/v1/memories/{memory}").json()
        assert receipt["kv"] == {"gpu_blocks": 3, "host_blocks": 1, "disk_blocks": 2, "scenes": 0}
        owner = state.service.users_with_past_kv()
        assert owner == [] and len(engine.forgotten) == 1

    def test_what_a_failing_engine_left_is_removed_later(
        self, client: TestClient, engine: Engine, state: MemosState
    ) -> None:
        memory = add(client, "I like tea.")
        engine.is_down = True
        assert client.delete(f"/v1/memories/{memory}").status_code == 500
        assert client.get(f"/v1/memories/{memory}").status_code == 404
        (owner,) = state.service.users_with_past_kv()
        engine.is_down = False
        asyncio.run(Caretaker(state).look_after())
        assert engine.forgotten == [salts.salt_of(SECRET, owner, 0)]
        assert state.service.users_with_past_kv() == []

    def test_it_survives_a_restart(self, tmp_path: Path, engine: Engine) -> None:
        alice = who()
        for expected in ([], [salts.salt_of(SECRET, alice, 0), salts.salt_of(SECRET, alice, 1)]):
            store = MemoryStore(tmp_path / "memory", 2**30)
            service = MemoryService(store, MemoryConfig())
            state = state_with(service, tmp_path)
            asyncio.run(Caretaker(state).look_after())
            assert engine.forgotten == expected
            for _ in range(2):
                service.delete(alice, service.add(alice, "secret").id)
            store.close()
            state.adapters.registry.close()
