"""Embedders: text into vectors. The contract, and the ones that need no model of their own.

``ModelRows`` is the default: it reads the input embeddings of the served model, which are on disk anyway,
and computes nothing else of the model. Others are in ``encoders``.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memos_vllm.errors import ConfigError
from memos_vllm.memory import analysis
from memos_vllm.memory.vectors import Vector

_FINGERPRINT_BYTES = 8


def parts_of(stored: bytes) -> tuple[bytes, npt.NDArray[np.float16]]:
    """Whose a stored vector is, and the vector. [num dims]"""
    whole = len(stored) - (len(stored) - _FINGERPRINT_BYTES) % 2
    return stored[:_FINGERPRINT_BYTES], np.frombuffer(stored[_FINGERPRINT_BYTES:whole], "<f2")


class Embedder(ABC):
    """Thread-safe. A text's vector depends on nothing but the text."""

    num_dims: int
    name: str
    """What it is, model and revision included; vectors of another name are of no use to this one."""

    is_linear = False
    """Whether a text's vector is the sum of its words'. Then neighbours in a conversation lend to each
    other as they do in the lexical index; an encoder has read the text as a whole."""

    is_stored = True
    """Whether vectors are kept in the store: all that take longer to make than to read."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[num texts, num dims]; a row of zeros for a text that it cannot say anything about.

        Raises:
            EmbedderRefused: it does not take one of the texts.
            EmbedderError: it cannot be reached, or fails.
        """

    def embed_query(self, text: str) -> Vector:
        """[num dims]"""
        vector: Vector = self.embed([text])[0]
        return vector

    def encode(self, vector: Vector) -> bytes:
        """As it is stored: whose it is, and half precision."""
        return self._fingerprint() + vector.astype("<f2").tobytes()

    def decode(self, stored: bytes | None) -> Vector | None:
        """None where nothing is stored, or another embedder's."""
        if stored is None or stored[:_FINGERPRINT_BYTES] != self._fingerprint():
            return None
        return np.frombuffer(stored, "<f2", offset=_FINGERPRINT_BYTES).astype(np.float32)

    def _fingerprint(self) -> bytes:
        return hashlib.blake2b(f"{self.name}\0{self.num_dims}".encode(), digest_size=_FINGERPRINT_BYTES).digest()


class ModelRows(Embedder):
    """The weighted mean of a language model's input embeddings over a text's tokens; no forward pass.

    A row of the matrix is longer the rarer its token and has a large part in common with all others, both
    of no meaning, so rows are centred (Mu and Viswanath, "All-but-the-top", ICLR 2018, step 1) and brought
    to one length. Function words are left out; tokens weigh a / (a + p) (SIF, Arora et al., ICLR 2017, with
    its a) where p is the token's share of text, taken from its place in the vocabulary, which tokenizers
    fill in the order of frequency, by Zipf's law. The mean of a user's memories comes off in ``vectors``.

    Args:
        path: the model's directory, with ``tokenizer.json`` and safetensors.

    Raises:
        ConfigError: it has no such files, or a vocabulary of less than ``MIN_VOCABULARY``.
    """

    MIN_VOCABULARY = 8192
    """Below, most words fall apart into letters and syllables, and so does what their rows mean: the rows of
    a vocabulary of 4,096 made recall worse than none (docs/RECALL.md)."""

    MAX_DIMS = 256
    """Longer rows are projected to so many dimensions by random signs, which keeps cosines within about
    1 / sqrt(256) (Achlioptas, "Database-friendly random projections", JCSS 2003)."""

    SIF_A = 1e-3
    is_linear = True
    is_stored = False

    _MAX_CHARS = 20_000
    _SAMPLE_ROWS = 8192

    def __init__(self, path: Path):
        self.name = f"rows of {path}"
        self._tokenizer = _tokenizer(path)
        self._rows, self._to_float = _embedding_rows(path)
        num_rows, num_dims = self._rows.shape
        if num_rows < self.MIN_VOCABULARY:
            raise ConfigError(
                f"the vocabulary of {path} has {num_rows} tokens, too few for its embeddings to tell words"
            )
        sample = np.unique(np.linspace(0, num_rows - 1, min(num_rows, self._SAMPLE_ROWS)).astype(np.int64))
        self._mean = self._to_float(self._rows[sample]).mean(axis=0)
        ranks = np.arange(1, num_rows + 1)
        share = 1 / (ranks * np.log(num_rows))
        self._weights = (self.SIF_A / (self.SIF_A + share)).astype(np.float32)
        self._projection: npt.NDArray[np.float32] | None = None
        self.num_dims = num_dims
        if num_dims > self.MAX_DIMS:
            signs = np.random.default_rng(0).integers(0, 2, (num_dims, self.MAX_DIMS))
            self._projection = (signs * 2 - 1).astype(np.float32) / np.float32(self.MAX_DIMS**0.5)
            self.num_dims = self.MAX_DIMS

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        # Most tokenizers have a word in the middle of a text as another token than at its beginning.
        contents = [f" {analysis.without_stop_words(text[: self._MAX_CHARS])}" for text in texts]
        encoded = self._tokenizer.encode_batch(contents, add_special_tokens=False)
        sums = np.array([self._sum(np.array(each.ids, np.int64)) for each in encoded], np.float32)
        sums = sums.reshape(len(texts), -1)
        return sums if self._projection is None else sums @ self._projection

    def _sum(self, ids: npt.NDArray[np.int64]) -> Vector:
        ids = ids[ids < len(self._rows)]
        rows = self._to_float(self._rows[ids]) - self._mean
        lengths = np.linalg.norm(rows, axis=1)
        total: Vector = (self._weights[ids] / np.maximum(lengths, 1e-9)) @ rows
        return total


_ROW_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight")


_MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit


def _tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises no other type
        raise ConfigError(f"no tokenizer.json that can be read in {path}: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _embedding_rows(path: Path) -> tuple[npt.NDArray[Any], Any]:
    """The input embeddings, mapped from their file, and what makes float32 of some of its rows."""
    for file in _files(path):
        header, start = _header(file)
        for name, entry in header.items():
            if not name.endswith(_ROW_NAMES) or len(entry.get("shape", ())) != 2:
                continue
            if entry["dtype"] not in _READERS:
                raise ConfigError(
                    f"the embeddings of {path} are {entry['dtype']}, which is none of {', '.join(_READERS)}"
                )
            dtype, to_float = _READERS[entry["dtype"]]
            try:
                rows = np.memmap(file, dtype, "r", start + entry["data_offsets"][0], tuple(entry["shape"]))
            except (OSError, ValueError) as error:  # shorter than its header says
                raise ConfigError(f"the embeddings in {file} cannot be read: {error}") from error
            return rows, to_float
    raise ConfigError(f"no safetensors with input embeddings in {path}")


def _files(path: Path) -> list[Path]:
    """All, or the one that an index names."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        return [path / file for name, file in weight_map.items() if name.endswith(_ROW_NAMES)]
    return sorted(path.glob("*.safetensors"))


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header and where its data begins. The library's numpy reader knows no bfloat16."""
    try:
        with open(file, "rb") as stream:
            size_bytes = int.from_bytes(stream.read(8), "little")
            if size_bytes > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size_bytes} bytes")
            header: dict[str, Any] = json.loads(stream.read(size_bytes))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is no safetensors file that can be read: {error}") from error
    return header, 8 + size_bytes


def _from_bfloat16(rows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (rows.astype(np.uint32) << 16).view(np.float32)


_READERS: dict[str, tuple[Any, Any]] = {
    "BF16": (np.dtype("<u2"), _from_bfloat16),
    "F16": (np.dtype("<f2"), lambda rows: rows.astype(np.float32)),
    "F32": (np.dtype("<f4"), np.asarray),
}
