"""What makes KV belong to one model: the facts that go into every key and every file."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos_vllm.store.identity import FORMAT_VERSION, KVIdentity, fingerprint_adapter, fingerprint_dir, fingerprint_file

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_STORED_ADAPTER = re.compile(r"memos-(?P<digest>[0-9a-f]{64})-[0-9a-f]{8}")
"""How ``adapters.records.Version.lora_name`` writes it."""


def identity_of(vllm_config: VllmConfig, layout: tuple[str, ...]) -> KVIdentity:
    """The identity of the KV that this server computes.

    Args:
        layout: shape and dtype of each plane of a block on one rank, in order.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    return KVIdentity(
        format_version=FORMAT_VERSION,
        model=Path(str(model.model)).name,  # a folder may move; its content is what counts
        model_fingerprint=fingerprint_of(vllm_config),
        revision=str(model.revision),
        tokenizer=_fingerprint(str(model.tokenizer), model.tokenizer_revision),
        dtype=str(model.dtype),
        kv_cache_dtype=str(cache.cache_dtype),
        block_size=cache.block_size,
        hash_algo=str(cache.prefix_caching_hash_algo),
        effective_config=_effective_config(vllm_config),
        world=f"tp{parallel.tensor_parallel_size}pp{parallel.pipeline_parallel_size}",
        layout=layout,
    )


def fingerprint_of(vllm_config: VllmConfig) -> str:
    """Of the served weights."""
    model = vllm_config.model_config
    weights = _fingerprint(str(model.model), model.revision)
    if str(vllm_config.load_config.load_format) == "dummy":
        weights += f"+dummy-seed-{model.seed}"
    return weights


def _effective_config(vllm_config: VllmConfig) -> str:
    """What the command line changes about the computation: ``--hf-overrides``, ``--quantization``, and
    ``--max-model-len``, by which LongRoPE models choose their rotary factors, and others scale their attention."""
    config = vllm_config.model_config.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # a folder may move, a library be updated
        config.pop(name, None)
    model = vllm_config.model_config
    text = json.dumps([config, str(model.quantization), model.max_model_len], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache
def _fingerprint(name: str, revision: str | None) -> str:
    """Digest of the files behind a model's name: a local folder or file, or a hub's snapshot.

    A hub's snapshot is named by its commit, which is as good as its content. A name that leads to
    no files here (weights read from an object store, say) stands for itself.
    """
    if Path(name).is_dir():
        return fingerprint_dir(name)
    if Path(name).is_file():
        return fingerprint_file(name)
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return f"name:{name}@{revision}"
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        config = None
    if isinstance(config, str):
        return f"commit:{Path(config).parent.name}"
    return f"name:{name}@{revision}"


def rank_of(vllm_config: VllmConfig) -> int:
    """This worker's rank within its data-parallel engine; it names the worker's files."""
    return vllm_config.parallel_config.rank


def adapter_digest(lora_request: Any | None) -> bytes | None:
    """Content of the LoRA adapter that a request's KV is computed with; empty for the base model.

    None: the adapter's files cannot be read here, so its KV cannot be named and is not kept.
    """
    if lora_request is None:
        return b""
    if (stored := _STORED_ADAPTER.fullmatch(lora_request.lora_name)) and (
        Path(lora_request.lora_path).name == stored["digest"]
    ):
        return bytes.fromhex(stored["digest"])  # checked by the registry; reading it here would hold up the engine
    try:
        return fingerprint_adapter(Path(lora_request.lora_path))
    except OSError:
        return None
