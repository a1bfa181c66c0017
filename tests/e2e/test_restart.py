"""A restart of the server, and a kill: memory, KV and what was learned are still there."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import Memos, cached_tokens

pytestmark = pytest.mark.e2e

QUESTION, ANSWER = "What is my favourite drink?", "oolong tea"
DOCUMENT = {"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True}


def data_dir_of(config_path: Path) -> Path:
    return Path(yaml.safe_load(config_path.read_text())["data_dir"])


def kv_files(config_path: Path) -> list[Path]:
    return sorted(data_dir_of(config_path).rglob("*.safetensors"))


def test_memory_and_kv_survive_a_restart_and_a_kill(memos: Memos, config_path: Path) -> None:
    key = f"key-{uuid.uuid4().hex}"
    memos.call("POST", "/v1/memories", key, json=DOCUMENT)
    memos.chat(key, "My favourite drink is oolong tea.")
    right = memos.answer(key, QUESTION, {"remember": False})
    assert ANSWER in right
    memos.settle()

    memos.server.restart()
    learned = (data_dir_of(config_path) / "predictor.json").read_text()
    assert re.search(r'"prompt_tokens": *[1-9]', learned) and re.search(r'"output_tokens": *[1-9]', learned)
    first = memos.chat(key, QUESTION, {"remember": False})
    assert first.choices[0].message.content == right
    assert cached_tokens(first) > 200, "the first request finds its KV on disk"
    assert memos.settle()["totals"]["loaded_disk_blocks"] > 0
    assert ANSWER not in memos.answer(key + "x", QUESTION)

    memos.call("POST", "/v1/memories", key, json={"text": "My job is baker."})
    memos.server.kill()
    memos.server.start()
    memos.server.wait_until_ready()
    assert "baker" in memos.answer(key, "What is my job?", {"remember": False}), "it was acknowledged before the kill"
    assert ANSWER in memos.answer(key, QUESTION, {"remember": False})


def test_damaged_files_are_recomputed_and_counted(memos: Memos, config_path: Path) -> None:
    key = f"key-{uuid.uuid4().hex}"
    before = set(kv_files(config_path))
    memos.call("POST", "/v1/memories", key, json=DOCUMENT)
    memos.chat(key, "My favourite drink is oolong tea.")
    right = memos.answer(key, QUESTION, {"remember": False})
    memos.settle()
    memos.call("POST", "/v1/scenes", key, json={"event": "closed"})  # nothing is to be prefetched meanwhile
    memos.drop("gpu", "host")
    damaged = set(kv_files(config_path)) - before
    assert damaged
    for path in damaged:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    failed = memos.settle()["totals"]["failed_ops"]
    response = memos.chat(key, QUESTION, {"remember": False})
    assert response.choices[0].message.content == right
    assert memos.settle()["totals"]["failed_ops"] > failed
    assert memos.answer(key, QUESTION, {"remember": False}) == right
