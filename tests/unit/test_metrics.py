"""The list of metrics, its document, and the way from the scheduler side to Prometheus."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from memos_vllm import status
from memos_vllm.integration.engine_metrics import COUNTERS, FIRST_TOKENS, GAUGES, MemosPromMetrics, MemosStats
from memos_vllm.integration.memory_metrics import MemoryMetrics
from memos_vllm.integration.metrics import API_METRICS, ENGINE_METRICS, LATENCY_BUCKETS_S, Kind, Source, series_key
from memos_vllm.integration.summary import quantile, summarize
from memos_vllm.memory.service import Recall
from tests.conftest import ROOT

READY = series_key("memos:scene_arrivals_total", "ready")
USED = series_key("memos:tier_used_bytes", "host")
TYPES = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}


def test_the_document_lists_exactly_the_metrics() -> None:
    text = (ROOT / "docs" / "METRICS.md").read_text()
    rows = re.findall(r"^\| `(memos:\w+)` \| (\w+) \| ([^|]*)\|", text, re.MULTILINE)
    documented = [(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows]
    assert documented == [(metric.name, metric.kind.value, metric.labels) for metric in ENGINE_METRICS + API_METRICS]
    for metric in ENGINE_METRICS + API_METRICS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{metric.name}`"))
        said_above = {"purpose", "path"} if metric.name.startswith("memos:copy_") else {"tier"}
        if not said_above & set(metric.labels):
            assert all(f"`{value}`" in row for values in metric.series for value in values)
    for name in re.findall(r"memos:\w+", text.split("## Queries")[1]):
        assert name.removesuffix("_bucket") in {metric.name for metric in ENGINE_METRICS + API_METRICS}, (
            f"{name} in a query"
        )


@pytest.mark.parametrize("metric", ENGINE_METRICS + API_METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions_of_prometheus(metric: Any) -> None:
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert metric.kind is not Kind.HISTOGRAM or metric.name.endswith("_seconds")
    assert all(len(values) == len(metric.labels) for values in metric.series)


def stats(counters: dict[str, float], used: float, first_tokens: list[list[Any]]) -> MemosStats:
    return MemosStats({COUNTERS: counters, GAUGES: {USED: used} if used else {}, FIRST_TOKENS: first_tokens})


def test_steps_add_up_and_the_latest_gauge_counts() -> None:
    both = stats({READY: 1}, 10, [["host", 0.1]]).aggregate(stats({READY: 2, "x": 1}, 20, [["none", 2.0]]))
    assert both.data == stats({READY: 3, "x": 1}, 20, [["host", 0.1], ["none", 2.0]]).data
    assert both.aggregate(MemosStats()).data[GAUGES] == {USED: 20}
    assert MemosStats().is_empty() and not stats({}, 0, [["gpu", 1.0]]).is_empty()


def prom_metrics() -> MemosPromMetrics:
    class Config:
        kv_transfer_config = None

    return MemosPromMetrics(Config(), TYPES, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})


def test_what_the_engine_sends_arrives_under_its_label() -> None:
    prom = prom_metrics()
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(stats({READY: 2}, 7, [["disk", 0.3]]).data))
    prom.observe(sent, 1)
    prom.observe(sent, 1)
    assert sample("memos:scene_arrivals_total", outcome="ready", engine="1") == 4
    assert sample("memos:scene_arrivals_total", outcome="ready") == 0, "there from the start"
    assert sample("memos:tier_used_bytes", tier="host", engine="1") == 7
    assert sample("memos:time_to_first_token_seconds_count", source="disk", engine="1") == 2
    assert sample("memos:time_to_first_token_seconds_bucket", source="disk", engine="1", le="0.3") == 2


def test_a_second_engine_in_the_process_starts_anew() -> None:
    prom_metrics().observe(stats({READY: 5}, 0, []).data)
    prom_metrics()
    assert sample("memos:scene_arrivals_total", outcome="ready") == 0


def test_beside_another_connector_the_stats_find_their_class() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector, MultiKVConnectorStats

    from memos_vllm.integration.connector import MemosConnector

    ours = stats({READY: 1}, 0, [])
    both = MultiKVConnectorStats(data={MemosConnector.__name__: ours})
    sent = both.to_dict() if hasattr(both, "to_dict") else both.data  # vLLM 0.26 has msgspec write the objects
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(sent))
    rebuilt = MultiConnector.build_kv_connector_stats(received)
    assert rebuilt.data[MemosConnector.__name__] == MemosStats(ours.data)


def test_memory_is_counted_in_the_api_process() -> None:
    metrics = MemoryMetrics()
    metrics.stored("chat", 2)
    metrics.stored("api")
    metrics.searched()
    with metrics.recalling():
        pass
    with pytest.raises(ValueError), metrics.recalling():
        raise ValueError
    metrics.recalled(Recall(("a", "b"), ("c",)))  # type: ignore[arg-type]
    value = REGISTRY.get_sample_value
    assert value("memos:memories_stored_total", {"origin": "chat"}) == 2
    assert value("memos:memories_stored_total", {"origin": "api"}) == 1
    assert value("memos:memory_searches_total") == 1
    assert value("memos:recall_seconds_count") == 1, "a recall that failed has no time"
    assert value("memos:memories_recalled_total", {"where": "long_lived"}) == 2
    assert value("memos:memories_recalled_total", {"where": "late"}) == 1


# -- the summary ----------------------------------------------------------------------------------


def account(counters: dict[str, float], seconds: list[float]) -> dict[str, Any]:
    buckets = [sum(low < each <= high for each in seconds) for low, high in edges()]
    empty = {"buckets": [0] * len(buckets), "seconds": 0.0}
    first_tokens = {source.value: empty for source in Source} | {"host": {"buckets": buckets, "seconds": sum(seconds)}}
    return {COUNTERS: counters, GAUGES: {USED: 100}, FIRST_TOKENS: first_tokens}


def edges() -> list[tuple[float, float]]:
    return list(zip((0.0, *LATENCY_BUCKETS_S), (*LATENCY_BUCKETS_S, float("inf")), strict=True))


def test_engines_are_added_before_shares_are_taken() -> None:
    late, copied = series_key("memos:scene_arrivals_total", "late"), ("host_to_gpu", "prefetch")
    first = {READY: 1, "memos:prefetched_blocks_total": 10, "memos:prefetch_used_blocks_total": 1}
    second = {READY: 1, late: 2, "memos:prefetched_blocks_total": 2, "memos:prefetch_used_blocks_total": 2}
    for each, size_bytes, seconds in ((first, 100, 1.0), (second, 500, 2.0)):
        each[series_key("memos:copy_bytes_total", *copied)] = size_bytes
        each[series_key("memos:copy_seconds_total", *copied)] = seconds
    summary = summarize([account(first, [0.05, 0.05, 0.05]), account(second, [2.0])])
    assert summary["prediction"]["recall"] == 2 / 4 and summary["prediction"]["precision"] == 3 / 12
    copies = next(each for each in summary["copies"] if (each["path"], each["purpose"]) == copied)
    assert copies["bytes_per_s"] == 200
    assert summary["tiers"]["host"]["used_bytes"] == 200
    latency = summary["time_to_first_token"]["host"]
    assert latency["requests"] == 4 and latency["mean_s"] == pytest.approx(2.15 / 4)
    assert 0.04 < latency["p50_s"] <= 0.05 and 1.5 < latency["p95_s"] <= 2.5
    assert summary["time_to_first_token"]["gpu"] == {"requests": 0, "mean_s": None, "p50_s": None, "p95_s": None}


def test_a_server_that_has_done_nothing_has_a_summary() -> None:
    summary = summarize([account({}, [])])
    assert summary["prediction"]["recall"] is None and summary["prediction"]["precision"] is None
    assert status.lines(summary)[0] == "scenes   recall -: 0 ready, 0 late, 0 missed, 0 other"


def test_a_quantile_beyond_the_last_edge_is_the_edge() -> None:
    assert quantile([0] * len(LATENCY_BUCKETS_S) + [3], 0.5) == LATENCY_BUCKETS_S[-1]
