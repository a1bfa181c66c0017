"""Which embedder the memory of this server has: the configured one, or the served model's own rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from memos_vllm.config import EmbedderConfig
from memos_vllm.errors import ConfigError
from memos_vllm.memory.embedders import Embedder, ModelRows
from memos_vllm.memory.encoders import EndpointEncoder, SentenceEncoder, StaticEncoder

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = logging.getLogger(__name__)


def build(config: EmbedderConfig, model: ModelConfig, load_format: str = "auto") -> Embedder | None:
    """
    Raises:
        ConfigError: the embedder that the configuration names cannot be had. With ``auto`` memory then goes
            by words, and the log says why.
    """
    if config.kind == "none":
        return None
    if config.kind == "sentence_transformers":
        return SentenceEncoder(config.model or "")
    if config.kind == "model2vec":
        return StaticEncoder(config.model or "")
    if config.kind == "endpoint":
        return EndpointEncoder(config.url or "", config.model or "", config.api_key_env, config.timeout_s)
    try:
        if load_format == "dummy":
            raise ConfigError("the weights of this server are random (load format dummy)")
        return ModelRows(_folder(str(model.model), model.revision))
    except ConfigError as error:
        if config.kind == "model_rows":
            raise ConfigError(f"memory.embedder: {error}") from error
        logger.info("memory is searched by words alone: %s", error)
        return None


def _folder(name: str, revision: str | None) -> Path:
    """Where the files of a model are: its folder, or the hub's snapshot of it on this machine."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json", revision=revision)
    except HFValidationError:
        found = None
    if isinstance(found, str):
        return Path(found).parent
    raise ConfigError(f"the files of {name} are not on this machine")
