"""Chat that remembers, over HTTP, with the stock client and the recall model."""

from __future__ import annotations

import uuid
from typing import Any

import openai
import pytest

from tests.e2e.conftest import APP, PLAIN_REQUESTS, Memos, cached_tokens, plain_answer

pytestmark = pytest.mark.e2e

FACT, QUESTION, ANSWER = "My favourite drink is oolong tea.", "What is my favourite drink?", "oolong tea"


@pytest.fixture
def key() -> str:
    """A user nobody has used before."""
    return f"key-{uuid.uuid4().hex}"


def test_a_new_conversation_recalls_what_was_said(memos: Memos, key: str) -> None:
    memos.chat(key, FACT)
    assert ANSWER in memos.answer(key, QUESTION)


def test_streaming_remembers_and_recalls_the_same(memos: Memos, key: str) -> None:
    memos.stream(key, FACT)
    assert ANSWER in memos.stream(key, QUESTION)
    assert memos.stream(key, QUESTION) == memos.answer(key, QUESTION)


def test_another_key_does_not_get_it(memos: Memos, key: str) -> None:
    memos.chat(key, FACT)
    assert ANSWER not in memos.answer(key + "x", QUESTION)
    assert ANSWER in memos.answer(key, QUESTION)


def test_users_of_one_application_are_kept_apart(memos: Memos) -> None:
    one, other = uuid.uuid4().hex, uuid.uuid4().hex
    memos.chat(APP, FACT, {"user": one})
    assert ANSWER in memos.answer(APP, QUESTION, {"user": one})
    assert ANSWER not in memos.answer(APP, QUESTION, {"user": other})


def test_an_application_must_name_the_user(memos: Memos) -> None:
    with pytest.raises(openai.BadRequestError, match="name the user"):
        memos.chat(APP, QUESTION, True)
    assert memos.call("GET", "/v1/memories", APP).status_code == 400
    # Memory by default, and nobody named: answered as without memory.
    memos.chat("nameless-key", FACT, None)
    assert ANSWER not in memos.answer("nameless-key", QUESTION, None)
    assert memos.call("GET", "/v1/memories?user=default", "nameless-key").json()["data"] == []


def test_the_same_prompt_of_another_user_hits_no_kv(memos: Memos, key: str) -> None:
    body = {"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True}
    for who in (key, key + "x"):
        assert memos.call("POST", "/v1/memories", who, json=body).status_code == 200
    memos.chat(key, QUESTION, {"remember": False})
    assert cached_tokens(memos.chat(key, QUESTION, {"remember": False})) > 100
    assert cached_tokens(memos.chat(key + "x", QUESTION, {"remember": False})) == 0
    memos.drop("gpu")
    assert cached_tokens(memos.chat(key, QUESTION, {"remember": False})) > 100


def test_memory_can_be_only_read_or_only_written(memos: Memos, key: str) -> None:
    memos.chat(key, FACT, {"remember": False})
    assert ANSWER not in memos.answer(key, QUESTION)
    memos.chat(key, FACT, {"recall": False})
    assert ANSWER not in memos.answer(key, QUESTION, {"recall": False})
    assert ANSWER in memos.answer(key, QUESTION)


def test_memory_by_default_is_the_keys_choice(memos: Memos, key: str) -> None:
    memos.chat("always-key", FACT, None)
    assert ANSWER in memos.answer("always-key", QUESTION, None)
    assert ANSWER not in memos.answer("always-key", QUESTION, False)
    memos.chat(key, FACT, None)
    assert ANSWER not in memos.answer(key, QUESTION, True)


def test_the_last_turn_is_never_overtaken_by_the_next_question(memos: Memos, key: str) -> None:
    for index in range(10):
        who = f"{key}-{index}"
        memos.stream(who, FACT, max_tokens=1)
        hits = memos.call("POST", "/v1/memories/search", who, json={"query": "drink"}).json()["data"]
        assert [hit["text"] for hit in hits] == [FACT]


def test_a_turn_that_is_being_answered_while_all_is_deleted_does_not_come_back(memos: Memos, key: str) -> None:
    memos.chat(key, "My job is baker.")
    with memos.chat(key, FACT, stream=True, max_tokens=400, extra_body={"ignore_eos": True}) as chunks:
        next(iter(chunks))
        assert memos.call("DELETE", "/v1/memories", key).json()["deleted"] is True
        for _ in chunks:
            pass
    listed = memos.call("GET", "/v1/memories", key).json()["data"]
    assert listed == []


def test_explain_says_what_was_recalled(memos: Memos, key: str) -> None:
    memos.chat(key, FACT)
    response = memos.chat(key, QUESTION, {"explain": True})
    recalled = response.model_extra["memos"]["recalled"]
    assert [(item["text"], item["where"]) for item in recalled] == [(FACT, "long_lived")]


def test_a_session_keeps_its_prefix_while_memory_grows(memos: Memos, key: str) -> None:
    memos.call(
        "POST",
        "/v1/memories",
        key,
        json={"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True},
    )
    first = memos.chat(key, "My job is baker.", {"session": "s"})
    assert cached_tokens(first) == 0
    second = memos.chat(key, "My home city is Turin.", {"session": "s"})
    assert cached_tokens(second) > 200
    fresh = memos.answer(key, "What is my job?", {"session": "another"})
    assert "baker" in fresh


@pytest.mark.parametrize("body", PLAIN_REQUESTS, ids=range(len(PLAIN_REQUESTS)))
def test_requests_without_memory_get_what_plain_vllm_gives(
    memos: Memos, stock_answers: dict[str, Any], body: dict[str, Any]
) -> None:
    expected = stock_answers["plain"][PLAIN_REQUESTS.index(body)]
    with memos.server.http() as client:
        assert plain_answer(client, memos.server.model, body) == expected
        assert plain_answer(client, memos.server.model, {**body, "memos": False}) == expected


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("yes", "'memos'"),
        ({"sesion": "x"}, "'memos.sesion'"),
        ({"top_k": 0}, "'memos.top_k'"),
        ({"recall": "true"}, "'memos.recall'"),
        ([], "'memos'"),
        (1, "'memos'"),
        ({"user": ""}, "'user'"),
    ],
)
def test_a_field_of_the_wrong_shape_is_one_clear_sentence(memos: Memos, key: str, field: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        memos.chat(key, FACT, field)
    assert words in caught.value.body["message"]
    assert memos.call("GET", "/v1/memories", key).json()["data"] == [], "a refused request remembers nothing"


def test_rights_are_not_widened_by_a_body(memos: Memos) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="cannot act for 'alice'"):
        memos.chat("personal-key", QUESTION, {"user": "alice"})
    response = memos.call(
        "POST", "/v1/chat/completions", None, json={"model": memos.server.model, "messages": [], "memos": True}
    )
    assert response.status_code == 401 and "Authorization: Bearer" in response.json()["error"]["message"]


def test_a_clients_salt_cannot_pose_as_memory(memos: Memos, key: str) -> None:
    with pytest.raises(openai.BadRequestError, match="must not start with 'memos:'"):
        memos.chat(key, QUESTION, None, extra_body={"cache_salt": "memos:" + "0" * 64})
