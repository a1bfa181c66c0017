"""What an API process counts of plaintext memory; several processes add up in prometheus_client's multiprocess mode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
        self._series["memos:source_passages_total"].inc(len(recall.sources))

    def source_failed(self, reason: str) -> None:
        self._series[series_key("memos:source_failures_total", reason)].inc()

    def searched(self) -> None:
        self._series["memos:memory_searches_total"].inc()

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
