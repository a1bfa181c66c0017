"""What a stranger's folder may not do, and that its content has one name."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from memos_vllm.adapters import peft_folder
from memos_vllm.adapters.peft_config import BaseModel
from memos_vllm.errors import AdapterError
from tests.adapters.adapter_factories import BASE, CONFIG, MODULE, adapter_folder, weights

MAX_BYTES = 2**20


def digest(folder: Path, tmp_path: Path) -> bytes:
    target = tmp_path / f"out-{folder.name}"
    target.mkdir()
    written = peft_folder.check(folder, BASE, MAX_BYTES).write(target)
    assert written == peft_folder.digest_of(target)
    return written


def refused(folder: Path, words: str, max_bytes: int = MAX_BYTES) -> None:
    with pytest.raises(AdapterError, match=words):
        peft_folder.check(folder, BASE, max_bytes)


def test_what_is_kept_is_what_was_given(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a")
    digest(folder, tmp_path)
    kept = load_file(tmp_path / "out-a" / "adapter_model.safetensors")
    assert all(np.array_equal(kept[name], tensor) for name, tensor in weights().items()) and len(kept) == 2
    assert json.loads((tmp_path / "out-a" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


def test_the_digest_names_the_content_and_not_its_form(tmp_path: Path) -> None:
    plain = adapter_folder(tmp_path / "a")
    reordered = adapter_folder(tmp_path / "b", config={"revision": "main", "inference_mode": True})
    config = json.loads((reordered / "adapter_config.json").read_text())
    (reordered / "adapter_config.json").write_text(json.dumps(dict(reversed(config.items())), indent=3))
    path = reordered / "adapter_model.safetensors"
    (name_a, a), (name_b, b) = (tensors := weights()).items()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    header[name_b] = {"dtype": "F32", "shape": list(b.shape), "data_offsets": [0, b.nbytes]}
    header[name_a] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [b.nbytes, b.nbytes + a.nbytes]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b.tobytes() + a.tobytes())
    assert load_file(path).keys() == tensors.keys() and digest(plain, tmp_path) == digest(reordered, tmp_path)


@pytest.mark.parametrize("change", [{"lora_alpha": 8}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}])
def test_the_digest_differs_with_what_changes_the_computation(tmp_path: Path, change: dict[str, Any]) -> None:
    assert digest(adapter_folder(tmp_path / "a"), tmp_path) != digest(
        adapter_folder(tmp_path / "b", config=change), tmp_path
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"base_model_name_or_path": "llama"}, "for 'llama', this server serves tiny"),
        ({"base_model_name_or_path": None}, "set base_model_name_or_path"),
        ({"r": 0}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": "2"}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 16}, "rank is 16, the server takes up to 8"),
        ({"rank_pattern": {"q_proj": 64}}, "rank is 64"),
        ({"rank_pattern": {"(a+)+$": 4}}, "regular expression"),
        ({"alpha_pattern": []}, None),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_configurations_that_cannot_be_served(tmp_path: Path, config: dict[str, Any], words: str | None) -> None:
    folder = adapter_folder(tmp_path / "a", config=config)
    if words is None:
        peft_folder.check(folder, BASE, MAX_BYTES)
    else:
        refused(folder, words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no tensor"),
        (weights(module="model.layers.7.self_attn.q_proj"), "does not have"),
        (weights(rank=3), r"A must be \[2, 4\]"),
        ({f"base_model.model.{MODULE}.lora_A.weight": np.zeros((2, 4), np.float32)}, "A and a B"),
        ({**weights(), "base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}, "not the A or B"),
        ({name: tensor.astype(np.int64) for name, tensor in weights().items()}, "dtype I64"),
        ({name: tensor[None] for name, tensor in weights().items()}, "A and a B"),
    ],
)
def test_weights_that_fit_no_module(tmp_path: Path, tensors: dict[str, np.ndarray], words: str) -> None:
    refused(adapter_folder(tmp_path / "a", tensors=tensors), words)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    tensors = weights()
    tensors[f"base_model.model.{MODULE}.lora_B.weight"][1, 1] = np.nan
    folder = adapter_folder(tmp_path / "a", tensors=tensors)
    with pytest.raises(AdapterError, match="not finite"):
        digest(folder, tmp_path)


def test_a_module_outside_the_servers_target_modules(tmp_path: Path) -> None:
    """vLLM would leave such a module out and answer with other weights than the adapter's."""
    base = BaseModel(BASE.names, BASE.modules, BASE.max_rank, frozenset({"v_proj"}))
    with pytest.raises(AdapterError, match="--lora-target-modules"):
        peft_folder.check(adapter_folder(tmp_path / "a"), base, MAX_BYTES)


def rewrite_header(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


A = f"base_model.model.{MODULE}.lora_A.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[A].update(data_offsets=[0, 10**12]),
        lambda header: header[A].update(data_offsets=[-32, 0]),
        lambda header: header[A].update(data_offsets=[16, 48]),
        lambda header: header[A].update(shape=[2, 1e9]),
        lambda header: header[A].update(shape=[2**40, 2**40]),
        lambda header: header[A].pop("dtype"),
        lambda header: header.update({A: []}),
        lambda header: header.pop(A),
    ],
)
def test_headers_that_lie(tmp_path: Path, change: Any) -> None:
    folder = adapter_folder(tmp_path / "a")
    rewrite_header(folder, change)
    refused(folder, "damaged|truncated|no sizes")


@pytest.mark.parametrize("num_dimensions", [0, 1, 3, 1000])
def test_only_matrices_are_measured(tmp_path: Path, num_dimensions: int) -> None:
    """The product of as many numbers as a header has room for would hold the process for minutes."""
    folder = adapter_folder(tmp_path / "a")
    rewrite_header(folder, lambda header: header[A].update(shape=[2**32 - 1] * num_dimensions))
    refused(folder, "is no matrix")


@pytest.mark.parametrize("keep", [0, 7, 20, -1])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    folder = adapter_folder(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "no safetensors|truncated")


def test_a_file_beyond_the_limit(tmp_path: Path) -> None:
    refused(adapter_folder(tmp_path / "a"), "adapters.max_bytes", max_bytes=100)


class Explodes:
    def __reduce__(self) -> Any:
        return os.abort, ()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "training_args.pt"])
def test_a_pickle_is_neither_taken_nor_opened(tmp_path: Path, name: str) -> None:
    folder = adapter_folder(tmp_path / "a")
    if name == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Explodes()))
    refused(folder, "pickle|no safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_lead_nowhere(tmp_path: Path, name: str) -> None:
    sound, folder = adapter_folder(tmp_path / "sound"), adapter_folder(tmp_path / "a")
    (folder / name).unlink()
    (folder / name).symlink_to(sound / name)
    refused(folder, "not a link")


def test_a_pipe_does_not_hang_the_server(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    refused(folder, "plain file")


@pytest.mark.parametrize("text", ["[]", "{", "", "[" * 100_000, '{"peft_type": "LORA", "r": 1e999}'])
def test_configurations_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    folder = adapter_folder(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "adapter_config.json")


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no adapter folder")
    refused(tmp_path, "there is no adapter_config.json")
    assert CONFIG["peft_type"] == "LORA"
