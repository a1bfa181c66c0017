"""Documents and outside sources over HTTP: what they say reaches the answer, and only whom it may."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import READER, Memos, cached_tokens

pytestmark = pytest.mark.e2e

DOCUMENTS = "/v1/memories/documents"
QUESTION = "What is my favourite drink?"


@pytest.fixture
def key() -> str:
    return f"key-{uuid.uuid4().hex}"


def recalled(response: Any) -> list[dict[str, Any]]:
    return response.model_extra["memos"]["recalled"]


def test_a_document_answers_until_it_is_deleted(memos: Memos, key: str) -> None:
    page = "<h2>Harbour</h2><p>The ferry leaves at seven.</p><p>My favourite drink is {drink}.</p>"
    path = f"{DOCUMENTS}?name=about/me.html"
    put = lambda drink: memos.call("POST", path, key, content=page.format(drink=drink)).json()  # noqa: E731
    first = put("oolong tea")
    asking = {"explain": True, "remember": False}
    response = memos.chat(key, QUESTION, asking)
    (hit,) = recalled(response)
    assert hit["where"] == "late" and hit["origin"]["document"]["section"] == ["Harbour"]
    assert "oolong tea" in response.choices[0].message.content
    second = put("cocoa")
    assert second["superseded"] == 1 and first["memories"] != second["memories"]
    assert "cocoa" in memos.answer(key, QUESTION, asking)
    receipt = memos.call("DELETE", f"{DOCUMENTS}/about/me.html", key).json()
    assert sorted(receipt["records"]) == sorted(first["memories"] + second["memories"])
    response = memos.chat(key, QUESTION, asking)
    assert recalled(response) == [] and "cocoa" not in response.choices[0].message.content


def wait_for_files(memos: Memos, files: int) -> None:
    deadline = time.monotonic() + 60
    while memos.call("GET", "/v1/memos/status?user=anybody", READER).json()["sources"][0]["files"] != files:
        assert time.monotonic() < deadline, "the folder is not looked through"


def test_a_folder_is_recalled_beside_memory_and_never_remembered(memos: Memos, source_folder: Path) -> None:
    user = uuid.uuid4().hex
    asking = {"explain": True, "user": user, "session": "s"}
    memos.call("POST", "/v1/memories", READER, json={"text": "My job is baker. " * 30, "pinned": True, "user": user})
    without = memos.chat(READER, QUESTION, asking)
    file = source_folder / "drinks.md"
    file.write_text("# Drinks\n\nMy favourite drink is oolong tea.\n")
    wait_for_files(memos, 1)
    response = memos.chat(READER, QUESTION, asking)
    (found,) = [each for each in recalled(response) if each["where"] == "source"]
    assert found["source"] == "handbook" and found["citation"] | {"offset": 0} == {
        "cited": "drinks.md", "section": ["Drinks"], "offset": 0,
    }  # fmt: skip
    assert "oolong tea" in response.choices[0].message.content
    assert response.usage.prompt_tokens > without.usage.prompt_tokens
    assert cached_tokens(response) > 100, "the prefix is as it was"
    listed = memos.call("GET", f"/v1/memories?user={user}", READER).json()["data"]
    assert not any("oolong" in each["text"] for each in listed)
    assert [each["where"] for each in recalled(memos.chat("other-key", QUESTION, {"explain": True}))] == []
    assert "source" not in {
        each["where"] for each in recalled(memos.chat(READER, QUESTION, asking | {"sources": False}))
    }
    file.unlink()
    wait_for_files(memos, 0)
    assert "oolong tea" not in memos.answer(READER, QUESTION, asking)
