"""From the scheduler side to Prometheus: vLLM carries a connector's stats to an API process with each step.

The API process adds them to its metrics. With several API processes each gets a part, and
prometheus_client's multiprocess mode adds the parts up; with data parallelism each engine has its label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from memos_vllm.integration.metrics import ENGINE_METRICS, Kind, create, series_key

COUNTERS, GAUGES, FIRST_TOKENS = "counters", "gauges", "first_tokens"


@dataclass
class MemosStats(KVConnectorStats):
    """What happened since the last such message. ``data``, plain enough for msgpack:

    counters      series key to increase
    gauges        series key to value; all of them, or none
    first_tokens  [source, seconds] per request
    """

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = {COUNTERS: {}, GAUGES: {}, FIRST_TOKENS: []}

    def aggregate(self, other: KVConnectorStats) -> MemosStats:
        assert isinstance(other, MemosStats)
        counters = self.data[COUNTERS]
        for key, increase in other.data[COUNTERS].items():
            counters[key] = counters.get(key, 0) + increase
        self.data[GAUGES] = other.data[GAUGES] or self.data[GAUGES]
        self.data[FIRST_TOKENS] += other.data[FIRST_TOKENS]
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line: what moved, and how things stand."""
        told = self.data[COUNTERS] | self.data[GAUGES]
        return {key.removeprefix("memos:"): round(value, 3) for key, value in told.items()}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class MemosPromMetrics(KVConnectorPromMetrics):
    """The engine's metrics in an API process."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        classes = {
            Kind.COUNTER: metric_types[Counter],
            Kind.GAUGE: metric_types[Gauge],
            Kind.HISTOGRAM: metric_types[Histogram],
        }
        self._series: dict[tuple[int, str], Any] = {}
        for metric in ENGINE_METRICS:
            parent = create(metric, classes[metric.kind], tuple(labelnames))
            for engine, values in per_engine_labelvalues.items():
                for own in metric.series:
                    self._series[engine, series_key(metric.name, *own)] = parent.labels(*values, *own)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, increase in transfer_stats_data[COUNTERS].items():
            self._series[engine_idx, key].inc(increase)
        for key, value in transfer_stats_data[GAUGES].items():
            self._series[engine_idx, key].set(value)
        for source, seconds in transfer_stats_data[FIRST_TOKENS]:
            self._series[engine_idx, series_key("memos:time_to_first_token_seconds", source)].observe(seconds)
