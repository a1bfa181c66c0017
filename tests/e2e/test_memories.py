"""REST for memories: one user's own, and gone when deleted."""

from __future__ import annotations

import time
import uuid
from typing import Any

import pytest

from tests.e2e.conftest import Memos, cached_tokens

pytestmark = pytest.mark.e2e

DOCUMENT = {"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True}


@pytest.fixture
def key() -> str:
    return f"key-{uuid.uuid4().hex}"


def test_add_read_change_list_search_delete(memos: Memos, key: str) -> None:
    added = memos.call("POST", "/v1/memories", key, json={"text": "My job is baker.", "tags": ["work"]}).json()
    path = f"/v1/memories/{added['id']}"
    assert memos.call("GET", path, key).json() == added
    changed = memos.call("PATCH", path, key, json={"text": "My job is pilot."}).json()
    assert (changed["text"], changed["version"], changed["tags"]) == ("My job is pilot.", 2, ["work"])
    assert [item["text"] for item in memos.call("GET", "/v1/memories?tag=work", key).json()["data"]] == [
        "My job is pilot."
    ]
    hits = memos.call("POST", "/v1/memories/search", key, json={"query": "which job"}).json()["data"]
    assert [hit["id"] for hit in hits] == [added["id"]] and hits[0]["score"] > 0
    assert memos.answer(key, "What is my job?") == "Your job is pilot."
    assert memos.call("DELETE", path, key).json()["deleted"] is True
    assert memos.call("GET", path, key).status_code == 404
    assert "pilot" not in memos.answer(key, "What is my job?")


def test_a_batch_is_stored_whole(memos: Memos, key: str) -> None:
    batch = {"memories": [{"text": f"Ferry {i} leaves at seven.", "tags": ["ferry"]} for i in range(50)]}
    added = memos.call("POST", "/v1/memories", key, json=batch).json()["data"]
    assert memos.call("GET", "/v1/memories?tag=ferry", key).json()["data"] == added and len(added) == 50
    batch["memories"][1]["text"] = " "
    refused = memos.call("POST", "/v1/memories", key, json=batch)
    assert refused.status_code == 400 and "memories[1]" in refused.json()["error"]["message"]
    assert len(memos.call("GET", "/v1/memories?tag=ferry", key).json()["data"]) == 50


def test_an_export_enters_under_another_key(memos: Memos, key: str) -> None:
    memos.answer(key, "My job is baker.")
    memos.call("POST", "/v1/memories", key, json={"text": "The ferry leaves at seven. " * 200, "tags": ["フェリー"]})
    told = memos.call("GET", "/v1/memories/export", key)
    assert told.headers["content-type"] == "application/jsonl" and len(told.content.splitlines()) == 3
    other = f"key-{uuid.uuid4().hex}"
    receipt = memos.call("POST", "/v1/memories/import", other, content=told.content).json()
    assert (receipt["memories"], receipt["known"]) == (2, 0)
    assert memos.answer(other, "What is my job?") == "Your job is baker."
    cut = memos.call("POST", "/v1/memories/import", other, content=told.content[:-100])
    assert cut.status_code == 400 and "line 3" in cut.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=x", "include_superseded=perhaps", "state=lost"])
def test_a_bad_parameter_is_a_sentence_of_ours(memos: Memos, key: str, query: str) -> None:
    before = memos.server.log_path.stat().st_size
    refused = memos.call("GET", f"/v1/memories?{query}", key)
    assert b"Traceback" not in memos.server.log_path.read_bytes()[before:]
    assert refused.status_code == 400 and query.partition("=")[0] in refused.json()["error"]["message"]


def test_a_use_is_noted_with_its_scene(memos: Memos, key: str) -> None:
    path = f"/v1/memories/{memos.call('POST', '/v1/memories', key, json={'text': 'My job is baker.'}).json()['id']}"
    memos.chat(key, "What is my job?", {"session": "s", "remember": False})
    deadline = time.monotonic() + 60
    while not (log := memos.call("GET", path + "/log", key).json()["data"]):  # noted after the answer
        assert time.monotonic() < deadline
    (event,) = log
    assert (event["kind"], event["where"], event["session"]) == ("recalled", "long_lived", "s")
    cube = memos.call("GET", path + "/cube", key).json()
    assert cube["payload"]["scenes"] == [event["scene"]] and cube["header"]["governance"]["state"] == "activated"


def test_a_snapshot_brings_back_what_was_changed(memos: Memos, key: str) -> None:
    memory = memos.call("POST", "/v1/memories", key, json={"text": "My job is baker."}).json()["id"]
    snapshot = memos.call("POST", "/v1/memories/snapshots", key, json={"name": "before"}).json()["id"]
    memos.call("PATCH", f"/v1/memories/{memory}", key, json={"text": "My job is pilot."})
    assert memos.answer(key, "What is my job?") == "Your job is pilot."
    done = memos.call("POST", f"/v1/memories/snapshots/{snapshot}/rollback", key).json()
    assert done["restored"] == [memory]
    assert memos.answer(key, "What is my job?") == "Your job is baker."


def test_nobody_else_sees_or_touches_it(memos: Memos, key: str) -> None:
    added = memos.call("POST", "/v1/memories", key, json={"text": "My job is baker."}).json()
    path = f"/v1/memories/{added['id']}"
    other = key + "x"
    for method, options in (("GET", {}), ("PATCH", {"json": {"text": "stolen"}}), ("DELETE", {})):
        assert memos.call(method, path, other, **options).status_code == 404
    assert memos.call("GET", "/v1/memories", other).json()["data"] == []
    assert memos.call("POST", "/v1/memories/search", other, json={"query": "job"}).json()["data"] == []
    assert memos.call("GET", path, key).json() == added


def test_deleting_makes_the_kv_unreachable_and_says_so(memos: Memos, key: str) -> None:
    added = memos.call("POST", "/v1/memories", key, json=DOCUMENT).json()
    ask = lambda: memos.chat(key, "What is my job?", {"remember": False})  # noqa: E731
    ask()
    assert cached_tokens(ask()) > 100
    memos.settle()
    receipt = memos.call("DELETE", f"/v1/memories/{added['id']}", key).json()
    assert receipt["kv"]["host_blocks"] > 0 and receipt["kv"]["disk_blocks"] > 0
    before = memos.settle()
    memos.call("POST", "/v1/memories", key, json=DOCUMENT)
    cached = cached_tokens(ask())
    built = memos.settle()["prediction"]["built_blocks"] - before["prediction"]["built_blocks"]
    assert cached <= built * before["block_size"], "the same text again is computed again, by the request or at idle"


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "words"),
    [
        ("POST", "/v1/memories", {"json": {}}, 400, "'text'"),
        ("POST", "/v1/memories", {"json": {"text": "x", "colour": 1}}, 400, "'colour'"),
        ("POST", "/v1/memories", {"json": {"text": " "}}, 400, "text"),
        ("POST", "/v1/memories", {"json": {"text": "x", "type": "poem"}}, 400, "poem"),
        ("POST", "/v1/memories", {"json": {"memories": [], "text": "x"}}, 400, "'text' stands beside 'memories'"),
        ("POST", "/v1/memories", {"json": {"memories": [{"txt": "x"}]}}, 400, "memories.0.text"),
        ("POST", "/v1/memories", {"content": b"{"}, 400, "JSON"),
        ("POST", "/v1/memories/search", {"json": {"query": "x", "top_k": 0}}, 400, "'top_k'"),
        ("PATCH", "/v1/memories/unknown", {"json": {"text": "x"}}, 404, "unknown"),
        ("PATCH", "/v1/memories/unknown", {"json": {}}, 400, "nothing to change"),
        ("DELETE", "/v1/memories/unknown", {}, 404, "unknown"),
    ],
)
def test_bad_requests_are_one_clear_sentence(
    memos: Memos, key: str, method: str, path: str, options: dict[str, Any], status: int, words: str
) -> None:
    response = memos.call(method, path, key, **options)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert words in message and "\n" not in message


def test_without_a_key_there_is_no_memory(memos: Memos) -> None:
    for method, path in (("GET", "/v1/memories"), ("POST", "/v1/memories/search"), ("DELETE", "/v1/memories")):
        assert memos.call(method, path, None, json={"query": "x"}).status_code in (401,)


class TestTypes:
    """What is different about each, as a client sees it."""

    def test_working_memory_is_in_its_session_alone(self, memos: Memos, key: str) -> None:
        body = {"text": "My lucky number is 5.", "type": "working", "session": "s"}
        assert memos.call("POST", "/v1/memories", key, json=body).json()["expires_at"] is not None
        ask = lambda session: memos.answer(key, "What is my lucky number?", {"session": session, "remember": False})  # noqa: E731
        assert ask("s") == "Your lucky number is 5."
        assert "not known" in ask("another")

    def test_what_is_told_is_profile_preference_or_fact(self, memos: Memos, key: str) -> None:
        memos.chat(key, "My job is baker. My favourite drink is oolong tea. Alice's job is pilot.")
        found = {
            kind: [each["text"] for each in memos.call("GET", f"/v1/memories?type={kind}", key).json()["data"]]
            for kind in ("profile", "preference", "fact")
        }
        assert found == {
            "profile": ["My job is baker."],
            "preference": ["My favourite drink is oolong tea."],
            "fact": ["Alice's job is pilot."],
        }

    def test_calls_of_tools_are_kept_as_schema_and_trajectory(self, memos: Memos, key: str) -> None:
        function = {"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object"}}
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Turin"}'}}
        messages = [
            {"role": "user", "content": "What is the weather in Turin?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"},
        ]
        tools = [{"type": "function", "function": function}]
        memos.chat(key, messages, {"session": "s"}, tools=tools, tool_choice="none")
        records = memos.call("GET", "/v1/memories", key).json()["data"]
        assert [(each["type"], each["session"]) for each in records] == [("tool_schema", "s"), ("trajectory", "s")]
        assert records[1]["text"].splitlines()[1] == '1. weather({"city": "Turin"}) -> 18 degrees'
        recalled = memos.chat(key, "Weather in Turin?", {"explain": True}).model_extra["memos"]["recalled"]
        assert recalled == [], "what a tool said goes into no prompt by itself"

    def test_working_memory_needs_a_session(self, memos: Memos, key: str) -> None:
        response = memos.call("POST", "/v1/memories", key, json={"text": "x", "type": "working"})
        assert response.status_code == 400 and "'session'" in response.json()["error"]["message"]
