"""What KV belongs to, on the real configuration of a running engine."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.integration import model_identity
from memos_vllm.integration.model_identity import identity_of
from tests.engine.conftest import Engine

LAYOUT = ("bfloat16[2,32,64]",)


@pytest.fixture
def config(shared_engine: Engine, recall_model: Path, tmp_path: Path) -> Iterator[Any]:
    """A copy of the engine's configuration, over a copy of the model that a test may change."""
    config = copy.deepcopy(shared_engine.llm.llm_engine.vllm_config)
    move_model(config, recall_model, tmp_path / "here")
    yield config
    model_identity._fingerprint.cache_clear()  # a server reads the files once; a test plays many servers


def move_model(config: Any, source: Path, to: Path) -> None:
    target = to / "recall-model"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config.model_config.model = config.model_config.tokenizer = str(target)
    config.model_config.hf_config._name_or_path = str(target)


def digest(config: Any) -> bytes:
    """As a server that starts now computes it."""
    model_identity._fingerprint.cache_clear()
    return identity_of(config, LAYOUT).digest()


def model_dir(config: Any) -> Path:
    return Path(config.model_config.model)


def flip_last_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def set_attribute(section: str, name: str, value: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        assert getattr(getattr(config, section), name) != value, "the change must be one"
        setattr(getattr(config, section), name, value)

    return change


def dtype(config: Any) -> None:
    import torch

    assert config.model_config.dtype != torch.float32
    config.model_config.dtype = torch.float32


def rope_theta(config: Any) -> None:
    """As ``--hf-overrides`` changes it."""
    hf_config = config.model_config.hf_config
    if "rope_parameters" in hf_config.to_dict():  # from Transformers 5 on
        assert hf_config.rope_parameters["rope_theta"] != 5e5
        hf_config.rope_parameters = {**hf_config.rope_parameters, "rope_theta": 5e5}
    else:
        assert hf_config.rope_theta != 5e5
        hf_config.rope_theta = 5e5


def head_norm(config: Any) -> None:
    config.model_config.hf_config.rms_norm_eps *= 2


def other_tokenizer(config: Any) -> None:
    target = model_dir(config).parent / "tokenizer"
    shutil.copytree(model_dir(config), target)
    flip_last_bit(target / "tokenizer.json")
    config.model_config.tokenizer = str(target)


def tokenizer_on_disk(config: Any) -> None:
    flip_last_bit(model_dir(config) / "tokenizer.json")


def weights_on_disk(config: Any) -> None:
    flip_last_bit(model_dir(config) / "model.safetensors")


def config_on_disk(config: Any) -> None:
    path = model_dir(config) / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


CHANGES = {
    "dtype": dtype,
    "KV dtype": set_attribute("cache_config", "cache_dtype", "fp8"),
    "block size": set_attribute("cache_config", "block_size", 64),
    "hash algorithm": set_attribute("cache_config", "prefix_caching_hash_algo", "xxhash"),
    "tensor parallel": set_attribute("parallel_config", "tensor_parallel_size", 2),
    "pipeline parallel": set_attribute("parallel_config", "pipeline_parallel_size", 2),
    "revision": set_attribute("model_config", "revision", "another"),
    "quantization": set_attribute("model_config", "quantization", "fp8"),
    "longest prompt": set_attribute("model_config", "max_model_len", 8192),
    "rope theta": rope_theta,
    "norm": head_norm,
    "dummy weights": set_attribute("load_config", "load_format", "dummy"),
    "other tokenizer": other_tokenizer,
    "tokenizer on disk": tokenizer_on_disk,
    "weights on disk": weights_on_disk,
    "config on disk": config_on_disk,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_kv_changes_the_identity(config: Any, change: Callable[[Any], None]) -> None:
    before = digest(config)
    change(config)
    assert digest(config) != before


def test_every_change_is_a_different_identity(config: Any) -> None:
    """None of them leads to where another one leads."""
    digests = [digest(config)]
    for name in ("dtype", "KV dtype", "block size", "tensor parallel", "rope theta", "quantization", "dummy weights"):
        changed = copy.deepcopy(config)
        CHANGES[name](changed)
        digests.append(digest(changed))
    assert len(set(digests)) == len(digests)


def test_an_unchanged_copy_is_the_same(config: Any) -> None:
    before = identity_of(config, LAYOUT)
    again = copy.deepcopy(config)
    assert digest(again) == before.digest()
    assert before.differences(identity_of(again, LAYOUT).as_metadata()) == []


def test_what_does_not_change_kv_does_not_change_the_identity(config: Any) -> None:
    before = digest(config)
    config.cache_config.gpu_memory_utilization = 0.5
    config.model_config.seed += 1  # of sampling; weights are read from files here
    config.scheduler_config.max_num_seqs += 1
    config.model_config.served_model_name = "another"
    assert digest(config) == before


def test_a_model_that_moved_is_the_same(config: Any, tmp_path: Path) -> None:
    before = digest(config)
    old = model_dir(config)
    move_model(config, old, tmp_path / "there")
    shutil.rmtree(old)
    assert digest(config) == before


def test_dummy_weights_are_those_of_their_seed(config: Any) -> None:
    config.load_config.load_format = "dummy"
    before = digest(config)
    assert digest(copy.deepcopy(config)) == before
    config.model_config.seed += 1
    assert digest(config) != before


def test_another_layout_of_a_block_is_another_identity(config: Any) -> None:
    assert identity_of(config, LAYOUT).digest() != identity_of(config, (*LAYOUT, *LAYOUT)).digest()
    assert identity_of(config, ("bfloat16[2,32,128]",)).digest() != identity_of(config, LAYOUT).digest()


def test_the_engine_uses_the_identity_of_its_configuration(shared_engine: Engine) -> None:
    config = shared_engine.llm.llm_engine.vllm_config
    layout = shared_engine.worker.handshake().layout
    assert identity_of(config, layout).digest() == shared_engine.side.memory.names.identity.digest()
