"""Activation memory on a real engine: exact, isolated, published after complete, never wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.integration import salts
from tests.engine.conftest import BLOCK_SIZE, Engine

NUM_BLOCKS = 9
SALT = "memos:alice"


def prompt(seed: int, num_tokens: int = NUM_BLOCKS * BLOCK_SIZE + 5) -> list[int]:
    return random.Random(seed).choices(range(300, 500), k=num_tokens)


def signature(output: Any) -> list[tuple[int, float]]:
    """Tokens and their log-probabilities, to the last bit."""
    completion = output.outputs[0]
    return [(token, step[token].logprob) for token, step in zip(completion.token_ids, completion.logprobs, strict=True)]


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def cached_bytes(engine: Engine) -> dict[Any, bytes]:
    """Content of every block in the GPU's prefix cache, by hash."""
    import torch

    from memos_vllm.kernels.kv_copy import gather_blocks

    planes = engine.worker.planes
    blocks = [block for block in engine.pool.blocks if block.block_hash is not None]
    out = torch.empty(len(blocks), engine.worker.handshake().block_bytes, dtype=torch.uint8)
    gather_blocks(planes, [block.block_id for block in blocks], out)
    return {block.block_hash: row.numpy().tobytes() for block, row in zip(blocks, out, strict=True)}


@contextmanager
def withheld_results(engine: Engine) -> Iterator[None]:
    """The copies run, but their completion is not reported until the end of the block."""
    transfer = engine.worker._transfer
    original = transfer.drain
    transfer.drain = lambda: []
    try:
        yield
    finally:
        transfer.drain = original


def add_request(engine: Engine, request_id: str, token_ids: list[int], salt: str = SALT) -> None:
    from vllm import SamplingParams

    engine.llm.llm_engine.add_request(
        request_id,
        {"prompt_token_ids": token_ids, "cache_salt": salt},
        SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False),
    )


def run_until_finished(engine: Engine, *request_ids: str) -> dict[str, Any]:
    finished: dict[str, Any] = {}
    while not finished.keys() >= set(request_ids):
        for output in engine.llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
    return finished


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_load_equals_a_local_hit_to_the_last_bit(engine: Engine, tier: str) -> None:
    token_ids = prompt(1 if tier == "host" else 2)
    engine.generate(token_ids, SALT)
    engine.settle()
    warm = engine.generate(token_ids, SALT)
    assert warm.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
    before = cached_bytes(engine)

    engine.drop_gpu()
    if tier == "disk":
        engine.tiers.drop_host()
    loaded = engine.generate(token_ids, SALT)

    assert loaded.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
    assert signature(loaded) == signature(warm)
    after = cached_bytes(engine)
    shared = before.keys() & after.keys()
    assert len(shared) >= NUM_BLOCKS
    assert all(before[block_hash] == after[block_hash] for block_hash in shared)


def test_the_cold_run_gives_the_same_tokens(engine: Engine) -> None:
    token_ids = prompt(3)
    cold = engine.generate(token_ids, SALT)
    engine.drop_gpu()
    loaded = engine.generate(token_ids, SALT)
    assert loaded.num_cached_tokens and tokens(loaded) == tokens(cold)


def test_a_longer_prompt_loads_the_prefix_it_shares(engine: Engine) -> None:
    head = prompt(4, 5 * BLOCK_SIZE)
    engine.generate(head + prompt(5, 40), SALT)
    engine.drop_gpu()
    other = engine.generate(head + prompt(6, 70), SALT)
    assert other.num_cached_tokens == 5 * BLOCK_SIZE


def test_another_salt_never_hits_in_any_tier(engine: Engine) -> None:
    token_ids = prompt(7)
    engine.generate(token_ids, SALT)
    engine.settle()
    for stranger in ("memos:bob", None):
        assert engine.generate(token_ids, stranger).num_cached_tokens == 0  # GPU
    engine.drop_gpu()
    for stranger in ("memos:bobby", "alice"):
        assert engine.generate(token_ids, stranger).num_cached_tokens == 0  # host
    engine.drop_gpu()
    engine.tiers.drop_host()
    assert engine.generate(token_ids, "memos:carol").num_cached_tokens == 0  # disk
    engine.drop_gpu()
    assert engine.generate(token_ids, SALT).num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE


def test_requests_without_memory_leave_nothing_behind(engine: Engine) -> None:
    token_ids = prompt(8)
    engine.generate(token_ids, None)
    engine.generate(token_ids, "someone's own salt")
    engine.drop_gpu()
    assert len(engine.tiers.slots) == 0
    assert engine.generate(token_ids, None).num_cached_tokens == 0


def test_a_hash_is_published_only_after_its_copy_finished(engine: Engine) -> None:
    token_ids = prompt(9)
    engine.generate(token_ids, SALT)
    engine.drop_gpu()
    with withheld_results(engine):
        add_request(engine, "waits", token_ids)
        for _ in range(20):
            engine.llm.llm_engine.step()
        assert engine.tiers.num_in_flight > 0, "the load must be under way for this test to mean anything"
        assert not any(block.block_hash for block in engine.pool.blocks)
        add_request(engine, "served", prompt(10, 40))
        run_until_finished(engine, "served")  # others are served meanwhile
    finished = run_until_finished(engine, "waits")
    assert finished["waits"].num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE


def test_a_block_that_is_being_saved_is_not_given_away(engine: Engine) -> None:
    free = engine.free_blocks()
    with withheld_results(engine):
        engine.generate(prompt(11), SALT)
        assert engine.side.holds_blocks
        assert engine.free_blocks() == free - NUM_BLOCKS
    engine.settle()
    assert engine.free_blocks() == free


def test_a_request_that_is_aborted_while_it_loads_leaves_no_trace(engine: Engine) -> None:
    token_ids = prompt(12)
    warm = tokens(engine.generate(token_ids, SALT))
    engine.drop_gpu()
    with withheld_results(engine):
        add_request(engine, "gone", token_ids)
        for _ in range(5):
            engine.llm.llm_engine.step()
        engine.llm.llm_engine.abort_request(["gone"])
        engine.llm.llm_engine.step()
    engine.settle()
    assert tokens(engine.generate(token_ids, SALT)) == warm


def test_requests_with_the_same_prefix_load_it_once(engine: Engine) -> None:
    token_ids = prompt(13)
    engine.generate(token_ids, SALT)
    engine.drop_gpu()
    loaded = engine.tiers.totals.loaded_host_blocks
    for name in ("one", "two", "three"):
        add_request(engine, name, token_ids)
    finished = run_until_finished(engine, "one", "two", "three")
    assert {output.num_cached_tokens for output in finished.values()} == {NUM_BLOCKS * BLOCK_SIZE}
    assert engine.tiers.totals.loaded_host_blocks == loaded + NUM_BLOCKS


def test_without_room_a_request_is_served_and_nothing_is_saved(engine: Engine) -> None:
    slots = engine.tiers.slots
    taken = [bytes([index % 256, index // 256]) for index in range(slots.num_slots)]
    assert slots.reserve(taken) is not None
    try:
        skipped = engine.tiers.totals.skipped_blocks
        assert engine.generate(prompt(14), SALT)
        engine.settle()
        assert engine.tiers.totals.skipped_blocks == skipped + NUM_BLOCKS
    finally:
        slots.abort(taken)


def test_what_is_forgotten_is_gone_from_every_tier_under_its_salt(engine: Engine) -> None:
    token_ids = prompt(15)
    salt = "memos:" + "f" * 64
    engine.generate(token_ids, salt)
    engine.generate(prompt(16), SALT)
    engine.settle()
    report = engine.side.handle("forget", {"salt": salt}).result()
    assert all(report[tier] >= NUM_BLOCKS for tier in ("gpu_blocks", "host_blocks", "disk_blocks"))
    assert engine.generate(token_ids, salt).num_cached_tokens == 0, "no scene named it, and the GPU has none of it"
    engine.drop_gpu()
    assert engine.generate(token_ids, salt).num_cached_tokens == 0, "it must not be saved again either"
    assert engine.generate(prompt(16), SALT).num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE, "others keep theirs"
    assert salts.tag(salt) != salts.tag(SALT)


def flip_bit_in_data(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-len(raw) // 4] ^= 0x10
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def another_model(path: Path) -> None:
    raw = path.read_bytes()
    assert b"bfloat16" in raw
    path.write_bytes(raw.replace(b"bfloat16", b"float016", 1))


def vanish(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip_bit_in_data, truncate, another_model, vanish])
def test_a_damaged_file_is_a_miss_and_never_a_wrong_answer(engine: Engine, engine_data_dir: Path, damage: Any) -> None:
    token_ids = prompt(20 + sum(map(ord, damage.__name__)))
    known = set(engine_data_dir.rglob("*.safetensors"))
    right = tokens(engine.generate(token_ids, SALT))
    engine.drop_gpu()
    engine.tiers.drop_host()
    files = set(engine_data_dir.rglob("*.safetensors")) - known
    assert files
    for path in files:
        damage(path)
    failed = engine.tiers.totals.failed_ops

    output = engine.generate(token_ids, SALT)

    assert tokens(output) == right
    assert engine.tiers.totals.failed_ops > failed, "the failure is counted"
    engine.drop_gpu()
    engine.tiers.drop_host()
    again = engine.generate(token_ids, SALT)
    assert again.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE, "it was computed and saved anew"
    assert tokens(again) == right
