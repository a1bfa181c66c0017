"""Plaintext to parametric on the recall model: it learns, or it is refused, and it says where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memos_vllm import data_dir, distill
from memos_vllm.adapters.base_model import linear_modules
from memos_vllm.adapters.peft_config import BaseModel
from memos_vllm.adapters.registry import AdapterRegistry
from memos_vllm.config import AdaptersConfig, MemoryConfig
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal

WHO = Principal("shop", "alice")
TEXTS = ["My favourite drink is oolong tea.", "My home city is Turin.", "My job is baker.", "Bob's pet is otter."]
QUICK = ["--steps", "3", "--num-controls", "12", "--facts-per-step", "4", "--controls-per-step", "4", "--rank", "4"]


@pytest.fixture
def server(tmp_path: Path, recall_model: Path) -> Path:
    """The configuration of a server that has run, with four memories."""
    from transformers import AutoConfig

    data = tmp_path / "data"
    data.mkdir()
    modules = linear_modules(AutoConfig.from_pretrained(recall_model))
    base = BaseModel(frozenset({recall_model.name}), modules, max_rank=16, path=str(recall_model))
    AdapterRegistry(data_dir.adapters_dir(data), AdaptersConfig(), base, "f" * 64).close()
    store = MemoryStore(data_dir.memory_dir(data), 2**24)
    for text in TEXTS:
        MemoryService(store, MemoryConfig()).add(WHO, text)
    store.close()
    config = tmp_path / "memos.yaml"
    config.write_text(f"data_dir: {data}\n")
    return config


def run(server: Path, *options: str) -> dict[str, Any]:
    report = server.with_name("report.json")
    code = distill.main(
        ["--config", str(server), "--tenant", "shop", "--user", "alice", "--name", "knows", "--quiet", "--threads", "1",
         "--report", str(report), *options]
    )  # fmt: skip
    found = json.loads(report.read_text())
    assert (code == 0) == (found["published"] is not None)
    return found


def published(server: Path) -> list[Any]:
    registry = AdapterRegistry.beside_server(data_dir.adapters_dir(server.with_name("data")), AdaptersConfig())
    try:
        return registry.list(WHO)
    finally:
        registry.close()


def test_an_adapter_below_the_bar_is_refused(server: Path) -> None:
    report = run(server, *QUICK)
    assert "less than the bar of 90.0%" in report["refused"]
    assert report["evaluation"]["facts"] == 4 and published(server) == []


def test_an_adapter_that_harms_the_control_set_is_refused(server: Path) -> None:
    report = run(server, *QUICK, "--min-answered", "0", "--learning-rate", "0.5")
    assert "harms the control set" in report["refused"] and published(server) == []
    assert report["evaluation"]["control_score_before"] > 0.9


def test_a_memory_that_is_deleted_meanwhile_is_not_published(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memos_vllm.adapters.distill import Distillation

    original = Distillation.run

    def deleting(self: Distillation, *args: Any) -> Any:
        evaluation = original(self, *args)
        other.delete(WHO, other.list(WHO).records[0].id)
        return evaluation

    store: list[MemoryStore] = []
    opened = MemoryStore.__init__
    monkeypatch.setattr(MemoryStore, "__init__", lambda self, *args: (store.append(self), opened(self, *args))[1])
    other = type("Other", (), {
        "delete": lambda self, *args: MemoryService(store[0], MemoryConfig()).delete(*args),
        "list": lambda self, *args: MemoryService(store[0], MemoryConfig()).list(*args),
    })()  # fmt: skip
    monkeypatch.setattr(Distillation, "run", deleting)
    report = run(server, *QUICK, "--min-answered", "0", "--max-control-loss", "1")
    assert "was deleted meanwhile" in report["refused"] and published(server) == []


def test_it_learns_what_it_is_taught_and_says_where_it_came_from(server: Path) -> None:
    report = run(server, "--steps", "40", "--num-controls", "60", "--facts-per-step", "6", "--controls-per-step", "10")
    assert report["refused"] is None and report["published"] == "knows@1"
    evaluation = report["evaluation"]
    assert evaluation["answered"] >= 0.9 and evaluation["answered_before"] == 0 and evaluation["left_out"] == []
    assert evaluation["control_score_before"] - evaluation["control_score"] <= 0.02
    (adapter,) = published(server)
    origin = adapter.version().origin["distilled"]
    assert len(origin["memories"]) == 4 and all(memory["version"] == 1 for memory in origin["memories"])
    assert origin["took_s"] > 0 and origin["settings"]["steps"] == 40 and origin["evaluation"] == evaluation


def test_memories_that_ask_nothing_need_questions_of_the_caller(server: Path, tmp_path: Path) -> None:
    lines = tmp_path / "questions.jsonl"
    lines.write_text('{"question": "What is my job?", "memory": "nobody"}\n')
    assert "must be the id of a memory" in run(server, *QUICK, "--questions", str(lines))["refused"]
    lines.write_text("no JSON\n")
    assert "cannot read" in run(server, *QUICK, "--questions", str(lines))["refused"]
    assert "no question follows" in run(server, *QUICK, "--tag", "none-has-it")["refused"]
