"""The fp8 store on the worker: the shape tells the order of heads and tokens, and the identity is another one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from memos_vllm.config import MemosConfig
from memos_vllm.errors import ConfigError
from memos_vllm.integration import worker_side
from memos_vllm.integration.kv_heads import head_views
from memos_vllm.integration.messages import MemosHandshake
from memos_vllm.store.identity import KVIdentity
from tests.store.store_factories import make_identity

NUM_BLOCKS = 6


def spec(kind: type = FullAttentionSpec, **changes: object) -> FullAttentionSpec:
    fields = {"block_size": 16, "num_kv_heads": 2, "head_size": 24, "dtype": torch.bfloat16, **changes}
    return kind(**fields)


@pytest.mark.parametrize(
    "shape",
    [(NUM_BLOCKS, 2, 16, 48), (2, NUM_BLOCKS, 16, 2, 24), (NUM_BLOCKS, 2, 16, 2, 24), (NUM_BLOCKS * 2, 2, 8, 48)],
)
def test_heads_are_found_in_every_layout(shape: tuple[int, ...]) -> None:
    views = head_views([torch.zeros(shape, dtype=torch.bfloat16)], NUM_BLOCKS, [spec()])
    assert [view.is_key for view in views] == [True, False]
    for view in views:
        blocks, parts, heads, tokens, size = view.view.shape
        assert (blocks, parts * tokens, heads, size) == (NUM_BLOCKS, 16, 2, 24)


def test_what_cannot_be_kept_as_fp8_stops_the_start_with_one_sentence() -> None:
    cache = torch.zeros(NUM_BLOCKS, 2, 16, 48, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"does not fit this model .* use auto"):
        head_views([cache], NUM_BLOCKS, [spec(num_kv_heads=3)])
    with pytest.raises(ConfigError, match="only bfloat16"):
        head_views([cache.to(torch.float8_e4m3fn)], NUM_BLOCKS, [spec()])
    with pytest.raises(ConfigError, match="full attention"):
        head_views([cache], NUM_BLOCKS, [spec(SlidingWindowSpec, sliding_window=64)])


def register(store_dtype: str, monkeypatch: pytest.MonkeyPatch) -> tuple[MemosHandshake, KVIdentity]:
    """What the scheduler is told, and what goes into every key and file."""
    monkeypatch.setattr(worker_side, "identity_of", lambda config, layout: make_identity(layout=layout))
    layers = [f"model.layers.{layer}.attn" for layer in range(2)]
    side = worker_side.WorkerSide(
        SimpleNamespace(parallel_config=SimpleNamespace(world_size=1, rank=0)),
        SimpleNamespace(
            num_blocks=NUM_BLOCKS, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec(), layer_names=layers)]
        ),
        MemosConfig.model_validate({"kv": {"store_dtype": store_dtype, "host_bytes": "1MiB"}}),
    )
    side.register({layer: torch.zeros(NUM_BLOCKS, 2, 16, 48, dtype=torch.bfloat16) for layer in layers})
    handshake, identity = side.handshake(), side._transfer.identity
    side.shutdown()
    return handshake, identity


def test_an_fp8_store_is_another_deployment_with_half_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, exact_identity = register("auto", monkeypatch)
    fp8, fp8_identity = register("fp8", monkeypatch)
    assert exact.block_bytes == 2 * 2 * 16 * 48 * 2
    assert 0.5 < fp8.block_bytes / exact.block_bytes < 0.52
    assert fp8.layout != exact.layout and fp8_identity.digest() != exact_identity.digest()
    assert fp8_identity.layout == fp8.layout, "the scheduler makes its keys from what the worker says"
