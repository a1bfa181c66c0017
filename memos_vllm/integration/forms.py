"""Which form each memory should have, from what this API process has measured."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict
from typing import Any

from fastapi import Request
from prometheus_client import REGISTRY

from memos_vllm.adapters.questions import questions_of
from memos_vllm.core.forms import Measured, choose
from memos_vllm.integration import engine_channel
from memos_vllm.integration.rest import answers_errors, principal, router_at
from memos_vllm.integration.state import MemosState, state_of
from memos_vllm.memory.records import MemoryRecord, utc_now

router = router_at("/v1/memories")

TRAINING_S = 120.0
"""Of 24 facts of the recall model on two CPU cores, until this server has an adapter that was distilled here."""


@router.get("/{memory_id}/form")
@answers_errors
async def form(raw_request: Request, memory_id: str, user: str | None = None) -> Any:
    """The form that would cost least, what it was computed from, and why."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    record = await asyncio.to_thread(state.service.get, who, memory_id)
    engines = await engine_channel.call(state.engine, "status")
    training_s = await asyncio.to_thread(state.adapters.registry.distillation_s)
    measured = _measure(state, record, engines[0], training_s or TRAINING_S)
    choice = choose(measured)
    return {"memory": record.id, "form": choice.form, "why": choice.why, "cost_s_per_day": choice.cost_s_per_day,
            "measured": asdict(measured)}  # fmt: skip


def _measure(state: MemosState, record: MemoryRecord, kv: dict[str, Any], training_s: float) -> Measured:
    tokens = state.count_tokens(record.text)
    per_token_s = _prefill_s_per_token()
    disk = kv.get("disk", {"blocks": 0})
    kv_bytes = None
    if disk["blocks"]:
        kv_bytes = round(disk["bytes"] / disk["blocks"] / kv["block_size"] * tokens)
    age_s = max(0.0, (utc_now() - record.created_at).total_seconds())
    return Measured(
        uses=state.recalls.of(record.id),
        observed_s=min(state.recalls.observed_s, age_s),
        tokens=tokens,
        prefill_s=None if per_token_s is None else per_token_s * tokens,
        kv_bytes=kv_bytes,
        stable_s=(utc_now() - (record.created_at if record.version == 1 else record.updated_at)).total_seconds(),
        askable=any(True for _ in questions_of(record.text)),
        training_s=training_s,
    )


def _prefill_s_per_token() -> float | None:
    """From vLLM's own metrics: time in prefill over prompt tokens that no cache had; over all requests so far."""
    sums: Counter[str] = Counter()
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            sums[sample.name] += sample.value
    hits = sums["vllm:prefix_cache_hits_total"] + sums["vllm:external_prefix_cache_hits_total"]
    computed = sums["vllm:prompt_tokens_total"] - hits
    seconds = sums["vllm:request_prefill_time_seconds_sum"]
    return seconds / computed if computed > 0 and seconds > 0 else None
