"""Shims for old vLLM versions: each fails here once the window no longer has the version it is for."""

from __future__ import annotations

import tomllib
from types import SimpleNamespace

import pytest
import torch
import vllm
from packaging.requirements import Requirement
from packaging.version import Version

from memos_vllm.compat import cpu_lora, hashing, layer_waits, sleep_mode, weight_updates
from memos_vllm.integration import activation_memory
from tests.conftest import ROOT

NOT_NEEDED_FROM = {"error_response": "0.29", "hashing": "0.32", "sleep_mode": "0.32"}


@pytest.mark.parametrize("shim", NOT_NEEDED_FROM)
def test_the_window_still_needs_the_shim(shim: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = [Requirement(text) for text in project["dependencies"] if text.startswith("vllm")]
    oldest = min(Version(part.version) for part in vllm.specifier if part.operator == ">=")
    assert oldest < Version(NOT_NEEDED_FROM[shim]), f"memos_vllm/compat/{shim}.py can go"


def test_every_shim_says_why_and_when_it_goes() -> None:
    shims = {path.stem for path in (ROOT / "memos_vllm" / "compat").glob("*.py")} - {"__init__"}
    for shim in shims:
        text = (ROOT / "memos_vllm" / "compat" / f"{shim}.py").read_text()
        assert "Why:" in text and "Goes when:" in text, shim
    assert NOT_NEEDED_FROM.keys() <= shims


class OlderRunner:
    def initialize_kv_cache(self, kv_cache_config: object, is_profiling: bool = False) -> None: ...


class NewerRunner:
    def initialize_kv_cache(self, kv_cache_config: object, kv_cache_allocation_context: object = None) -> None: ...


@pytest.mark.parametrize(
    ("runner", "asleep", "off"), [(OlderRunner, True, True), (OlderRunner, False, False), (NewerRunner, True, False)]
)
def test_activation_memory_is_off_where_a_sleep_would_discard_its_tables(
    runner: type, asleep: bool, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker import gpu_model_runner

    monkeypatch.setattr(gpu_model_runner, "GPUModelRunner", runner)
    monkeypatch.setattr(activation_memory, "is_full_attention", lambda spec: True)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(enable_sleep_mode=asleep),
    )
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=None)])
    why = activation_memory._why_off(config, groups, [SimpleNamespace()])
    assert ("--enable-sleep-mode" in why) if off else why is None


def test_from_vllm_0_32_on_activation_memory_and_sleep_mode_go_together() -> None:
    assert sleep_mode.keeps_what_connectors_allocate() or Version(vllm.__version__) < Version("0.32")


def test_hashes_are_seeded_where_vllm_would_not_seed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core import kv_cache_utils

    monkeypatch.setattr(hashing.os, "environ", environment := {})
    monkeypatch.setattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", b"as from 0.32 on", raising=False)
    hashing.make_block_hashes_stable()
    assert environment == {}, "vLLM's own seed is fixed"
    monkeypatch.delattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED")
    hashing.make_block_hashes_stable()
    assert environment == {"PYTHONHASHSEED": "0"}


def shrink(indices: list[int], rows: int | None = None) -> torch.Tensor:
    """What vLLM's operation leaves for tokens with these adapter indices: [tokens, rank]."""
    from vllm.lora.ops.torch_ops import lora_ops

    tokens = rows or len(indices)
    inputs, weights = torch.ones(tokens, 4), torch.ones(3, 1, 2, 4)  # [slots, 1, rank, size]
    out = torch.full((tokens, 2), 7.0)
    lora_ops.bgmv_shrink(inputs, weights, out, torch.tensor(indices), 1.0)
    return out


@pytest.fixture
def plain_lora_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own operation, whatever ran before in this process."""
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops

    own = getattr(lora_ops.bgmv_shrink, "_memos_original", lora_ops.bgmv_shrink)
    for module in (lora_ops, torch_ops):
        monkeypatch.setattr(module, "bgmv_shrink", own)


def test_vllm_still_gives_tokens_without_adapter_the_last_slots_weights(plain_lora_ops: None) -> None:
    assert shrink([0, -1])[1].any(), "memos_vllm/compat/cpu_lora.py can go"


def test_tokens_without_adapter_get_none(plain_lora_ops: None) -> None:
    for _ in range(2):
        cpu_lora.skip_tokens_without_adapter()
    assert shrink([0, -1, 2]).tolist() == [[4, 4], [0, 0], [4, 4]]
    assert not shrink([-1, -1]).any()


class Watcher:
    def __init__(self) -> None:
        self.told: list[str] = []

    def changed(self, called: str) -> None:
        self.told.append(called)


class Executor:
    def collective_rpc(self, method: object, timeout: object, args: object, kwargs: object) -> list[object]:
        return [method, timeout, args, kwargs]


def test_a_call_of_the_workers_is_passed_on_as_it_is_and_told_where_it_may_change_weights() -> None:
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    watcher, gone = Watcher(), Watcher()
    for each in (watcher, gone, Watcher()):
        weight_updates.watch(each.changed)
    told_before_it_went = gone.told
    del gone, each
    core = EngineCore.__new__(EngineCore)
    core.model_executor = Executor()
    sent = ["update_weights", 3.0, (1,), {"two": 2}]
    assert core.collective_rpc(*EngineCoreProc._convert_msgspec_args(core.collective_rpc, sent)) == sent
    assert core.collective_rpc("check_health", kwargs=None) == ["check_health", None, (), None]
    core.collective_rpc(method=b"a pickled function")
    assert watcher.told == ["update_weights", "a function"], "once each, however many engines were made"
    assert told_before_it_went == [], "an engine that is gone is not told"


@pytest.mark.parametrize(
    "method", ["start_weight_update", "update_weights", "finish_weight_update", "reload_weights", "reset_weights"]
)
def test_vllms_own_ways_to_change_weights_count_as_such(method: str) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    assert method not in weight_updates.LEAVES_WEIGHTS_ALONE
    assert hasattr(Worker, method) or Version(vllm.__version__) < Version("0.32"), "vLLM calls it otherwise now"


@pytest.mark.parametrize(
    ("context", "ask"),
    [
        ({}, True),
        ({"cudagraph_runtime_mode": "PIECEWISE"}, True),
        ({"cudagraph_runtime_mode": "FULL"}, False),
        ({"ubatch_slices": [object()]}, False),
        ({"attn_metadata": None}, False),
    ],
    ids=["eager", "piecewise graph", "full graph", "two batches at a time", "no pass"],
)
def test_layers_ask_where_their_operators_run(context: dict, ask: bool) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import override_forward_context

    mode = CUDAGraphMode[context.pop("cudagraph_runtime_mode", "NONE")]
    fields = {"attn_metadata": {}, "ubatch_slices": None, "cudagraph_runtime_mode": mode, **context}
    with override_forward_context(SimpleNamespace(**fields)):
        assert layer_waits.layers_ask() is ask


def test_outside_of_a_pass_it_is_not_certain_that_layers_ask() -> None:
    assert not layer_waits.layers_ask()


class TestWhyLayersDoNotAsk:
    @staticmethod
    def config(**layers: object) -> SimpleNamespace:
        compilation = SimpleNamespace(static_forward_context=layers)
        return SimpleNamespace(speculative_config=None, compilation_config=compilation)

    def test_attention_and_mla_ask(self) -> None:
        from vllm.model_executor.layers.attention import Attention, MLAAttention

        layers = {"a": object.__new__(Attention), "b": object.__new__(MLAAttention)}
        assert layer_waits.why_not(self.config(**layers), layers) is None

    def test_other_layers_do_not(self) -> None:
        from vllm.model_executor.layers.attention import Attention

        class Indexer(Attention): ...

        layers = {"a": object.__new__(Attention), "b.indexer": object.__new__(Indexer)}
        assert "b.indexer is a Indexer" in (layer_waits.why_not(self.config(**layers), layers) or "")
        assert layer_waits.why_not(self.config(), ["unknown"]) is not None

    def test_with_a_drafter_they_do_not(self) -> None:
        config = self.config()
        config.speculative_config = object()
        assert "speculative" in (layer_waits.why_not(config, []) or "")
