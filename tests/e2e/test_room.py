"""What memory must not cost: a request that fits without it, or a route that has none."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from tests.e2e.conftest import Memos

pytestmark = pytest.mark.e2e

FACT, LATE = "My favourite drink is oolong tea.", "The ferry to the island leaves at seven. " * 12
MAX_TOKENS = 32
EXPLAINED = {"explain": True, "remember": False}
WORD = "?"
"""One token, however often it is repeated."""


@pytest.fixture
def key() -> str:
    """A user with a memory that stands in every prompt, and one that is recalled for questions about ferries."""
    return f"key-{uuid.uuid4().hex}"


@pytest.fixture
def ids(memos: Memos, key: str) -> list[str]:
    bodies = {"text": FACT}, {"text": LATE, "type": "document"}
    return [memos.call("POST", "/v1/memories", key, json=body).json()["id"] for body in bodies]


def conversation(memos: Memos, room: int) -> list[dict[str, Any]]:
    """That leaves so many tokens of the context, as a client counts them."""
    max_model_len = memos.call("GET", "/v1/models").json()["data"][0]["max_model_len"]
    said = {"role": "user", "content": ""}
    messages = [said, {"role": "assistant", "content": "Noted."}, {"role": "user", "content": "When is the ferry?"}]

    def count() -> int:
        body = {"model": memos.server.model, "messages": messages, "add_generation_prompt": True}
        return int(memos.call("POST", "/tokenize", json=body).json()["count"])

    said["content"] = WORD * (max_model_len - room - count())
    assert count() == max_model_len - room
    return messages


def ask(memos: Memos, key: str, messages: list[dict[str, Any]], field: Any = EXPLAINED, **options: Any) -> Any:
    body = {"model": memos.server.model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
    return memos.call("POST", "/v1/chat/completions", key, json={**body, "memos": field, **options})


@pytest.mark.parametrize(("room", "num_left"), [(MAX_TOKENS + 4, 0), (MAX_TOKENS + 60, 1), (MAX_TOKENS + 400, 2)])
def test_memory_gives_way_to_a_conversation_that_fits_without_it(
    memos: Memos, key: str, ids: list[str], room: int, num_left: int
) -> None:
    messages = conversation(memos, room)
    response = ask(memos, key, messages)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["usage"]["prompt_tokens"] + MAX_TOKENS <= 8192
    assert [each["id"] for each in answer["memos"]["recalled"]] == ids[:num_left]
    assert answer["memos"]["left_out"] == ids[num_left:]
    assert response.headers["x-memos-recalled"] == ",".join(ids[:num_left])
    streamed = ask(memos, key, messages, stream=True)
    assert streamed.status_code == 200 and streamed.text.rstrip().endswith("data: [DONE]")
    assert streamed.headers["x-memos-recalled"] == ",".join(ids[:num_left])


def test_what_does_not_fit_without_memory_is_vllms_to_refuse(memos: Memos, key: str, ids: list[str]) -> None:
    messages = conversation(memos, -1)
    refused = ask(memos, key, messages)
    stock = ask(memos, key, messages, False)
    assert refused.status_code == stock.status_code == 400
    assert refused.json() == stock.json()
    assert memos.settle()["enabled"], "nothing is left over of the turn"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", "/v1/chat/completions/batch"])
def test_routes_without_memory_say_so(memos: Memos, key: str, path: str) -> None:
    said = [{"role": "user", "content": FACT}]
    body: dict[str, Any] = {"model": memos.server.model, "max_tokens": 4, "messages": said}
    if path == "/v1/completions":
        body = {"model": memos.server.model, "max_tokens": 4, "prompt": FACT}
    elif path == "/v1/responses":
        body = {"model": memos.server.model, "max_output_tokens": 4, "input": FACT}
    elif path.endswith("batch"):
        body["messages"] = [said]
    refused = memos.call("POST", path, key, json={**body, "memos": True})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["message"].startswith("memory is on /v1/chat/completions only")
    assert memos.call("POST", path, key, json={**body, "memos": False}).status_code == 200
