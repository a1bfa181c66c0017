"""What the scheduler side counts for the operator, and what of it is new since it was last asked.

Most numbers are totals that the tier manager and the scene table keep anyway. What only the request
path knows is counted here: which tier gave a request its prefix, and how long its first token took.

Time to first token runs from the arrival that vLLM notes in the API process (after the prompt was
tokenised) to the end of the step that sampled the token. Both are wall clock of one machine. vLLM's own
histogram adds the way back to the API process.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos_vllm.integration.engine_metrics import COUNTERS, FIRST_TOKENS, GAUGES, MemosStats
from memos_vllm.integration.metrics import LATENCY_BUCKETS_S, TIERS, Source, series_key
from memos_vllm.integration.scene_table import SceneTable
from memos_vllm.store.manager import TierManager
from memos_vllm.store.ops import Load, Op, Read

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class _Admission:
    """A request that was given its blocks."""

    request: Request
    num_asked: int
    """Full blocks of its prompt."""
    given: dict[str, int]
    """Blocks by tier."""
    source: Source


class Accounting:
    """Owned by the engine's loop.

    Args:
        scenes: None if prediction is off.
        now: wall-clock seconds, as ``Request.arrival_time``.
    """

    def __init__(self, tiers: TierManager, scenes: SceneTable | None, now: Callable[[], float] = time.time) -> None:
        self._tiers = tiers
        self._scenes = scenes
        self._prediction_failed = False
        self._now = now
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._waiting: dict[str, _Admission] = {}
        """Requests that have their blocks and no token yet."""
        self._first_tokens: list[tuple[Source, float]] = []
        self._buckets = {source: [0] * (len(LATENCY_BUCKETS_S) + 1) for source in Source}
        self._seconds = dict.fromkeys(Source, 0.0)
        self._sent: dict[str, float] = {}
        self._changed = True

    # -- what happens ---------------------------------------------------------------------------

    def changed(self) -> None:
        """Some total may have moved. A step in which none did then costs nothing."""
        self._changed = True

    def prediction_failed(self) -> None:
        """Scenes keep nothing any more; what was counted of them stays."""
        self._prediction_failed = self._changed = True

    def is_new(self, request: Request) -> bool:
        """Whether ``admitted`` has not counted it yet; what a preempted one finds is its own."""
        return not (request.request_id in self._waiting or request.num_output_tokens or request.num_preemptions)

    def admitted(
        self, request: Request, num_asked: int, num_resident: int, num_prefetched: int, loads: Sequence[Op]
    ) -> None:
        """A new request was given its blocks.

        Args:
            num_asked: full blocks of its prompt.
            num_resident: leading ones that were on the GPU.
            num_prefetched: of those, what a prefetch had brought, for nobody else before.
            loads: copies that bring further ones.
        """
        given = {
            "gpu": num_resident,
            "host": sum(len(load.block_ids) for load in loads if isinstance(load, Load)),
            "disk": sum(len(load.block_ids) for load in loads if isinstance(load, Read)),
        }
        self._waiting[request.request_id] = _Admission(request, num_asked, given, _source(given, num_prefetched))
        self._changed = True

    def load_failed(self, request_id: str) -> None:
        """The request's blocks are computed instead."""
        if (admission := self._waiting.get(request_id)) is not None:
            admission.source = Source.FAILED
            admission.given = {"gpu": admission.given["gpu"]}

    def finished(self, request: Request) -> None:
        if request.request_id in self._waiting:
            self._take_first_token(request)
        if (admission := self._waiting.pop(request.request_id, None)) is not None:  # it ended without a token
            self._count_given(admission)
        self._changed = True

    def _count_given(self, admission: _Admission) -> None:
        """Not at once: a load may fail, and a counter never goes back."""
        num_missing = admission.num_asked
        for tier in TIERS:
            num_given = admission.given.get(tier, 0)
            num_missing -= num_given
            self._hits[tier] += num_given
            if tier != "disk" or self._tiers.disk is not None:
                self._misses[tier] += num_missing

    def _take_first_token(self, request: Request) -> None:
        if not request.num_output_tokens:
            return
        admission = self._waiting.pop(request.request_id)
        self._count_given(admission)
        source = admission.source
        seconds = max(0.0, self._now() - request.arrival_time)
        self._first_tokens.append((source, seconds))
        self._buckets[source][bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        self._seconds[source] += seconds
        self._changed = True

    # -- what is told ---------------------------------------------------------------------------

    def take(self) -> MemosStats | None:
        """What is new since the last call; at the end of every step."""
        for admission in list(self._waiting.values()):
            self._take_first_token(admission.request)
        if not self._changed:
            return None
        self._changed = False
        counters = self._counters()
        increases = {key: value - self._sent.get(key, 0) for key, value in counters.items()}
        self._sent = counters
        first_tokens, self._first_tokens = self._first_tokens, []
        return MemosStats(
            {
                COUNTERS: {key: increase for key, increase in increases.items() if increase},
                GAUGES: self._gauges(),
                FIRST_TOKENS: [[source.value, seconds] for source, seconds in first_tokens],
            }
        )

    def status(self) -> dict[str, Any]:
        """All of it since the start, for ``/v1/memos/status``."""
        return {
            COUNTERS: self._counters(),
            GAUGES: self._gauges(),
            FIRST_TOKENS: {
                source.value: {"buckets": list(self._buckets[source]), "seconds": self._seconds[source]}
                for source in Source
            },
        }

    def _counters(self) -> dict[str, float]:
        counters: dict[str, float] = {}
        for (path, purpose), copies in self._tiers.copies.items():
            counters[series_key("memos:copy_bytes_total", path, purpose)] = copies.size_bytes
            counters[series_key("memos:copy_seconds_total", path, purpose)] = copies.seconds
            counters[series_key("memos:copy_failures_total", path, purpose)] = copies.failed_ops
        totals = self._tiers.totals
        counters["memos:corrupt_files_total"] = totals.corrupt_files
        counters["memos:checksum_failures_total"] = totals.checksum_failures
        counters["memos:unsaved_blocks_total"] = totals.skipped_blocks
        for tier in TIERS:
            counters[series_key("memos:tier_hit_blocks_total", tier)] = self._hits[tier]
            counters[series_key("memos:tier_miss_blocks_total", tier)] = self._misses[tier]
        if self._scenes is not None:
            scenes = self._scenes.totals
            for outcome in ("ready", "late", "missed", "other"):
                counters[series_key("memos:scene_arrivals_total", outcome)] = getattr(scenes, outcome)
            for name, num_blocks in (
                ("prefetched", scenes.prefetched_blocks),
                ("prefetch_used", scenes.used_blocks),
                ("prefetch_wasted", scenes.wasted_blocks),
                ("prefetch_failed", scenes.failed_blocks),
            ):
                counters[f"memos:{name}_blocks_total"] = num_blocks
                counters[f"memos:{name}_bytes_total"] = num_blocks * self._tiers.block_bytes
        return counters

    def _gauges(self) -> dict[str, float]:
        slots, disk, block_bytes = self._tiers.slots, self._tiers.disk, self._tiers.block_bytes
        used, limit = "memos:tier_used_bytes", "memos:tier_limit_bytes"
        kept = (0, 0)
        if self._scenes is not None and not self._prediction_failed:
            kept = self._scenes.queue.num_kept_blocks, self._scenes.budget_blocks
        return {
            "memos:prediction_failed": int(self._prediction_failed),
            series_key(used, "gpu"): kept[0] * block_bytes,
            series_key(limit, "gpu"): kept[1] * block_bytes,
            series_key(used, "host"): slots.num_used * block_bytes,
            series_key(limit, "host"): slots.num_slots * block_bytes,
            series_key(used, "disk"): disk.usage_bytes if disk is not None else 0,
            series_key(limit, "disk"): disk.budget_bytes if disk is not None else 0,
        }


def _source(given: dict[str, int], num_prefetched: int) -> Source:
    if given["disk"]:
        return Source.DISK
    if given["host"]:
        return Source.HOST
    if num_prefetched:
        return Source.GPU_PREFETCHED
    return Source.GPU if given["gpu"] else Source.NONE
