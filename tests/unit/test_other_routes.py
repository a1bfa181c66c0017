"""Routes without memory refuse what asks for it, and see everything else as it came."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from memos_vllm.integration.other_routes import WITHOUT_MEMORY, RefusesMemory


def client_of(root_path: str = "") -> TestClient:
    app = FastAPI()

    @app.post("/{path:path}")
    async def echo(path: str, request: Request) -> StreamingResponse:
        read = [chunk async for chunk in request.stream()]
        return StreamingResponse(iter(read))

    app.add_middleware(RefusesMemory)
    return TestClient(app, root_path=root_path)


@pytest.mark.parametrize("path", sorted(WITHOUT_MEMORY))
@pytest.mark.parametrize("field", [True, {"user": "u"}, {}, "yes", 1])
def test_what_asks_for_memory_is_refused(path: str, field: Any) -> None:
    response = client_of().post(path, json={"prompt": "x", "memos": field})
    assert response.status_code == 400 and "/v1/chat/completions only" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x"}',
        b'{"memos": false}',
        b'{"memos": null, "prompt": "x"}',
        b'{"prompt": "say \\"memos\\""}',
        b'{"metadata": {"memos": true}}',
        b'["memos"]',
        b'{"memos": tru',
        b'\xff"memos"',
        b"",
    ],
)
def test_everything_else_comes_through_as_it_is(body: bytes) -> None:
    response = client_of().post("/v1/completions", content=body)
    assert (response.status_code, response.content) == (200, body)


def test_a_body_in_pieces_is_read_as_a_whole_and_handed_on_whole() -> None:
    pieces = [b'{"prompt": "' + b"x" * 100_000, b'", "me', b'mos": true}']
    assert client_of().post("/v1/responses", content=iter(pieces)).status_code == 400
    pieces[-1] = b'mos": false}'
    assert client_of().post("/v1/responses", content=iter(pieces)).content == b"".join(pieces)


def test_other_routes_and_a_root_path() -> None:
    body = {"memos": True}
    assert client_of().post("/v1/chat/completions", json=body).json() == body
    assert client_of().post("/v1/embeddings", json=body).json() == body
    assert client_of("/api").post("/api/v1/completions", json=body).status_code == 400


def test_a_client_that_leaves_is_noticed_by_the_route() -> None:
    seen: list[str] = []
    sent = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    async def receive() -> Any:
        return next(sent)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    asyncio.run(RefusesMemory(app)(scope, receive, None))
    assert seen == ["http.request", "http.disconnect"]
