"""Two ranks and two API processes on one data directory; and a store that is full."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import serve
from memos_vllm.integration.metrics import Source
from tests.e2e.conftest import Memos, cached_tokens
from tests.e2e.test_metrics import FIRST_TOKENS, metrics_with, moved

pytestmark = pytest.mark.e2e

DOCUMENT = {"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True}
QUESTION, ANSWER = "What is my favourite drink?", "oolong tea"


@pytest.fixture(scope="module")
def parallel(recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memos]:
    directory = tmp_path_factory.mktemp("parallel")
    config = directory / "memos.yaml"
    config.write_text(
        f"data_dir: {directory / 'data'}\nmemory: {{long_lived_tokens: 2048, max_map_bytes: 1MiB}}\n"
        "kv: {host_bytes: 32MiB, disk_bytes: 64MiB, min_load_tokens: 32, layer_groups: 2}\n"
    )
    with serve(
        recall_model,
        plugin=True,
        config=config,
        extra=["--tensor-parallel-size", "2", "--api-server-count", "2"],
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as server:
        yield Memos(server)


def test_every_tier_serves_both_ranks(parallel: Memos) -> None:
    key = f"key-{uuid.uuid4().hex}"
    parallel.call("POST", "/v1/memories", key, json=DOCUMENT)
    parallel.chat(key, "My favourite drink is oolong tea.")
    right = parallel.answer(key, QUESTION, {"remember": False})
    assert ANSWER in right
    for tiers in (("gpu",), ("gpu", "host")):
        parallel.drop(*tiers)
        loaded = parallel.chat(key, QUESTION, {"remember": False})
        assert cached_tokens(loaded) > 200
        assert loaded.choices[0].message.content == right
    kv = parallel.settle()
    assert kv["layer_groups"] == 2, "requests run while layers arrive, on both ranks"
    totals = kv["totals"]
    assert totals["loaded_host_blocks"] and totals["loaded_disk_blocks"] and not totals["failed_ops"]


def test_metrics_add_up_over_ranks_and_api_processes(parallel: Memos) -> None:
    before = parallel.metrics()
    for index in range(8):  # connections are spread over the processes
        key = f"key-{uuid.uuid4().hex}"
        parallel.call("POST", "/v1/memories", key, json={"text": f"My lucky number is {index}."})
        parallel.chat(key, QUESTION, {"remember": False})
    status = parallel.call("GET", "/v1/memos/status").json()
    exported = metrics_with(parallel, status["summary"])
    assert moved(before, exported, "memos:memories_stored_total", "api") == 8
    assert moved(before, exported, "memos:recall_seconds_count") == 8
    assert sum(moved(before, exported, FIRST_TOKENS, source) for source in Source) == 8

    parallel.settle()
    kv, summary = (parallel.call("GET", "/v1/memos/status").json()[part] for part in ("kv", "summary"))
    block_bytes = summary["tiers"]["host"]["limit_bytes"] / kv["host"]["capacity_blocks"]
    saved = next(copies for copies in summary["copies"] if copies["path"] == "gpu_to_host")
    assert saved["bytes"] == kv["totals"]["saved_blocks"] * block_bytes > 0, "both ranks, each block once"


def test_api_processes_see_each_others_memories(parallel: Memos) -> None:
    for index in range(6):  # connections are spread over the processes
        key = f"key-{uuid.uuid4().hex}"
        added = parallel.call("POST", "/v1/memories", key, json={"text": f"My lucky number is {index}."}).json()
        for _ in range(4):
            assert parallel.call("GET", f"/v1/memories/{added['id']}", key).json() == added
            hits = parallel.call("POST", "/v1/memories/search", key, json={"query": "number"}).json()["data"]
            assert [hit["id"] for hit in hits] == [added["id"]]


def test_a_full_store_says_so_and_loses_nothing(parallel: Memos) -> None:
    key = f"key-{uuid.uuid4().hex}"
    kept = []
    while True:
        response = parallel.call("POST", "/v1/memories", key, json={"text": "x" * 50_000, "type": "document"})
        if response.status_code != 200:
            break
        kept.append(response.json()["id"])
        assert len(kept) < 100, "the map is 1 MiB"
    assert response.status_code == 507
    assert "max_map_bytes" in response.json()["error"]["message"]
    assert [item["id"] for item in parallel.call("GET", "/v1/memories", key).json()["data"]] == kept
    assert parallel.answer(key, "Hello!"), "the chat goes on; only its turn is not remembered"
    parallel.call("DELETE", f"/v1/memories/{kept[0]}", key)
    assert parallel.call("POST", "/v1/memories", key, json={"text": "My job is baker."}).status_code == 200
