"""Models that are made on first use."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks import models
from benchmarks.multiuser_options import PRESETS, Options
from benchmarks.multiuser_script import ROOM_FOR_ANSWER

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


def test_what_a_model_with_a_filled_up_vocabulary_says_takes_little_more_room_in_the_next_prompt(tmp_path):
    """Words of the filling would take six tokens each, and a conversation outgrow the length it was planned for."""
    plain = models.write_tokenizer(tmp_path, 151936, 0)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [number for number, is_plain in enumerate(plain) if is_plain]
    assert len(ids) > 300 and all(tokenizer.decode([number]).isascii() for number in ids)
    rng = random.Random(0)
    empty = len(tokenizer.encode(f"{models.START}assistant\n{models.END}\n").ids)
    for options in (PRESETS["cpu"], PRESETS["gpu"]):
        for _ in range(200):
            answer = tokenizer.decode(rng.choices(ids, k=options.max_tokens))
            prompt = tokenizer.encode(f"{models.START}assistant\n{answer}{models.END}\n").ids
            assert len(prompt) - empty <= options.max_tokens + ROOM_FOR_ANSWER


def test_the_command_makes_models_and_says_where(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(models.NAMED, "tiny", models.Model("tiny", TINY, dummy=True))
    assert models.main(["tiny"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "config.json").exists()
