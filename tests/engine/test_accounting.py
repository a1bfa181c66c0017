"""What is counted of requests on a real engine: where their prefix came from, and what became of prefetches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.integration import activation_memory
from memos_vllm.integration.engine_metrics import COUNTERS, FIRST_TOKENS, GAUGES
from memos_vllm.integration.metrics import ENGINE_METRICS, Kind, Source, series_key
from memos_vllm.integration.scene_table import SCENE_PARAM
from tests.engine.conftest import Engine
from tests.engine.test_kv_tiers import SALT, flip_bit_in_data, prompt
from tests.engine.test_scenes import NUM_BLOCKS, ask, expect, totals


class Counted:
    """What moved inside a ``with`` block."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.first_tokens: list[tuple[str, float]] = []

    def __getitem__(self, name_and_labels: str | tuple[str, ...]) -> float:
        parts = (name_and_labels,) if isinstance(name_and_labels, str) else name_and_labels
        return self.counters[series_key(f"memos:{parts[0]}_total", *parts[1:])]

    @property
    def sources(self) -> list[str]:
        return [source for source, _ in self.first_tokens]


@contextmanager
def counted(engine: Engine) -> Iterator[Counted]:
    """Takes what every step sends, as vLLM does, and what is left at the end."""
    seen = Counted()
    connector = engine.scheduler.connector
    original = connector.get_kv_connector_stats

    def take() -> Any:
        stats = original()
        if stats is not None:
            seen.counters.update(stats.data[COUNTERS])
            seen.first_tokens += stats.data[FIRST_TOKENS]
        return stats

    original()
    connector.get_kv_connector_stats = take
    try:
        yield seen
        take()
    finally:
        del connector.get_kv_connector_stats


@pytest.mark.parametrize(
    ("source", "tiers"),
    [
        (Source.NONE, {"gpu": 0, "host": 0, "disk": 0}),
        (Source.GPU, {"gpu": NUM_BLOCKS, "host": 0, "disk": 0}),
        (Source.HOST, {"gpu": 0, "host": NUM_BLOCKS, "disk": 0}),
        (Source.DISK, {"gpu": 0, "host": 0, "disk": NUM_BLOCKS}),
    ],
)
def test_a_first_token_has_the_source_of_its_prefix(engine: Engine, source: Source, tiers: dict[str, int]) -> None:
    token_ids = prompt(300 + list(Source).index(source))
    if source is not Source.NONE:
        engine.generate(token_ids)
        engine.settle()
    if source in (Source.HOST, Source.DISK):
        engine.drop_gpu()
    if source is Source.DISK:
        engine.tiers.drop_host()

    with counted(engine) as seen:
        engine.generate(token_ids)
        engine.settle()

    assert seen.sources == [source]
    assert 0 < seen.first_tokens[0][1] < 600
    missing = NUM_BLOCKS
    for tier, num_blocks in tiers.items():
        missing -= num_blocks
        assert seen["tier_hit_blocks", tier] == num_blocks
        assert seen["tier_miss_blocks", tier] == missing


def test_an_answer_of_one_token_has_a_first_token(engine: Engine) -> None:
    with counted(engine) as seen:
        engine.generate(prompt(310), max_tokens=1)
    assert seen.sources == [Source.NONE]


def test_a_load_that_fails_is_told_from_one_that_does_not(engine: Engine, engine_data_dir: Path) -> None:
    token_ids = prompt(311)
    known = set(engine_data_dir.rglob("*.safetensors"))
    engine.generate(token_ids)
    engine.drop_gpu()
    engine.tiers.drop_host()
    for path in set(engine_data_dir.rglob("*.safetensors")) - known:
        flip_bit_in_data(path)

    with counted(engine) as seen:
        engine.generate(token_ids)
        engine.settle()

    assert seen.sources == [Source.FAILED]
    assert all(seen["tier_hit_blocks", tier] == 0 for tier in ("gpu", "host", "disk"))
    assert all(seen["tier_miss_blocks", tier] == NUM_BLOCKS for tier in ("gpu", "host", "disk"))
    assert seen["copy_failures", "disk_to_gpu", "request"] >= 1
    assert seen["checksum_failures"] == seen["corrupt_files"] >= 1


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_prefetch_that_a_request_uses(engine: Engine, tier: str) -> None:
    token_ids = prompt(320 if tier == "host" else 321)
    ask(engine, "s", token_ids)
    engine.settle()
    engine.drop_gpu()
    if tier == "disk":
        engine.tiers.drop_host()

    with counted(engine) as seen:
        expect(engine, "s")
        ask(engine, "s", token_ids)
        ask(engine, "s", token_ids)

    assert seen.sources == [Source.GPU_PREFETCHED, Source.GPU], "used once, then an ordinary hit"
    assert seen["prefetched_blocks"] == seen["prefetch_used_blocks"] == NUM_BLOCKS
    size_bytes = NUM_BLOCKS * engine.tiers.block_bytes
    assert seen["prefetched_bytes"] == seen["prefetch_used_bytes"] == size_bytes
    assert seen["copy_bytes", f"{tier}_to_gpu", "prefetch"] == size_bytes
    assert seen["copy_seconds", f"{tier}_to_gpu", "prefetch"] > 0
    assert seen["copy_bytes", f"{tier}_to_gpu", "request"] == 0
    assert seen["scene_arrivals", "ready"] == 2 and not seen["prefetch_wasted_blocks"]


def test_a_prefetch_that_leaves_before_it_is_used_is_wasted(engine: Engine) -> None:
    token_ids = prompt(322)
    ask(engine, "s", token_ids)
    engine.settle()
    engine.drop_gpu()
    with counted(engine) as seen:
        expect(engine, "s")
        engine.drop_gpu()
        engine.generate(prompt(323))  # steps find it out, without anybody asking for the status
        ask(engine, "s", token_ids)
    assert seen["prefetch_wasted_blocks"] == NUM_BLOCKS and not seen["prefetch_used_blocks"]
    assert seen["prefetch_wasted_bytes"] == NUM_BLOCKS * engine.tiers.block_bytes
    assert seen["scene_arrivals", "missed"] == 1


def test_blocks_that_are_prefetched_again_before_a_step_found_them_gone_were_wasted_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_memory, "SWEEP_BLOCKS", 0)
    token_ids = prompt(324)
    ask(engine, "s", token_ids)
    engine.settle()
    engine.drop_gpu()
    with counted(engine) as seen:
        expect(engine, "s")
        engine.drop_gpu()
        expect(engine, "s")
        ask(engine, "s", token_ids)
    assert seen["prefetched_blocks"] == 2 * NUM_BLOCKS
    assert seen["prefetch_used_blocks"] == seen["prefetch_wasted_blocks"] == NUM_BLOCKS


def test_a_request_for_several_choices_arrives_once(engine: Engine) -> None:
    from vllm import SamplingParams

    token_ids = prompt(325)
    ask(engine, "s", token_ids)
    engine.settle()
    before = Counter(totals(engine))
    params = SamplingParams(
        n=12, max_tokens=2, ignore_eos=True, detokenize=False, extra_args={"kv_transfer_params": {SCENE_PARAM: "s"}}
    )
    done = engine.llm.generate([{"prompt_token_ids": token_ids, "cache_salt": SALT}], params, use_tqdm=False)[0]
    assert len(done.outputs) == 12
    after = Counter(totals(engine))
    assert {name: after[name] - before[name] for name in ("ready", "late", "missed", "other")} == {
        "ready": 1, "late": 0, "missed": 0, "other": 0,
    }  # fmt: skip


def test_what_steps_send_adds_up_to_the_status(engine: Engine) -> None:
    before = engine.side.handle("status", {})["accounting"]
    with counted(engine) as seen:
        for seed in (330, 331, 330):
            engine.generate(prompt(seed))
        engine.settle()
    after = engine.side.handle("status", {})["accounting"]
    moved = {key: value - before[COUNTERS][key] for key, value in after[COUNTERS].items()}
    assert {key: value for key, value in moved.items() if value} == pytest.approx(
        {key: value for key, value in seen.counters.items() if value}
    )
    counts = [sum(each["buckets"]) for each in after[FIRST_TOKENS].values()]
    assert sum(counts) - sum(sum(each["buckets"]) for each in before[FIRST_TOKENS].values()) == 3


def test_everything_that_is_counted_is_exported(engine: Engine) -> None:
    status = engine.side.handle("status", {})["accounting"]
    for kind, part in ((Kind.COUNTER, COUNTERS), (Kind.GAUGE, GAUGES)):
        series = {series_key(each.name, *own) for each in ENGINE_METRICS if each.kind is kind for own in each.series}
        assert status[part].keys() == series


def test_a_step_in_which_nothing_happens_sends_nothing(engine: Engine) -> None:
    engine.generate(prompt(340))
    engine.settle()
    engine.scheduler.connector.get_kv_connector_stats()
    assert engine.scheduler.connector.get_kv_connector_stats() is None


def test_held_bytes_follow_the_tiers(engine: Engine) -> None:
    engine.generate(prompt(341))
    engine.settle()
    gauges = engine.side.handle("status", {})["accounting"][GAUGES]
    assert gauges[series_key("memos:tier_used_bytes", "host")] == len(engine.tiers.slots) * engine.tiers.block_bytes > 0
    engine.tiers.drop_host()
    gauges = engine.side.handle("status", {})["accounting"][GAUGES]
    assert gauges[series_key("memos:tier_used_bytes", "host")] == 0
    assert gauges[series_key("memos:tier_used_bytes", "disk")] == engine.tiers.disk.usage_bytes > 0
    assert gauges[series_key("memos:tier_limit_bytes", "disk")] == engine.tiers.disk.budget_bytes
