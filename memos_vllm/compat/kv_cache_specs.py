"""Whether every layer of a KV cache group keeps all blocks of a prefix.

Why: a group of sliding-window layers drops blocks outside the window and shows the null block in
their place; saved under the prefix's hash it would be wrong KV. vLLM has no predicate for it, and the
classes that derive from full attention grow from version to version, so the known ones are listed.
Goes when: vLLM offers such a predicate.
"""

from __future__ import annotations

from typing import Any


def is_full_attention(spec: Any) -> bool:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

    specs = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    return all(type(item) in (FullAttentionSpec, MLAAttentionSpec) for item in specs)


def spec_of_layer(spec: Any, layer: str) -> Any:
    """The spec of one layer of a group, whose layers may differ in it."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return spec.kv_cache_specs[layer] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
