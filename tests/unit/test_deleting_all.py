"""DELETE /v1/memories: it takes everything of one user, so it must be meant, and says whose it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.adapters.records import Scope
from memos_vllm.adapters.registry import AdapterRegistry
from memos_vllm.config import MemoryConfig, MemosConfig
from memos_vllm.core.predictor import Predictor
from memos_vllm.core.scenes import Scene
from memos_vllm.integration import chat, documents, engine_channel, life, memories, missing_ids, scenes
from memos_vllm.integration.predictor_file import ForgottenOwners
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.results import Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.adapters.adapter_factories import adapter_folder
from tests.unit.test_memory_routes import Engine, add, data, state_with

CAROL, BOB = Principal("shop", "carol"), Principal("shop", "bob")
IDENTITY = {"keys": {"app": {"tenant": "shop"}, "carol": {"tenant": "shop", "user": "carol"}}}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(engine_channel, "call", made.call)
    return made


@pytest.fixture
def state(tmp_path: Path, engine: Engine) -> Iterator[MemosState]:
    store = MemoryStore(tmp_path, 2**30)
    made = state_with(MemoryService(store, MemoryConfig()), tmp_path)
    made.config = MemosConfig.model_validate({"data_dir": str(tmp_path), "identity": IDENTITY})
    yield made
    store.close()
    made.adapters.registry.close()


@pytest.fixture
def client(state: MemosState) -> TestClient:
    app = FastAPI()
    for module in (documents, life, memories, missing_ids, scenes):
        app.include_router(module.router)
    app.state.memos = state
    return TestClient(app, headers={"authorization": "Bearer carol"}, raise_server_exceptions=False)


def refusal(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    message: str = response.json()["error"]["message"]
    assert "\n" not in message
    return message


def test_it_says_whose_memory_went(client: TestClient) -> None:
    add(client, "I like tea.")
    receipt = client.delete("/v1/memories").json()
    assert (receipt["tenant"], receipt["user"], len(receipt["records"])) == ("shop", "carol", 1)
    app = {"authorization": "Bearer app"}
    assert client.delete("/v1/memories?user=alice", headers=app).json()["user"] == "alice"
    assert "name the user" in refusal(client.delete("/v1/memories", headers=app), 400)


@pytest.mark.parametrize("query", ["tag=work", "session=s", "user=carol&type=fact", "all"])
def test_a_filter_is_not_taken_for_everything(client: TestClient, query: str) -> None:
    add(client, "I like tea.", tags=["work"])
    message = refusal(client.delete(f"/v1/memories?{query}"), 400)
    assert "only user, adapters" in message and "delete each by its id" in message
    assert "'tag'" in message or "tag" not in query
    assert len(data(client.get("/v1/memories"))) == 1


@pytest.mark.parametrize("path", ["/v1/memories", "/v1/scenes"])
def test_a_body_that_would_not_be_read_is_refused(client: TestClient, path: str, engine: Engine) -> None:
    add(client, "I like tea.")
    for body in (b'{"user": "alice"}', b"{}"):
        assert "?user=" in refusal(client.request("DELETE", path, content=body), 400)
    assert len(data(client.get("/v1/memories"))) == 1 and engine.forgotten == []


@pytest.mark.parametrize("path", ["/v1/memories/", "/v1/memories//", "/v1/memories///?user=carol"])
def test_an_empty_id_is_not_everything(client: TestClient, path: str) -> None:
    add(client, "I like tea.")
    assert "id of a memory is missing" in refusal(client.delete(path), 404)
    assert len(data(client.get("/v1/memories"))) == 1


def test_what_is_being_said_meanwhile_does_not_come_back(state: MemosState) -> None:
    """The answer is still generated while everything is deleted."""
    state.planner = SimpleNamespace(turn_ended=lambda *_: None)  # type: ignore[assignment]

    def say(between: Callable[[], Any]) -> list[str]:
        messages = [{"role": "user", "content": "My job is baker."}]
        turn = asyncio.run(chat.begin(chat.Turn(CAROL, chat.MemosField(), messages, [], "request"), state))
        between()
        asyncio.run(chat.end_turn(turn, Recall((), ()), "scene", state, []))
        return [record.text for record in state.service.list(CAROL).records]

    assert say(lambda: state.service.delete_all(CAROL)) == []
    assert say(lambda: None) == ["My job is baker."]


@pytest.fixture
def with_adapters(state: MemosState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterRegistry:
    """Two adapters of Carol, one shared with her tenant; one of Bob's, which is her default."""

    async def call(*_: Any) -> list[dict[str, Any]]:
        return [{"gpu_blocks": 1, "host_blocks": 1, "disk_blocks": 1, "scenes": 0}]

    monkeypatch.setattr(engine_channel, "call", call)
    registry = state.adapters.registry
    for seed, (owner, name, scope) in enumerate(
        [(CAROL, "style", Scope.USER), (CAROL, "ours", Scope.TENANT), (BOB, "bobs", Scope.TENANT)]
    ):
        registry.register(owner, name, adapter_folder(tmp_path / name, seed), scope)
    registry.set_profile(CAROL, "bobs")
    registry.set_profile(BOB, "ours")
    return registry


def test_the_receipt_says_what_of_the_user_is_left(client: TestClient, with_adapters: AdapterRegistry) -> None:
    left = client.delete("/v1/memories").json()["left"]
    assert left["adapters"] == ["style@1", "ours@1"] and left["default_adapter"] == "bobs"
    assert left["delete_with"] == "DELETE /v1/memories?adapters=true"
    assert len(with_adapters.list(CAROL)) == 3


def test_adapters_and_the_default_go_with_it_where_that_is_asked_for(
    client: TestClient, with_adapters: AdapterRegistry
) -> None:
    receipt = client.delete("/v1/memories?adapters=true").json()
    own = receipt["own_adapters"]
    assert (own["adapters"], own["profiles"], own["contents"]) == (["style@1", "ours@1"], 2, 2)
    assert receipt["left"] is None
    assert [each.name for each in with_adapters.list(CAROL)] == ["bobs"], "somebody else's, shared with her"
    assert with_adapters.profile(CAROL) is None and with_adapters.profile(BOB) is None


def test_other_methods_are_redirected_as_before(client: TestClient) -> None:
    assert client.post("/v1/memories/", json={"text": "I like tea."}).json()["text"] == "I like tea."
    assert len(data(client.get("/v1/memories/?limit=1"))) == 1
    assert refusal(client.patch("/v1/memories/", json={}), 404)


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("GET", "/v1/memories?tags=work", "tag"),
        ("GET", "/v1/memories/snapshots?name=x", "user"),
        ("GET", "/v1/memories/documents?tag=x", "user"),
        ("GET", "/v1/memories/some-id?session=s", "user"),
        ("POST", "/v1/memories?user=carol", "the body"),
        ("DELETE", "/v1/scenes?session=s", "user"),
        ("DELETE", "/v1/memories/documents/a.md?edition=1", "user"),
    ],
)
def test_no_route_passes_over_a_query_parameter(
    client: TestClient, engine: Engine, method: str, path: str, known: str
) -> None:
    message = refusal(client.request(method, path, json={"text": "x"} if method == "POST" else None), 400)
    assert "knows no query parameter" in message and known in message.split("only")[1]
    assert data(client.get("/v1/memories")) == [] and engine.forgotten == []


@pytest.mark.parametrize(
    ("log", "status", "words"), [("/dev/full", 507, "free some space"), ("/proc/version", 500, "check its owner")]
)
def test_a_deletion_that_cannot_be_written_down_says_so_and_deletes_nothing(
    client: TestClient, state: MemosState, engine: Engine, log: str, status: int, words: str
) -> None:
    forgotten = ForgottenOwners(Path(log), b"secret")
    state.planner = SimpleNamespace(forget=lambda who: forgotten.add(str(who)))  # type: ignore[assignment]
    add(client, "I like tea.")
    message = refusal(client.delete("/v1/memories"), status)
    assert "nothing was deleted" in message and words in message
    assert len(data(client.get("/v1/memories"))) == 1 and engine.forgotten == []


def test_a_line_that_a_full_disk_tore_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "forgotten_owners"
    path.write_bytes(b"1764000000.12")
    predictor = Predictor()
    for who in (CAROL, BOB):
        predictor.add(Scene(f"scene of {who.user}", owner=str(who)))
    ForgottenOwners(path, b"secret").add(str(CAROL))
    ForgottenOwners(path, b"secret").take_news(predictor)
    assert predictor.owners() == {str(BOB)}
