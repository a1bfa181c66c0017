"""What an API process counts of plaintext memory and adapters.

Several processes add up in prometheus_client's multiprocess mode.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from memos_vllm.integration.metrics import API_METRICS, CLASSES, create, series_key
from memos_vllm.memory.abstract_store import StoreSize
from memos_vllm.memory.service import Recall


class MemoryMetrics:
    """Thread-safe, as prometheus_client's metrics are: recall and remembering run in threads."""

    def __init__(self) -> None:
        self._series: dict[str, Any] = {}
        self._embedder_failures = 0
        for metric in API_METRICS:
            parent = create(metric, CLASSES[metric.kind])
            for values in metric.series:
                self._series[series_key(metric.name, *values)] = parent.labels(*values) if values else parent

    def stored(self, origin: str, number: int = 1) -> None:
        self._series[series_key("memos:memories_stored_total", origin)].inc(number)

    def remember_failed(self) -> None:
        self._series["memos:remember_failures_total"].inc()

    def remember_limited(self) -> None:
        self._series["memos:remember_limited_total"].inc()

    def store_measured(self, size: StoreSize) -> None:
        self._series["memos:store_bytes"].set(size.used_bytes)
        self._series["memos:store_limit_bytes"].set(math.inf if size.limit_bytes is None else size.limit_bytes)

    def data_dir_measured(self, free_bytes: int) -> None:
        self._series["memos:data_dir_free_bytes"].set(free_bytes)

    def embedder_failed(self, since_start: int) -> None:
        self._series["memos:embedder_failures_total"].inc(since_start - self._embedder_failures)
        self._embedder_failures = since_start

    def recalled(self, recall: Recall) -> None:
        self._series[series_key("memos:memories_recalled_total", "long_lived")].inc(len(recall.long_lived))
        self._series[series_key("memos:memories_recalled_total", "late")].inc(len(recall.late))
        self._series["memos:source_passages_total"].inc(len(recall.sources))

    def source_failed(self, reason: str) -> None:
        self._series[series_key("memos:source_failures_total", reason)].inc()

    def adapter_requested(self, outcome: str) -> None:
        self._series[series_key("memos:adapter_requests_total", outcome)].inc()

    def adapter_loaded(self, reason: str, waited_s: float | None = None) -> None:
        """
        Args:
            waited_s: of the request that it was loaded for.
        """
        self._series[series_key("memos:adapter_loads_total", reason)].inc()
        if waited_s is not None:
            self._series["memos:adapter_load_seconds"].observe(waited_s)

    def adapter_prefetch_used(self) -> None:
        self._series["memos:adapter_prefetch_used_total"].inc()

    def searched(self) -> None:
        self._series["memos:memory_searches_total"].inc()

    def refined(self, outcomes: Mapping[str, int]) -> None:
        for outcome, number in outcomes.items():
            self._series[series_key("memos:refiner_statements_total", outcome)].inc(number)

    def refiner_called(self, num_prompt_tokens: int, num_tokens: int, ended: bool) -> None:
        self._series[series_key("memos:refiner_tokens_total", "prompt")].inc(num_prompt_tokens)
        self._series[series_key("memos:refiner_tokens_total", "generation")].inc(num_tokens)
        self._series[series_key("memos:refiner_calls_total", "ended" if ended else "interrupted")].inc()

    def recalling(self) -> AbstractContextManager[None]:
        """Takes the time of a recall that succeeds."""
        return self._timing("memos:recall_seconds")

    def waiting_for_sources(self) -> AbstractContextManager[None]:
        return self._timing("memos:source_wait_seconds")

    @contextmanager
    def _timing(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._series[name].observe(time.perf_counter() - began)
