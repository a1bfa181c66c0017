"""benchmarks.memory: every arm gives its rows, and the texts are what they are said to be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import memory
from benchmarks.memory_texts import COMMON, Texts

TINY = memory.Preset(3, 20, (30,), 2, 25, 2, 5)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    monkeypatch.setitem(memory.PRESETS, "smoke", TINY)
    out = tmp_path / "out.json"
    store = tmp_path / "store"
    assert (
        memory.main(["--preset", "smoke", "--json", str(out), "--store", str(store), "--directory", str(tmp_path)]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "store"], "the rest is cleaned up"
    return json.loads(out.read_text())["rows"]


def test_every_arm_is_measured(rows: list[dict[str, object]]) -> None:
    assert all(set(row) == {"arm", "memories_per_user", "memories_total", "metric", "value"} for row in rows)
    measured = {(row["arm"], row["memories_total"], row["metric"]) for row in rows}
    for arm in ("memos", "fts5"):
        assert {(arm, 0, "ingest_single_per_s"), (arm, 0, "ingest_batch_per_s")} <= measured
    for arm in ("memos", "memos_vectors", "fts5", "exact_dense"):
        assert {(arm, 30, "search_p50_s"), (arm, 30, "search_p99_s")} <= measured
    many = {metric for arm, total, metric in measured if total == 50}
    assert {"restart_s", "restart_process_s", "disk_bytes_per_memory", "search_p99_s", "process_bytes"} <= many
    assert all(float(row["value"]) >= 0 for row in rows)  # type: ignore[arg-type]


def test_texts_follow_the_seed_and_zipf() -> None:
    sentences = list(Texts(1, words=2000).sentences(500))
    assert sentences == list(Texts(1, words=2000).sentences(500)) != list(Texts(2, words=2000).sentences(500))
    assert all(8 <= len(sentence.split()) <= 24 for sentence in sentences)
    counts = Counter(word for sentence in sentences for word in sentence.lower().rstrip(".").split())
    first, tenth = counts[COMMON[0]], counts[COMMON[9]]
    assert 5 < first / tenth < 25, "rank 10 is about 10 ** 1.07 times as rare"
    assert len(set(Texts(1).vocabulary)) == 50_000


def test_questions_have_words_of_the_texts() -> None:
    texts = Texts(1, words=2000)
    known = set(texts.vocabulary)
    for question in texts.questions(20):
        assert set(question.removeprefix("What did i say about ").rstrip("?").split()) <= known
