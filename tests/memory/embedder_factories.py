"""Small embedders, and files that look like a model's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from memos_vllm.errors import EmbedderError, EmbedderRefused
from memos_vllm.memory.embedders import Embedder, ModelRows

VOCABULARY = ModelRows.MIN_VOCABULARY
WORDS = ("tea", "coffee", "cat", "dog")


class TopicEmbedder(Embedder):
    """A dimension per topic; a topic is a word and its synonyms."""

    num_dims = 3

    def __init__(self, name: str = "topics", topics: Sequence[str] = ("tea oolong brew", "cat kitten", "car drive")):
        self.name = name
        self._topics = [topic.split() for topic in topics]
        self.embedded: list[str] = []
        self.fails = False
        self.refuses = "\0"
        self.num_calls = 0

    def embed(self, texts: Sequence[str]) -> Any:
        self.num_calls += 1
        if self.fails:
            raise EmbedderError("the embedder is away")
        if any(self.refuses in text for text in texts):
            raise EmbedderRefused("too long")
        self.embedded += texts
        rows = [[sum(word in text.lower() for word in topic) for topic in self._topics] for text in texts]
        return np.array(rows, np.float32) + 0.01


def write_model(folder: Path, rows: Mapping[str, Sequence[float]], dtype: str = "BF16", size: int = VOCABULARY) -> Path:
    """A tokenizer of whole words, and a safetensors file with a row per word; other words have the same row."""
    names = [*rows, *(f"filler{number}" for number in range(size - len(rows) - 1)), "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    width = len(next(iter(rows.values())))
    table = np.zeros((size, width), np.float32)
    table[: len(rows)] = list(rows.values())
    write_tensor(folder / "model.safetensors", "model.embed_tokens.weight", table, dtype)
    return folder


def write_tensor(path: Path, name: str, table: Any, dtype: str) -> None:
    data = {
        "F32": lambda: table.astype("<f4"),
        "F16": lambda: table.astype("<f2"),
        "BF16": lambda: (table.astype("<f4").view("<u4") >> 16).astype("<u2"),
        "F8_E4M3": lambda: table.astype("<u1"),
    }[dtype]().tobytes()
    entry = {"dtype": dtype, "shape": list(table.shape), "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
