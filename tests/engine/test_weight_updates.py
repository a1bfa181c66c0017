"""After new weights KV of the old ones is found in no tier, without the operator naming ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import BlockHash, get_block_hash

from memos_vllm.integration.block_names import BlockNames
from tests.engine.conftest import BLOCK_SIZE, Engine
from tests.engine.test_kv_tiers import NUM_BLOCKS, SALT, add_request, prompt, run_until_finished, signature

NUM_TOKENS = NUM_BLOCKS * BLOCK_SIZE


def halve_first_layer(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.data.mul_(0.5)


def other_weights(engine: Engine) -> None:
    engine.llm.apply_model(halve_first_layer)


def the_same_weights(engine: Engine) -> None:
    engine.llm.collective_rpc("reload_weights")


def a_method_that_nobody_knows(engine: Engine) -> None:
    with pytest.raises(Exception, match=r"not implemented|no attribute"):
        engine.llm.collective_rpc("update_weights_of_a_worker_extension")


def a_function(engine: Engine) -> None:
    engine.llm.collective_rpc(lambda worker: None)


@pytest.fixture
def trained(engine: Engine) -> Iterator[Engine]:
    """An engine whose weights a test may change."""
    yield engine
    the_same_weights(engine)
    engine.drop_gpu()


@pytest.mark.parametrize("change", [other_weights, the_same_weights, a_method_that_nobody_knows, a_function])
def test_kv_of_before_is_not_loaded_after_an_ordinary_reset(trained: Engine, change: Callable[[Engine], None]) -> None:
    token_ids = prompt(1000)
    trained.generate(token_ids, SALT)
    trained.settle()
    change(trained)
    trained.drop_gpu()
    assert trained.scheduler.connector.scheduler_side.memory.status()["awaits_prefix_cache_reset"] is False
    fresh = trained.generate(token_ids, SALT)
    assert fresh.num_cached_tokens == 0
    assert signature(fresh) == signature(trained.generate(token_ids, "nobody's"))
    trained.drop_gpu()
    assert trained.generate(token_ids, SALT).num_cached_tokens == NUM_TOKENS, "KV of the new weights is"


def test_a_call_that_leaves_the_weights_alone_costs_nothing(trained: Engine) -> None:
    token_ids = prompt(1001)
    trained.generate(token_ids, SALT)
    trained.settle()
    trained.llm.collective_rpc("check_health")
    trained.drop_gpu()
    assert trained.generate(token_ids, SALT).num_cached_tokens == NUM_TOKENS


def test_what_a_request_found_on_the_gpu_before_its_reset_is_not_saved(trained: Engine) -> None:
    """vLLM goes on using its prefix cache until the operator empties it; from then on nothing may be of before."""
    token_ids = prompt(1002)
    trained.generate(token_ids, SALT)
    trained.settle()
    other_weights(trained)
    assert trained.side.memory.status()["awaits_prefix_cache_reset"] is True
    assert trained.generate(token_ids, SALT).num_cached_tokens == NUM_TOKENS, "as on a server without connector"
    trained.drop_gpu()
    fresh = trained.generate(token_ids, SALT)
    assert fresh.num_cached_tokens == 0
    assert signature(fresh) == signature(trained.generate(token_ids, "nobody's"))


def test_kv_of_a_request_that_ran_meanwhile_is_not_saved(trained: Engine) -> None:
    token_ids = prompt(1003)
    add_request(trained, "runs", token_ids)
    trained.llm.llm_engine.step()
    trained.llm.llm_engine.step()
    other_weights(trained)
    run_until_finished(trained, "runs")
    trained.drop_gpu()
    assert trained.generate(token_ids, SALT).num_cached_tokens == 0


def test_the_original_model_does_not_find_kv_of_other_weights_after_a_restart(trained: Engine) -> None:
    before, after = prompt(1004), prompt(1005)
    trained.side.memory.names._generation = b""  # as after a start, whatever other tests did
    trained.generate(before, SALT)
    trained.drop_gpu()
    of_original = block_hashes_on_gpu_after(trained, before)
    other_weights(trained)
    trained.drop_gpu()
    of_others = block_hashes_on_gpu_after(trained, after)
    trained.settle()
    disk = trained.tiers.disk
    restarted = BlockNames(trained.side.memory.names.identity, "memory")
    assert [key in disk for key in restarted.of(of_original, None) or ()] == [True] * NUM_BLOCKS
    assert [key in disk for key in restarted.of(of_others, None) or ()] == [False] * NUM_BLOCKS


def block_hashes_on_gpu_after(engine: Engine, token_ids: list[int]) -> list[BlockHash]:
    """Of the blocks that a request leaves on the GPU where nothing was."""
    engine.generate(token_ids, SALT)
    return [get_block_hash(block.block_hash) for block in engine.pool.blocks if block.block_hash is not None]
