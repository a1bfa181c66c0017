"""What an API process counts of plaintext memory and adapters.

Several processes add up in prometheus_client's multiprocess mode.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memos_vllm.integration.metrics import API_METRICS, CLASSES, create, series_key
from memos_vllm.memory.service import Recall


class MemoryMetrics:
    """Thread-safe, as prometheus_client's metrics are: recall and remembering run in threads."""

    def __init__(self) -> None:
        self._series: dict[str, Any] = {}
        for metric in API_METRICS:
            parent = create(metric, CLASSES[metric.kind])
            for values in metric.series:
                self._series[series_key(metric.name, *values)] = parent.labels(*values) if values else parent

    def stored(self, origin: str, number: int = 1) -> None:
        self._series[series_key("memos:memories_stored_total", origin)].inc(number)

    def recalled(self, recall: Recall) -> None:
        self._series[series_key("memos:memories_recalled_total", "long_lived")].inc(len(recall.long_lived))
        self._series[series_key("memos:memories_recalled_total", "late")].inc(len(recall.late))

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

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """Takes the time of a recall that succeeds."""
        began = time.perf_counter()
        yield
        self._series["memos:recall_seconds"].observe(time.perf_counter() - began)
