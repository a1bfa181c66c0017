"""Next-scene prediction over HTTP: the prefix is on the GPU before the request exists."""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Any

import openai
import pytest

from tests.e2e.conftest import ALICE, Memos, cached_tokens

pytestmark = pytest.mark.e2e

DOCUMENT = {"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True}


@pytest.fixture
def key(memos: Memos) -> str:
    """A user with a document, whose first conversation is over and who has left the GPU."""
    key = f"key-{uuid.uuid4().hex}"
    memos.call("POST", "/v1/memories", key, json=DOCUMENT)
    memos.chat(key, "What is my job?", {"remember": False})
    return key


def scene(memos: Memos, key: str, session: str | None = None) -> dict[str, Any]:
    return memos.call("GET", "/v1/scenes" + (f"?session={session}" if session else ""), key).json()


def wait_until(memos: Memos, key: str, state: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while (seen := scene(memos, key))["state"] != state:
        assert time.monotonic() < deadline, f"never {state}: {seen}"
    return seen


def hint(memos: Memos, key: str, event: str, **fields: Any) -> Any:
    return memos.call("POST", "/v1/scenes", key, json={"event": event, **fields})


@pytest.mark.parametrize("tiers", [("gpu",), ("gpu", "host")], ids=["from_host", "from_disk"])
def test_a_hint_brings_the_prefix_to_the_gpu_before_the_request(memos: Memos, key: str, tiers: tuple[str, ...]) -> None:
    memos.drop(*tiers)
    before = memos.settle()
    hint(memos, key, "closed")
    assert hint(memos, key, "typing").json()["accepted"] is True
    seen = wait_until(memos, key, "ready")
    assert seen["prediction"]["probability"] > 0.5 and seen["prediction"]["why"]
    loaded = memos.settle()["totals"]

    response = memos.chat(key, "What is my home city?", {"remember": False})

    after = memos.settle()
    assert cached_tokens(response) > 200
    for tier in ("loaded_host_blocks", "loaded_disk_blocks"):
        assert after["totals"][tier] == loaded[tier], "the request itself loaded nothing"
    assert after["prediction"]["ready"] == before["prediction"]["ready"] + 1


def test_the_same_hint_again_brings_back_what_left_meanwhile(memos: Memos, key: str) -> None:
    for _ in range(2):
        hint(memos, key, "typing")
        wait_until(memos, key, "ready")
        memos.drop("gpu")


def test_a_turns_end_is_enough(memos: Memos, key: str) -> None:
    """Without any hint: the user's next conversation is expected from the end of this one."""
    wait_until(memos, key, "ready")
    assert scene(memos, key)["prediction"]["probability"] > 0


def test_nobody_sees_anothers_scene(memos: Memos, key: str) -> None:
    assert scene(memos, key)["blocks"] > 0
    assert scene(memos, key + "x") == {**scene(memos, key + "x"), "state": "unknown", "blocks": 0}
    assert scene(memos, key)["scene"] != scene(memos, key + "x")["scene"]


def test_a_client_cannot_name_a_scene_or_break_the_engine(memos: Memos, key: str) -> None:
    for value in ([1], {"a": 1}, "x", 7):
        body = {"kv_transfer_params": {"memos_scene": value}}
        assert memos.chat(key, "Hello!", None, extra_body=body).choices
        assert memos.chat(key, "Hello!", {"remember": False}, extra_body=body).choices
    with contextlib.suppress(openai.InternalServerError):  # vLLM's own front end answers this so, plugin or not
        memos.chat(key, "Hello!", None, extra_body={"vllm_xargs": {"kv_transfer_params": "abc"}})
    assert memos.chat(key, "Hello!").choices, "the engine lives"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "'event'"),
        ({"event": "sleeping"}, "'event'"),
        ({"event": "typing", "session": ""}, "'session'"),
        ({"event": "will_use", "in_s": -1}, "'in_s'"),
        ({"event": "typing", "scene": "x"}, "'scene'"),
    ],
)
def test_bad_hints_are_one_clear_sentence(memos: Memos, body: dict[str, Any], words: str) -> None:
    response = memos.call("POST", "/v1/scenes", ALICE, json=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_a_deletion_takes_the_scene_with_it(memos: Memos, key: str) -> None:
    memos.settle()
    receipt = memos.call("DELETE", "/v1/memories", key).json()
    assert receipt["kv"]["scenes"] >= 1 and receipt["kv"]["host_blocks"] > 0
    assert scene(memos, key)["state"] == "unknown"


def test_another_endpoint_cannot_speak_for_a_users_scene(memos: Memos, key: str) -> None:
    """A scene's id can be computed by anyone who knows tenant and user; /v1/completions passes everything on."""
    memos.drop("gpu")
    victim, saved = scene(memos, key), memos.settle()["totals"]["saved_blocks"]
    body = {
        "model": memos.server.model,
        "prompt": "Somebody else's words. " * 40,
        "max_tokens": 1,
        "cache_salt": "memos:" + "0" * 80,
        "kv_transfer_params": {"memos_scene": victim["scene"]},
    }
    assert memos.call("POST", "/v1/completions", "stranger", json=body).status_code == 200
    assert memos.settle()["totals"]["saved_blocks"] == saved, "it would be filed where no deletion finds it"
    hint(memos, key, "typing")
    wait_until(memos, key, "ready")
    assert cached_tokens(memos.chat(key, "What is my home city?", {"remember": False})) > 200
