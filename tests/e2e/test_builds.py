"""Building over HTTP: after memory changed, the next session's first request finds its prefix."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from tests.e2e.conftest import Memos, cached_tokens

pytestmark = pytest.mark.e2e

DOCUMENT = {"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True}
OTHER = {"text": "The market opens on Sundays. " * 40, "type": "document", "pinned": True}
QUESTION = [{"role": "system", "content": "You are a guide."}, {"role": "user", "content": "What is my job?"}]


def built(memos: Memos) -> dict[str, Any]:
    """Waits until nothing is left to be built; the counters."""
    return memos.settle()["prediction"]


def session(**options: Any) -> dict[str, Any]:
    return {"session": uuid.uuid4().hex, "remember": False, **options}


def next_session(memos: Memos, key: str) -> dict[str, Any]:
    return memos.call("GET", "/v1/scenes", key).json()["next_session"]


@pytest.fixture
def key(memos: Memos) -> str:
    """A user with a document, whose first session is over."""
    key = f"key-{uuid.uuid4().hex}"
    memos.call("POST", "/v1/memories", key, json=DOCUMENT)
    memos.chat(key, QUESTION, session())
    built(memos)
    return key


def test_a_new_sessions_first_request_finds_the_memory_that_changed(memos: Memos, key: str) -> None:
    before = built(memos)
    memos.call("POST", "/v1/memories", key, json=OTHER)
    after = built(memos)
    assert after["built_blocks"] > before["built_blocks"] and after["build_requests"] > before["build_requests"]
    assert next_session(memos, key)["state"] == "ready"

    first = memos.chat(key, QUESTION, session())
    assert cached_tokens(first) >= first.usage.prompt_tokens - 64, "all but the question and a part of a block"

    # Another user with the same memories, of whom nothing is known, computes it all and says the same.
    for document in (DOCUMENT, OTHER):
        memos.call("POST", "/v1/memories", key + "x", json=document)
    cold = memos.chat(key + "x", QUESTION, session())
    assert cached_tokens(cold) == 0
    assert first.choices[0].message.content == cold.choices[0].message.content


def test_what_a_turn_said_is_in_the_next_sessions_prefix(memos: Memos, key: str) -> None:
    memos.chat(key, "My job is baker.", session(remember=True))
    blocks = next_session(memos, key)["blocks"]
    built(memos)
    assert next_session(memos, key)["state"] == "ready" and next_session(memos, key)["blocks"] >= blocks
    answer = memos.chat(key, "What is my job?", session())
    assert cached_tokens(answer) > 200 and "baker" in answer.choices[0].message.content


def test_nothing_is_built_of_what_is_there(memos: Memos, key: str) -> None:
    before = built(memos)["built_blocks"]
    for _ in range(2):
        memos.chat(key, QUESTION, session())
    memos.drop("gpu")
    assert built(memos)["built_blocks"] == before


def test_a_deletion_leaves_nothing_to_build_from(memos: Memos, key: str) -> None:
    memos.call("POST", "/v1/memories", key, json=OTHER)
    receipt = memos.call("DELETE", "/v1/memories", key).json()
    assert receipt["kv"]["scenes"] >= 1
    built(memos)
    assert next_session(memos, key)["state"] == "unknown"


def test_one_deleted_memory_is_not_in_the_next_sessions_prefix(memos: Memos, key: str) -> None:
    added = memos.call("POST", "/v1/memories", key, json=OTHER).json()
    built(memos)
    long = next_session(memos, key)["blocks"]
    memos.call("DELETE", f"/v1/memories/{added['id']}", key)
    built(memos)
    assert next_session(memos, key)["state"] == "ready" and next_session(memos, key)["blocks"] < long
    first = memos.chat(key, QUESTION, session())
    assert cached_tokens(first) >= first.usage.prompt_tokens - 64


def test_builds_remember_nothing(memos: Memos, key: str) -> None:
    memos.call("POST", "/v1/memories", key, json=OTHER)
    built(memos)
    texts = [record["text"] for record in memos.call("GET", "/v1/memories", key).json()["data"]]
    assert texts == [DOCUMENT["text"], OTHER["text"]]
