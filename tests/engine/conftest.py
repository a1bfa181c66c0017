"""A real vLLM engine in this process, with the connector: what HTTP tests cannot reach into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from memos_vllm.integration import salts

BLOCK_SIZE = 32
NUM_BLOCKS_BYTES = 64 * 2**20
LAYER_GROUPS = int(os.environ.get("MEMOS_TEST_LAYER_GROUPS", "1"))
"""``tests/engine/test_layer_groups.py`` runs tests with more than one."""


@pytest.fixture(scope="module", autouse=True)
def salts_may_have_any_name() -> Iterator[None]:
    """Here ``memos:alice`` is Alice's; tests/unit/test_salts.py and tests/e2e hold that it is not elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(salts, "is_genuine", lambda secret, salt: True)
        yield


@dataclass
class Engine:
    """An ``LLM`` and the objects inside it that the tests look at."""

    llm: Any

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def side(self) -> Any:
        """Scheduler side of the connector."""
        return self.scheduler.connector.scheduler_side

    @property
    def tiers(self) -> Any:
        return self.side.memory.tiers

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def worker(self) -> Any:
        """Worker side of the connector."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker_side

    def generate(
        self,
        token_ids: list[int],
        salt: str | None = "memos:test",
        max_tokens: int = 8,
        extra_args: dict[str, Any] | None = None,
    ) -> Any:
        """One request, to its end, greedy; copies may still be under way."""
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": token_ids} | ({"cache_salt": salt} if salt else {})
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=4,
            detokenize=False,
            extra_args=extra_args,
        )
        return self.llm.generate([prompt], params, use_tqdm=False)[0]

    def settle(self) -> None:
        """Steps the idle engine until no copy is under way."""
        while self.scheduler.connector.has_pending_push_work():
            self.core.step_fn()

    def drop_gpu(self) -> None:
        self.settle()
        assert self.scheduler.reset_prefix_cache()

    def free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()


def make_engine(model: Path, data_dir: Path, **options: Any) -> Engine:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from memos_vllm.config import MemosConfig

    kv = {"host_bytes": 64 * 2**20, "disk_bytes": 256 * 2**20, "layer_groups": LAYER_GROUPS, **options.pop("kv", {})}
    config = MemosConfig.model_validate({"data_dir": str(data_dir), "kv": kv})
    from memos_vllm.integration.plugin import connector_config

    llm = LLM(
        str(model),
        enforce_eager=True,
        max_model_len=4096,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=NUM_BLOCKS_BYTES,
        kv_transfer_config=connector_config(None, config),
        disable_log_stats=True,
        # A model that knows no JSON writes blanks for ever where it may.
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        **options,
    )
    assert isinstance(llm.llm_engine.vllm_config.kv_transfer_config, KVTransferConfig)
    return Engine(llm)


@pytest.fixture(scope="session")
def engine_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="session")
def shared_engine(recall_model: Path, engine_data_dir: Path) -> Iterator[Engine]:
    engine = make_engine(recall_model, engine_data_dir)
    yield engine
    engine.core.shutdown()


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine with nothing in any tier and no scene; afterwards every block must be back."""
    shared_engine.drop_gpu()
    shared_engine.side.memory.scenes.clear()
    shared_engine.tiers.drop_host()
    before = shared_engine.free_blocks()
    yield shared_engine
    shared_engine.settle()
    assert shared_engine.free_blocks() == before, "a block leaked"
    assert not shared_engine.side.holds_blocks
    shared_engine.tiers.check_integrity()
