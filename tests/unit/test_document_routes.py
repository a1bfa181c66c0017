"""The routes of documents without a model: both ways to send one, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.config import MemoryConfig
from memos_vllm.integration import documents, engine_channel, life, memories
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from tests.memory.document_factories import make_pdf, markdown
from tests.unit.test_memory_routes import BOB, Engine, data, state_with

PATH = "/v1/memories/documents"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(engine_channel, "call", Engine().call)
    store = MemoryStore(tmp_path, 2**30)
    state = state_with(MemoryService(store, MemoryConfig()), tmp_path)
    app = FastAPI()
    for router in (documents.router, life.router, memories.router):
        app.include_router(router)
    app.state.memos = state
    yield TestClient(app, headers={"authorization": "Bearer alice"}, raise_server_exceptions=False)
    store.close()
    state.adapters.registry.close()


def put(client: TestClient, content: bytes, query: str = "name=guide.md", **headers: str) -> Any:
    return client.post(f"{PATH}?{query}", content=content, headers=headers)


def test_store_list_read_delete(client: TestClient) -> None:
    stored = put(client, markdown("train", "ferry"), "name=a/guide.md&tags=x&tags=y&pinned=true&cube=trips").json()
    assert (stored["name"], stored["added"], len(stored["memories"])) == ("a/guide.md", 2, 2)
    (listed,) = data(client.get(PATH))
    assert (listed["name"], listed["pieces"], listed["content_type"]) == ("a/guide.md", 2, "text/markdown")
    read = client.get(f"{PATH}/a/guide.md").json()
    assert [each["id"] for each in read["data"]] == stored["memories"]
    assert {(*each["tags"], each["pinned"]) for each in read["data"]} == {("x", "y", True)}
    found = data(client.post("/v1/memories/search", json={"query": "ferry", "cube": "trips"}))
    assert found[0]["origin"]["document"]["section"] == ["Guide"]
    again = put(client, markdown("train", "boat"), "name=a/guide.md").json()
    assert (again["kept"], again["superseded"], again["memories"][0]) == (1, 1, stored["memories"][0])
    receipt = client.delete(f"{PATH}/a/guide.md").json()
    assert receipt["deleted"] is True and len(receipt["records"]) == 3
    assert receipt["kv"] == {"host_blocks": 1, "disk_blocks": 2, "gpu_blocks": 3, "scenes": 0}, (
        "one epoch for all pieces"
    )
    assert data(client.get(PATH)) == [] and client.get(f"{PATH}/a/guide.md").status_code == 404


def test_a_form_has_a_file(client: TestClient) -> None:
    file = ("prices.pdf", make_pdf([["Rooms cost 120 euros."]]), "application/pdf")
    assert client.post(PATH, files={"file": file}, data={"tags": ["x", "y"]}).json()["name"] == "prices.pdf"
    named = client.post(PATH, files={"file": file}, data={"name": "other.pdf"}).json()
    assert named["name"] == "other.pdf" and len(data(client.get(PATH))) == 2
    (piece,) = client.get(f"{PATH}/prices.pdf").json()["data"]
    assert piece["tags"] == ["x", "y"] and piece["origin"]["document"]["page"] == 1


def test_nobody_else_has_it(client: TestClient) -> None:
    put(client, markdown("train"))
    assert data(client.get(PATH, headers=BOB)) == []
    for method in ("GET", "DELETE"):
        assert client.request(method, f"{PATH}/guide.md", headers=BOB).status_code == 404
    assert client.get(PATH, headers={"authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    ("query", "content", "headers", "status", "words"),
    [
        ("", b"x", {}, 400, "no name"),
        ("name=x", b"x", {}, 415, "content type"),
        ("name=x", b"x", {"content-type": "image/png"}, 415, "image/png"),
        ("name=x.md", b"", {}, 400, "empty"),
        ("name=x", b"x", {"content-type": "text/plain; charset=undefined"}, 400, "charset 'undefined'"),
        ("name=x", b"x", {"content-type": "text/plain; charset=punycode"}, 400, "charset 'punycode'"),
        ("name=x.pdf", b"torn", {}, 400, "damaged"),
        ("name=x.pdf", make_pdf([["x"]], password="p"), {}, 400, "encrypted"),
        ("name=x.md&colour=1", b"x", {}, 400, "'colour'"),
        ("name=x.md&pinned=maybe", b"x", {}, 400, "'pinned'"),
        ("name=x.md", b"x" * (16 * 2**20 + 1), {}, 413, "max_bytes"),
        ("name=" + "x" * 300, b"x", {"content-type": "text/plain"}, 400, "'name'"),
        ("name=x.md&user=bob", b"x", {}, 200, ""),
    ],
)
def test_bad_requests_are_one_clear_sentence(
    client: TestClient, query: str, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    response = put(client, content, query, **headers)
    assert response.status_code == status, response.text
    if status != 200:
        message = response.json()["error"]["message"]
        assert words in message and "\n" not in message and data(client.get(PATH)) == []


def test_without_a_length_nothing_is_read(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"

    response = client.post(f"{PATH}?name=x.md", content=chunks())
    assert response.status_code == 411 and "Content-Length" in response.json()["error"]["message"]


def test_too_long_a_request_is_refused_before_it_is_read(client: TestClient) -> None:
    response = put(client, b"x", "name=x.txt", **{"content-length": str(2**40)})
    assert response.status_code == 413 and "max_bytes" in response.json()["error"]["message"]


def test_a_form_without_a_file(client: TestClient) -> None:
    response = client.post(PATH, files={"wrong": ("x.md", b"x")})
    assert response.status_code == 400 and "'file'" in response.json()["error"]["message"]


def test_reading_a_document_takes_no_thread_that_chat_needs(client: TestClient) -> None:
    state = client.app.state.memos  # type: ignore[attr-defined]
    put_document, threads = state.service.documents.put, []

    def note(*args: Any, **given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return put_document(*args, **given)

    state.service.documents.put = note
    assert put(client, b"# x").status_code == 200
    assert threads[0].startswith("memos-documents")
