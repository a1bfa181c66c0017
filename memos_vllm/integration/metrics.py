"""Every metric that Memos exports, in one list: what is registered, and what docs/METRICS.md describes.

Names follow vLLM's style. Every series exists from the start, at 0, so that a query over a counter that
has not moved yet has a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from memos_vllm.memory.refining import Outcome
from memos_vllm.memory.sources.gathering import FAILURES
from memos_vllm.store.copy_totals import ROUTES

LATENCY_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
"""vLLM's for time to first token, and more of them where prefix hits lie."""


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Where a request's prefix came from: of the places that gave it blocks, the slowest."""

    GPU_PREFETCHED = "gpu_prefetched"
    """GPU only, and a prefetch had brought some of the blocks, for nobody else before."""
    GPU = "gpu"
    """GPU only, left there by earlier requests (or kept there because they were expected)."""
    HOST = "host"
    DISK = "disk"
    FAILED = "failed"
    """A load failed, and the blocks were computed."""
    NONE = "none"
    """No block was found anywhere."""


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    series: tuple[tuple[str, ...], ...] = ((),)
    """Label values of each series."""


def _one(*values: str) -> tuple[tuple[str, ...], ...]:
    return tuple((value,) for value in values)


TIERS = ("gpu", "host", "disk")

ENGINE_METRICS = (
    Metric(
        "memos:scene_arrivals_total",
        Kind.COUNTER,
        "Requests that named a scene the engine knows, by what they found on the GPU.",
        ("outcome",),
        _one("ready", "late", "missed", "other"),
    ),
    *(
        Metric(f"memos:{name}_{unit}_total", Kind.COUNTER, f"{text} In {unit}, over all ranks.")
        for name, text in (
            ("prefetched", "KV that prefetches brought to the GPU and published there."),
            ("prefetch_used", "Prefetched KV that a request was then given."),
            ("prefetch_wasted", "Prefetched KV that left the GPU before any request was given it."),
            ("prefetch_failed", "KV of prefetches that failed or were called off; never published."),
        )
        for unit in ("blocks", "bytes")
    ),
    Metric("memos:prediction_failed", Kind.GAUGE, "1 after an error ended prediction until the restart, else 0."),
    Metric("memos:copy_bytes_total", Kind.COUNTER, "Bytes of KV copied, over all ranks.", ("path", "purpose"), ROUTES),
    Metric(
        "memos:copy_seconds_total",
        Kind.COUNTER,
        "Seconds that the copies took, summed over copies, each as long as on its slowest rank.",
        ("path", "purpose"),
        ROUTES,
    ),
    Metric("memos:copy_failures_total", Kind.COUNTER, "Copies that failed on some rank.", ("path", "purpose"), ROUTES),
    Metric("memos:corrupt_files_total", Kind.COUNTER, "KV files found damaged, foreign or gone when read."),
    Metric("memos:checksum_failures_total", Kind.COUNTER, "Those of them in which a block's checksum did not match."),
    Metric("memos:unsaved_blocks_total", Kind.COUNTER, "Blocks that were not saved because a tier had no room."),
    Metric(
        "memos:tier_hit_blocks_total",
        Kind.COUNTER,
        "Blocks of requests' prompts that the tier gave, counted once per request.",
        ("tier",),
        _one(*TIERS),
    ),
    Metric(
        "memos:tier_miss_blocks_total",
        Kind.COUNTER,
        "Blocks of requests' prompts that the tier was asked for and did not give.",
        ("tier",),
        _one(*TIERS),
    ),
    Metric("memos:tier_used_bytes", Kind.GAUGE, "Bytes of KV that the tier holds.", ("tier",), _one(*TIERS)),
    Metric("memos:tier_limit_bytes", Kind.GAUGE, "Bytes of KV that the tier may hold.", ("tier",), _one(*TIERS)),
    Metric(
        "memos:time_to_first_token_seconds",
        Kind.HISTOGRAM,
        "From a request's arrival to its first token in the scheduler, by where its prefix came from.",
        ("source",),
        _one(*Source),
    ),
)

API_METRICS = (
    Metric(
        "memos:memories_stored_total",
        Kind.COUNTER,
        "Memories that were newly written.",
        ("origin",),
        _one("chat", "api", "document", "import"),
    ),
    Metric("memos:remember_failures_total", Kind.COUNTER, "Turns of chats of which nothing could be remembered."),
    Metric("memos:remember_limited_total", Kind.COUNTER, "Turns of chats whose user has as much as he may."),
    Metric("memos:store_bytes", Kind.GAUGE, "Bytes that the store of memories takes on disk."),
    Metric("memos:store_limit_bytes", Kind.GAUGE, "Bytes beyond which it takes no more; infinite where none is known."),
    Metric("memos:data_dir_free_bytes", Kind.GAUGE, "Bytes free on the file system of data_dir."),
    Metric("memos:embedder_failures_total", Kind.COUNTER, "Failures of the embedder; search goes by words meanwhile."),
    Metric(
        "memos:memories_recalled_total",
        Kind.COUNTER,
        "Memories that were put into prompts.",
        ("where",),
        _one("long_lived", "late"),
    ),
    Metric("memos:source_passages_total", Kind.COUNTER, "Passages of outside sources that were put into prompts."),
    Metric(
        "memos:source_failures_total",
        Kind.COUNTER,
        "Questions to an outside source that a chat went on without an answer to.",
        ("reason",),
        _one(*FAILURES),
    ),
    Metric(
        "memos:source_wait_seconds",
        Kind.HISTOGRAM,
        "Time a chat request waited for outside sources once memory was recalled.",
    ),
    Metric("memos:memory_searches_total", Kind.COUNTER, "Searches over /v1/memories/search."),
    Metric(
        "memos:refiner_tokens_total",
        Kind.COUNTER,
        "Tokens of the refiner's calls, aborted ones too.",
        ("kind",),
        _one("prompt", "generation"),
    ),
    Metric(
        "memos:refiner_calls_total",
        Kind.COUNTER,
        "Calls of the refiner to the model, by whether a live request came between.",
        ("end",),
        _one("ended", "interrupted"),
    ),
    Metric(
        "memos:refiner_statements_total",
        Kind.COUNTER,
        "Statements of the model, by what became of them; an answer that is no JSON of the schema counts as one.",
        ("outcome",),
        _one(*Outcome),
    ),
    Metric("memos:recall_seconds", Kind.HISTOGRAM, "Time a chat request spent on recalling memories."),
    Metric(
        "memos:adapter_requests_total",
        Kind.COUNTER,
        "Chat requests that were to be answered with an adapter.",
        ("outcome",),
        _one("served", "base", "refused"),
    ),
    Metric(
        "memos:adapter_loads_total",
        Kind.COUNTER,
        "Adapters that the engine was asked to have ready.",
        ("reason",),
        _one("request", "prefetch", "build"),
    ),
    Metric("memos:adapter_load_seconds", Kind.HISTOGRAM, "Time a chat request waited for its adapter's first load."),
    Metric("memos:adapter_prefetch_used_total", Kind.COUNTER, "Prefetched adapters that a request then used."),
)

CLASSES = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge, Kind.HISTOGRAM: Histogram}


def create(metric: Metric, cls: Any, labels: tuple[str, ...] = ()) -> Any:
    """The Prometheus metric; one of an engine that this process had before is replaced, as vLLM does it.

    Args:
        cls: prometheus_client's class of that kind, or a wrapper with its interface (Ray).
        labels: names that go before the metric's own.
    """
    options: dict[str, Any] = {}
    if metric.kind is Kind.GAUGE:
        options["multiprocess_mode"] = "mostrecent"
    elif metric.kind is Kind.HISTOGRAM:
        options["buckets"] = LATENCY_BUCKETS_S
    for collector, names in list(REGISTRY._collector_to_names.items()):
        if metric.name in names:
            REGISTRY.unregister(collector)
    return cls(name=metric.name, documentation=metric.meaning, labelnames=[*labels, *metric.labels], **options)


def series_key(name: str, *values: str) -> str:
    """One series in messages and tables."""
    return "|".join((name, *values))
