"""The operator's view of the counters: precision, recall, bandwidth, time to first token by source.

Counters of several engines are added first; shares and percentiles are of the sum. Percentiles are
estimated from histogram buckets, as PromQL's ``histogram_quantile`` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from memos_vllm.integration.engine_metrics import COUNTERS, FIRST_TOKENS, GAUGES
from memos_vllm.integration.metrics import LATENCY_BUCKETS_S, TIERS, Source, series_key
from memos_vllm.store.copy_totals import ROUTES


def summarize(accounts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Args:
        accounts: ``Accounting.status`` of each engine.
    """
    counters: Counter[str] = Counter()
    gauges: Counter[str] = Counter()
    for account in accounts:
        counters.update(account[COUNTERS])
        gauges.update(account[GAUGES])
    return {
        "prediction": _prediction(counters),
        "copies": [_copies(counters, *route) for route in ROUTES],
        "tiers": {
            tier: {
                "hit_blocks": counters[series_key("memos:tier_hit_blocks_total", tier)],
                "miss_blocks": counters[series_key("memos:tier_miss_blocks_total", tier)],
                "used_bytes": gauges[series_key("memos:tier_used_bytes", tier)],
                "limit_bytes": gauges[series_key("memos:tier_limit_bytes", tier)],
            }
            for tier in TIERS
        },
        "time_to_first_token": {
            source.value: _latency([account[FIRST_TOKENS][source.value] for account in accounts]) for source in Source
        },
    }


def _prediction(counters: Counter[str]) -> dict[str, Any]:
    arrivals = {
        outcome: counters[series_key("memos:scene_arrivals_total", outcome)]
        for outcome in ("ready", "late", "missed", "other")
    }
    moved = {
        name: {unit: counters[f"memos:{name}_{unit}_total"] for unit in ("blocks", "bytes")}
        for name in ("prefetched", "prefetch_used", "prefetch_wasted", "prefetch_failed")
    }
    return {
        "arrivals": arrivals,
        "recall": _ratio(arrivals["ready"], sum(arrivals.values())),
        "precision": _ratio(moved["prefetch_used"]["blocks"], moved["prefetched"]["blocks"]),
        **moved,
    }


def _copies(counters: Counter[str], path: str, purpose: str) -> dict[str, Any]:
    size_bytes, seconds, failures = (
        counters[series_key(f"memos:copy_{name}_total", path, purpose)] for name in ("bytes", "seconds", "failures")
    )
    return {
        "path": path,
        "purpose": purpose,
        "bytes": size_bytes,
        "seconds": seconds,
        "bytes_per_s": _ratio(size_bytes, seconds),
        "failures": failures,
    }


def _latency(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    buckets = [sum(counts) for counts in zip(*(part["buckets"] for part in parts), strict=True)]
    number = sum(buckets)
    return {
        "requests": number,
        "mean_s": _ratio(sum(part["seconds"] for part in parts), number),
        "p50_s": quantile(buckets, 0.5),
        "p95_s": quantile(buckets, 0.95),
    }


def quantile(buckets: Sequence[int], q: float) -> float | None:
    """Within a bucket values are taken as evenly spread; above the last edge the edge is all that is known.

    Args:
        buckets: counts, one more than there are edges in ``LATENCY_BUCKETS_S``.
    """
    if not sum(buckets):
        return None
    rank = q * sum(buckets)
    below = [0, *accumulate(buckets)]
    index = next(i for i in range(len(buckets)) if below[i + 1] >= rank and buckets[i])
    if index == len(LATENCY_BUCKETS_S):
        return LATENCY_BUCKETS_S[-1]
    low = LATENCY_BUCKETS_S[index - 1] if index else 0.0
    return low + (LATENCY_BUCKETS_S[index] - low) * (rank - below[index]) / buckets[index]


def _ratio(part: float, whole: float) -> float | None:
    """None where nothing has happened yet."""
    return part / whole if whole else None
