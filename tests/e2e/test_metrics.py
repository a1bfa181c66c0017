"""Metrics over HTTP: all of them are on vLLM's endpoint, and a predicted turn moves the right ones."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memos_vllm.integration.metrics import API_METRICS, ENGINE_METRICS, Kind, Source, series_key
from tests.conftest import ROOT
from tests.e2e.conftest import Memos
from tests.e2e.test_scenes import hint, key, wait_until

pytestmark = pytest.mark.e2e
__all__ = ["key"]

FIRST_TOKENS = "memos:time_to_first_token_seconds_count"


def moved(before: dict[str, float], after: dict[str, float], name: str, *labels: str) -> float:
    return after[series_key(name, *labels)] - before[series_key(name, *labels)]


def metrics_when(memos: Memos, name: str, *labels: str, than: dict[str, float]) -> dict[str, float]:
    """The metrics once one has moved: vLLM hands a step's statistics on after the answer is out."""
    deadline = time.monotonic() + 30
    while not moved(than, after := memos.metrics(), name, *labels):
        assert time.monotonic() < deadline, f"{name} {labels} does not move"
    return after


def metrics_with(memos: Memos, summary: dict[str, Any]) -> dict[str, float]:
    """The metrics once the statistics of the last steps, which the summary has, have come too."""
    answered = sum(numbers["requests"] for numbers in summary["time_to_first_token"].values())
    deadline = time.monotonic() + 30
    while True:
        seen = memos.metrics()
        if sum(seen[series_key(FIRST_TOKENS, source)] for source in Source) == answered:
            return seen
        assert time.monotonic() < deadline, f"{answered} first tokens in the summary, others in the metrics"


def test_the_endpoint_has_exactly_the_listed_metrics(memos: Memos) -> None:
    families = {
        family.name: family
        for family in text_string_to_metric_families(memos.call("GET", "/metrics").text)
        if family.name.startswith("memos:") and not family.name.endswith("_created")
    }
    assert families.keys() == {metric.name.removesuffix("_total") for metric in ENGINE_METRICS + API_METRICS}
    for metric in ENGINE_METRICS + API_METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind.value and family.documentation == metric.meaning
        common = ("model_name", "engine") if metric in ENGINE_METRICS else ()
        series = {
            tuple(value for name, value in sample.labels.items() if name not in ("model_name", "engine", "le"))
            for sample in family.samples
            if set(common) <= sample.labels.keys()
        }
        assert series == set(metric.series), "every series, from the start"
        assert metric.kind is Kind.HISTOGRAM or all(sample.value >= 0 for sample in family.samples)


def test_what_memos_logs_stands_among_vllms_lines(memos: Memos) -> None:
    line = re.compile(
        r"^\(EngineCore.* INFO .*\[activation_memory\.py:\d+\] activation memory: \d+ bytes", re.MULTILINE
    )
    assert len(line.findall(memos.server.log())) == 1


def test_a_stock_server_has_none(stock_answers: dict[str, Any]) -> None:
    assert "vllm:time_to_first_token_seconds" in stock_answers["metrics"]
    assert "memos" not in stock_answers["metrics"]


def test_a_predicted_turn_shows(memos: Memos, key: str) -> None:
    memos.drop("gpu")
    before = memos.metrics()
    hint(memos, key, "typing")
    wait_until(memos, key, "ready")
    memos.chat(key, "What is my home city?", {"remember": False})

    after = metrics_when(memos, FIRST_TOKENS, "gpu_prefetched", than=before)

    assert moved(before, after, FIRST_TOKENS, "gpu_prefetched") == 1
    assert moved(before, after, "memos:scene_arrivals_total", "ready") == 1
    used = moved(before, after, "memos:prefetch_used_blocks_total")
    assert 0 < used <= moved(before, after, "memos:prefetched_blocks_total")
    assert moved(before, after, "memos:copy_bytes_total", "host_to_gpu", "prefetch") > 0
    assert moved(before, after, "memos:copy_bytes_total", "host_to_gpu", "request") == 0
    assert moved(before, after, "memos:tier_hit_blocks_total", "gpu") >= used
    assert moved(before, after, "memos:recall_seconds_count") == 1
    assert moved(before, after, "memos:memories_recalled_total", "long_lived") == 1


def test_memories_are_counted_once_each(memos: Memos, key: str) -> None:
    before = memos.metrics()
    memos.call("POST", "/v1/memories", key, json={"text": "My lucky number is 5."})
    for _ in range(2):
        memos.chat(key, "My favourite drink is oolong tea.")  # told twice, stored once
    memos.call("POST", "/v1/memories/search", key, json={"query": "drink"})
    after = metrics_when(memos, "memos:memories_stored_total", "chat", than=before)
    assert moved(before, after, "memos:memories_stored_total", "api") == 1
    assert moved(before, after, "memos:memories_stored_total", "chat") == 1
    assert moved(before, after, "memos:memory_searches_total") == 1


def test_the_status_says_the_same(memos: Memos, key: str) -> None:
    memos.settle()
    summary = memos.call("GET", "/v1/memos/status").json()["summary"]
    exported = metrics_with(memos, summary)
    arrivals = summary["prediction"]["arrivals"]
    assert arrivals == {each: exported[series_key("memos:scene_arrivals_total", each)] for each in arrivals}
    assert summary["prediction"]["recall"] == arrivals["ready"] / sum(arrivals.values())
    for copies in summary["copies"]:
        route = copies["path"], copies["purpose"]
        assert copies["bytes"] == exported[series_key("memos:copy_bytes_total", *route)]
        assert copies["bytes_per_s"] is None or copies["bytes_per_s"] > 0
    for source, numbers in summary["time_to_first_token"].items():
        assert numbers["requests"] == exported[series_key(FIRST_TOKENS, source)]


def test_the_status_is_printed(memos: Memos, key: str) -> None:
    command = [sys.executable, "-m", "memos_vllm.status", memos.server.base_url, "--api-key", "any-key"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("scenes   recall ") and "blocks   precision " in printed and "ttft     none" in printed
    refused = subprocess.run([*command[:3], "http://localhost:1"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "--plugin memos" in refused.stderr
