"""Models that are made on first use."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import models
from benchmarks.multiuser_options import PRESETS, Options

TINY = models.Geometry(32, 3, 2, 1, 16, 64, 512)


def write(folder):
    folder.mkdir()
    models.write_weights(folder, TINY, [True] * TINY.vocab_size, 0)
    return folder


def test_many_weights_are_several_files_with_an_index_and_the_same_numbers(tmp_path, monkeypatch):
    whole = load_file(write(tmp_path / "one") / "model.safetensors")
    monkeypatch.setattr(models, "SHARD_BYTES", 1)
    folder = write(tmp_path / "many")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == whole.keys()
    assert set(index.values()) == {path.name for path in folder.glob("*.safetensors")}
    assert len(set(index.values())) == 1 + TINY.num_hidden_layers
    for name, shard in index.items():
        assert torch.equal(load_file(folder / shard)[name], whole[name])


def test_one_file_has_no_index(tmp_path):
    assert [path.name for path in write(tmp_path / "one").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "comparable"),
    [
        (PRESETS["smoke"], True),
        (PRESETS["cpu"], True),
        (PRESETS["gpu"], False),
        (Options(models.QWEN3_8B, dtype="float32"), True),
        (Options(models.QWEN3_32B, dtype="float32"), False),
    ],
)
def test_answers_are_compared_where_they_cannot_differ_for_another_reason(options, comparable):
    assert options.comparable is comparable


def test_a_model_that_is_too_large_for_the_card_gets_fp8_weights_and_stays_what_it_is():
    assert models.fitted(models.QWEN3_32B, 80 * 10**9).flags == (*models.QWEN3_32B.flags, "--quantization", "fp8")
    assert models.fitted(models.QWEN3_32B, 80 * 10**9).dummy
    assert not models.fitted(models.QWEN3_8B, 16 * 10**9).dummy
    assert models.fitted(models.QWEN3_8B, 80 * 10**9) is models.QWEN3_8B
