"""Embedders that bring a model of their own, or ask for one over HTTP. Their libraries are optional."""

from __future__ import annotations

import os
from collections.abc import Sequence

import httpx
import numpy as np
import numpy.typing as npt

from memos_vllm.errors import ConfigError, EmbedderError, EmbedderRefused
from memos_vllm.memory.embedders import Embedder

_BATCH = 64
_REFUSALS = frozenset({400, 413, 422})
"""What servers answer to a text that they do not take: it is too long, or has characters that they do not know."""

_MAX_ENDPOINT_CHARS = 8000
"""Servers refuse texts beyond their context, commonly 8,192 tokens; a character is seldom more than one."""


class SentenceEncoder(Embedder):
    """A sentence-transformers model, on the CPU: the GPU is the served model's.

    Args:
        model: a directory, or a name that the library can download.
    """

    def __init__(self, model: str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                "memory.embedder is sentence_transformers, which is not installed: pip install sentence-transformers"
            ) from error
        try:
            self._model = SentenceTransformer(model, device="cpu")
        except (OSError, ValueError) as error:
            raise ConfigError(f"memory.embedder.model: cannot load {model!r}: {error}") from error
        self.name = f"sentence_transformers {model}"
        self.num_dims = len(self.embed(["probe"])[0])

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = self._model.encode(list(texts), batch_size=_BATCH, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(vectors, np.float32)


class StaticEncoder(Embedder):
    """A model2vec model: a vector per token, distilled from a sentence encoder.

    Args:
        model: a directory, or a name that the library can download.
    """

    is_linear = True

    def __init__(self, model: str):
        try:
            from model2vec import StaticModel
        except ImportError as error:
            raise ConfigError("memory.embedder is model2vec, which is not installed: pip install model2vec") from error
        try:
            self._model = StaticModel.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"memory.embedder.model: cannot load {model!r}: {error}") from error
        self.name = f"model2vec {model}"
        self.num_dims = len(self.embed(["probe"])[0])

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.asarray(self._model.encode(list(texts)), np.float32)


class EndpointEncoder(Embedder):
    """A server with OpenAI's ``/v1/embeddings``.

    Args:
        url: up to ``/v1``.
        api_key_env: the environment variable that holds the key; without one, none is sent.
        client: another HTTP client; tests use it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str | None = None,
        timeout_s: float = 10.0,
        client: httpx.Client | None = None,
    ):
        headers = {}
        if api_key_env is not None:
            if not (key := os.environ.get(api_key_env)):
                raise ConfigError(f"memory.embedder.api_key_env: {api_key_env} is not set")
            headers["authorization"] = f"Bearer {key}"
        self._url = f"{url.rstrip('/')}/embeddings"
        self._model = model
        self._client = client or httpx.Client(timeout=timeout_s, headers=headers)
        self.name = f"endpoint {url} {model}"
        try:
            self.num_dims = len(self.embed(["probe"])[0])
        except EmbedderError as error:
            raise ConfigError(f"memory.embedder: {error}") from error

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.concatenate([self._request(texts[at : at + _BATCH]) for at in range(0, len(texts), _BATCH)])

    def _request(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        try:
            body = {"model": self._model, "input": [text[:_MAX_ENDPOINT_CHARS] for text in texts]}
            response = self._client.post(self._url, json=body)
            if response.status_code in _REFUSALS:
                raise EmbedderRefused(f"{self._url} refuses a text: {response.status_code} {response.text[:200]}")
            response.raise_for_status()
            rows = sorted(response.json()["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise EmbedderError(f"no embeddings from {self._url}: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise EmbedderError(f"{self._url} answered {len(vectors)} embeddings for {len(texts)} texts")
        return vectors
