"""Next-scene materialisation on a real engine: KV is in GPU blocks before the request exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.integration.scene_table import KEEP_SHARE, SCENE_PARAM
from tests.engine.conftest import BLOCK_SIZE, Engine
from tests.engine.test_kv_tiers import flip_bit_in_data, prompt, run_until_finished, signature, tokens, withheld_results

NUM_BLOCKS = 9
SALT = "memos:alice"


def ask(engine: Engine, scene: str, token_ids: list[int], salt: str = SALT) -> Any:
    return engine.generate(token_ids, salt, extra_args={"kv_transfer_params": {SCENE_PARAM: scene}})


def expect(engine: Engine, *scenes: str) -> None:
    """As an API process does it; returns when all copies have ended."""
    tell(engine, *scenes)
    engine.settle()


def tell(engine: Engine, *scenes: str) -> None:
    told = [(1.0 / (1 + i), scene) for i, scene in enumerate(scenes)]
    engine.side.handle("expect", {"planner": "p", "scenes": told})


def totals(engine: Engine) -> dict[str, int]:
    return engine.side.handle("status", {})["prediction"]


@contextmanager
def counted_forward_tokens(engine: Engine) -> Iterator[list[int]]:
    """Tokens that the scheduler sent through the model."""
    scheduled: list[int] = []
    original = engine.scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        scheduled.append(output.total_num_scheduled_tokens)
        return output

    engine.scheduler.schedule = schedule
    try:
        yield scheduled
    finally:
        engine.scheduler.schedule = original


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_scene_is_ready_before_its_request_without_a_forward_pass(engine: Engine, tier: str) -> None:
    token_ids = prompt(100 if tier == "host" else 101)
    ask(engine, "s", token_ids)
    engine.settle()
    warm = ask(engine, "s", token_ids)
    engine.drop_gpu()
    if tier == "disk":
        engine.tiers.drop_host()
    assert engine.side.handle("scene", {"scene": "s"})["state"] == "stored"

    with counted_forward_tokens(engine) as scheduled:
        expect(engine, "s")
    assert sum(scheduled) == 0 and scheduled, "copies need steps, but no forward pass"
    assert engine.side.handle("scene", {"scene": "s"})["state"] == "ready"

    loaded_before = engine.tiers.totals.loaded_host_blocks, engine.tiers.totals.loaded_disk_blocks
    before = totals(engine)
    output = ask(engine, "s", token_ids)
    assert signature(output) == signature(warm)
    assert output.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
    assert (engine.tiers.totals.loaded_host_blocks, engine.tiers.totals.loaded_disk_blocks) == loaded_before
    after = totals(engine)
    assert after["ready"] == before["ready"] + 1 and after["used_blocks"] == before["used_blocks"] + NUM_BLOCKS


def test_a_longer_request_finds_what_it_shares(engine: Engine) -> None:
    head = prompt(102, 5 * BLOCK_SIZE)
    ask(engine, "s", head + prompt(103, 50))
    engine.drop_gpu()
    expect(engine, "s")
    before = totals(engine)["ready"]
    assert ask(engine, "s", head + prompt(104, 70)).num_cached_tokens == 5 * BLOCK_SIZE
    assert totals(engine)["ready"] == before + 1


def test_expected_scenes_outlast_pressure_that_takes_the_others(engine: Engine) -> None:
    kept, lost = prompt(105), prompt(106)
    ask(engine, "kept", kept)
    ask(engine, "lost", lost)
    expect(engine, "kept")
    num_blocks = engine.pool.num_gpu_blocks
    for index in range(num_blocks // 120 + 1):
        engine.generate(prompt(1000 + index, 120 * BLOCK_SIZE), None, max_tokens=1)
    assert engine.side.handle("scene", {"scene": "kept"})["state"] == "ready"
    report = engine.side.handle("scene", {"scene": "lost"})
    assert report["resident_blocks"] == 0 and report["prefetch"] == "none"


def test_live_requests_take_every_block_they_need(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept blocks are free blocks: no request waits, is preempted or fails because of them."""
    scenes = []
    for index in range(int(KEEP_SHARE * engine.pool.num_gpu_blocks) // 100):
        ask(engine, f"k{index}", prompt(2000 + index, 100 * BLOCK_SIZE + 3))
        scenes.append(f"k{index}")
    expect(engine, *scenes)
    assert totals(engine)["kept_blocks"] > engine.pool.num_gpu_blocks // 2
    from vllm import SamplingParams

    preempted: list[str] = []
    monkeypatch.setattr(engine.scheduler, "_preempt_request", lambda request, *_, **__: preempted.append(request))

    for index in range(3):
        engine.llm.llm_engine.add_request(
            f"big{index}",
            {"prompt_token_ids": prompt(3000 + index, 125 * BLOCK_SIZE)},
            SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False),
        )
    finished = run_until_finished(engine, "big0", "big1", "big2")
    assert all(len(output.outputs[0].token_ids) == 4 for output in finished.values())
    assert not preempted
    engine.side.memory.scenes.check_integrity()
    assert engine.scheduler.reset_prefix_cache(), "kept blocks do not stand in the way of a reset"


def test_nothing_is_published_before_its_copy_ended(engine: Engine) -> None:
    token_ids = prompt(107)
    ask(engine, "s", token_ids)
    engine.drop_gpu()
    with withheld_results(engine):
        tell(engine, "s")
        for _ in range(20):
            engine.core.step_fn()
        assert engine.side.holds_blocks
        assert engine.side.handle("scene", {"scene": "s"}) == {
            "enabled": True,
            "state": "loading",
            "prefetch": "accepted",
            "blocks": NUM_BLOCKS,
            "resident_blocks": 0,
            "adapter": None,
        }
        assert not any(block.block_hash for block in engine.pool.blocks)
    engine.settle()
    report = engine.side.handle("scene", {"scene": "s"})
    assert report["state"] == "ready" and report["prefetch"] == "completed"


def test_a_request_that_comes_during_the_prefetch_waits_and_hits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody copies anything twice, and the workers know that somebody waits now."""
    from vllm import SamplingParams

    hurried: list[int] = []
    transfer = engine.worker._transfer
    monkeypatch.setattr(transfer, "hurry", lambda ids, hurry=transfer.hurry: (hurried.extend(ids), hurry(ids)))
    token_ids = prompt(108)
    right = tokens(ask(engine, "s", token_ids))
    engine.drop_gpu()
    late, loads = totals(engine)["late"], engine.tiers.copies["host_to_gpu", "request"].size_bytes
    with withheld_results(engine):
        tell(engine, "s")
        engine.core.step_fn()
        prefetches = list(engine.tiers._in_flight._pending)
        params = SamplingParams(
            temperature=0,
            max_tokens=8,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": {SCENE_PARAM: "s"}},
        )
        engine.llm.llm_engine.add_request("late", {"prompt_token_ids": token_ids, "cache_salt": SALT}, params)
        for _ in range(10):
            engine.llm.llm_engine.step()
        assert prefetches and hurried == prefetches
    output = run_until_finished(engine, "late")["late"]
    assert output.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE and tokens(output) == right
    assert engine.tiers.copies["host_to_gpu", "request"].size_bytes == loads
    assert totals(engine)["late"] == late + 1


def test_a_damaged_file_publishes_nothing(engine: Engine, engine_data_dir: Path) -> None:
    token_ids = prompt(109)
    known = set(engine_data_dir.rglob("*.safetensors"))
    right = tokens(ask(engine, "s", token_ids))
    engine.drop_gpu()
    engine.tiers.drop_host()
    for path in set(engine_data_dir.rglob("*.safetensors")) - known:
        flip_bit_in_data(path)
    before = totals(engine)["failed_blocks"]
    expect(engine, "s")
    assert totals(engine)["failed_blocks"] > before
    report = engine.side.handle("scene", {"scene": "s"})
    assert report["resident_blocks"] == 0 and report["prefetch"] == "failed"
    assert tokens(ask(engine, "s", token_ids)) == right


def test_a_forgotten_scene_leaves_the_gpu_too(engine: Engine) -> None:
    salt = "memos:" + "e" * 64
    ask(engine, "s", prompt(110), salt)
    ask(engine, "other", prompt(111))
    engine.settle()
    report = engine.side.handle("forget", {"salt": salt}).result()
    assert report["scenes"] == 1
    assert engine.side.handle("scene", {"scene": "s"})["state"] == "unknown"
    assert engine.generate(prompt(110), salt).num_cached_tokens == 0
    assert engine.generate(prompt(111), SALT).num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE


def test_unknown_scenes_and_repeats_are_no_error(engine: Engine) -> None:
    ask(engine, "s", prompt(112))
    engine.drop_gpu()
    expect(engine, "nobody", "s", "s", "nobody")
    assert engine.side.handle("scene", {"scene": "s"})["state"] == "ready"
    expect(engine)
    assert totals(engine)["kept_blocks"] == 0
