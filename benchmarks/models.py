"""Model directories without a hub: a configuration, weights and a tokenizer, made on first use.

    python -m benchmarks.models NAME ...

Weights are random and seeded. Of models that are too large for that they are absent: with vLLM's
``load_format=dummy`` attention is lost in rounding, so that such a model gives times, and its answers
say nothing about the KV that they came from. Either way the tokenizer is a small byte-level BPE with
a ChatML template, filled up to the model's vocabulary, so that every token id decodes to ASCII text
and the first token of an answer is also its first visible chunk. Weights that are written never say a
token of the filling: encoded again, in the next turn's prompt, it would be six or seven.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.texts import sentences

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SHARD_BYTES = 2 * 2**30
LAYOUT = 2
"""Part of the cache key: raise it when what is written below changes."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

RECALL_MODEL = Path(__file__).resolve().parent.parent / "tests" / "assets" / "recall-model"


@dataclass(frozen=True)
class Geometry:
    """Shape of a Qwen decoder, in the words of its ``config.json``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    model_type: str = "qwen3"
    architecture: str = "Qwen3ForCausalLM"

    @property
    def parameters(self) -> int:
        heads = self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer + 2 * self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in bf16."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Model:
    """A model that a benchmark can name.

    Attributes:
        name: as it stands in rows.
        geometry: shape; ``None`` for a directory or hub name that exists already.
        dummy: no weights are written; the server runs with ``--load-format dummy``, and no answer is compared.
        flags: what ``vllm serve`` needs for it, beyond the defaults of ``serving``.
        weight_bytes: of the loaded weights, to decide whether two servers fit one card.
    """

    name: str
    geometry: Geometry | None = None
    dummy: bool = False
    flags: tuple[str, ...] = ()
    weight_bytes: int = 0
    path: str = field(default="", compare=False)

    def directory(self) -> str:
        """What ``vllm serve`` takes; made now if it is missing."""
        if self.geometry is None:
            return self.path
        return str(random_model(self.name, cache_dir() / "models", self.geometry, weights=not self.dummy))


RECALL = Model("recall-model", path=str(RECALL_MODEL))

# 61 million parameters, so that a prefill of 6,064 tokens takes seconds on two cores. Its 8 KiB of KV per
# token are, per parameter, seven times Qwen3-8B's: loading is not flattered against computing.
CPU = Model("random-61m", Geometry(768, 8, 12, 4, 64, 2304, 4096))

QWEN3_8B = Model(
    "Qwen3-8B",
    Geometry(4096, 36, 32, 8, 128, 12288, 151936),
    weight_bytes=17 * 10**9,
)
QWEN3_32B = Model(
    "Qwen3-32B",
    Geometry(5120, 64, 64, 8, 128, 25600, 151936),
    dummy=True,
    flags=("--load-format", "dummy"),
    weight_bytes=66 * 10**9,
)
QWEN25_72B = Model(
    "Qwen2.5-72B",
    Geometry(8192, 80, 64, 8, 128, 29568, 152064, "qwen2", "Qwen2ForCausalLM"),
    dummy=True,
    flags=("--load-format", "dummy"),
    weight_bytes=146 * 10**9,
)

NAMED = {model.name: model for model in (RECALL, CPU, QWEN3_8B, QWEN3_32B, QWEN25_72B)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description="Makes models, says where.")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=list(NAMED), help=", ".join(NAMED))
    for name in parser.parse_args(argv).names:
        print(NAMED[name].directory(), flush=True)
    return 0


def find(name: str) -> Model:
    """One of the models above, a directory, or a name that the hub knows."""
    if name in NAMED:
        return NAMED[name]
    if os.path.isdir(name) and not (Path(name) / "config.json").exists():
        raise ValueError(f"{name} is a directory without a config.json, so it is not a model")
    return Model(Path(name).name if os.path.isdir(name) else name, path=name)


def fitted(model: Model, memory_bytes: int) -> Model:
    """The model as it fits a card: with fp8 weights where bf16 would take more than four fifths of it."""
    if model.weight_bytes <= 0.8 * memory_bytes:
        return model
    flags = (*model.flags, "--quantization", "fp8")
    return Model(model.name + "-fp8", model.geometry, model.dummy, flags, model.weight_bytes // 2)


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "memos-vllm"


def random_model(name: str, folder: Path, geometry: Geometry, *, weights: bool = True, seed: int = 0) -> Path:
    """A model directory under ``folder``, made unless it is there. Two callers at once do no harm."""
    key = json.dumps([LAYOUT, asdict(geometry), weights, seed], sort_keys=True)
    target = folder / hashlib.sha256(key.encode()).hexdigest()[:12] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=name, dir=target.parent))
    try:
        plain_ids = write_tokenizer(temporary, geometry.vocab_size, seed)
        write_config(temporary, geometry)
        if weights:
            # In a process of its own: what it takes of a GPU is free again before a server starts.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(write_weights, temporary, geometry, plain_ids, seed).result()
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError:
        if not target.exists():  # another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_tokenizer(folder: Path, vocab_size: int, seed: int) -> list[bool]:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Returns:
        For each id, whether it is an ordinary token that decodes to ASCII text and is encoded as itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (PAD, START, END)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 4096), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(f"tokenizer {seed}", 5000), trainer)
    spec = json.loads(tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    trained = len(vocabulary)
    for number in range(trained, vocab_size):
        vocabulary[f"Ġw{number}"] = number  # no merge leads here: decoded if the model says it, never encoded
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2**20,
        "eos_token": END,
        "pad_token": PAD,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    plain = [False] * vocab_size
    for text, number in vocabulary.items():
        ascii_text = all(char == "Ġ" or " " < char <= "~" for char in text)
        plain[number] = number < trained and text not in (PAD, START, END) and ascii_text
    return plain


def write_config(folder: Path, geometry: Geometry) -> None:
    config: dict[str, Any] = {
        "architectures": [geometry.architecture],
        "model_type": geometry.model_type,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": geometry.head_dim,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.intermediate_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": geometry.num_attention_heads,
        "num_hidden_layers": geometry.num_hidden_layers,
        "num_key_value_heads": geometry.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": geometry.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")


def write_weights(folder: Path, geometry: Geometry, plain_ids: list[bool], seed: int) -> None:
    """Writes safetensors, bf16; on a GPU, where there is one, which makes 8 billion parameters in seconds.

    Matrices keep the variance of their input, and queries are scaled so that attention picks single
    tokens rather than an average of all: the answer then depends on the whole context, so a wrong KV
    block changes it. Ids that are not for answers get a zero row in the output matrix and are never said.
    """
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    def matrix(rows: int, columns: int) -> torch.Tensor:  # [rows, columns], unit gain
        return (normal(rows, columns) / math.sqrt(columns)).bfloat16().cpu()

    hidden, head = geometry.hidden_size, geometry.head_dim
    queries, keys = geometry.num_attention_heads * head, geometry.num_key_value_heads * head
    embedding = normal(geometry.vocab_size, hidden).bfloat16().cpu()
    output = matrix(geometry.vocab_size, hidden)
    output[~torch.tensor(plain_ids)] = 0
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": output,
    }
    names: dict[str, str] = {}
    for layer in range(geometry.num_hidden_layers):
        if sum(tensor.nbytes for tensor in tensors.values()) >= SHARD_BYTES:
            shard = f"model-{len(set(names.values())):05}.safetensors"
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            names |= dict.fromkeys(tensors, shard)
            tensors = {}
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            prefix + "self_attn.q_norm.weight": torch.full((head,), 3.0, dtype=torch.bfloat16),
            prefix + "self_attn.k_norm.weight": torch.ones(head, dtype=torch.bfloat16),
            prefix + "self_attn.q_proj.weight": matrix(queries, hidden),
            prefix + "self_attn.k_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.v_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, queries),
            prefix + "mlp.gate_proj.weight": matrix(geometry.intermediate_size, hidden),
            prefix + "mlp.up_proj.weight": matrix(geometry.intermediate_size, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, geometry.intermediate_size),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if names:
        names |= dict.fromkeys(tensors, "model.safetensors")
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
