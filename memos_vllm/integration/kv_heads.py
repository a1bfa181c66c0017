"""Which part of a registered KV cache is which head: what the fp8 store's scales go by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from memos_vllm.compat.kv_cache_specs import is_full_attention
from memos_vllm.errors import ConfigError
from memos_vllm.kernels.heads import HeadShape, HeadView, Order, heads_of

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.kv_cache_interface import KVCacheSpec


def head_views(caches: Sequence[Tensor], num_blocks: int, specs: Sequence[KVCacheSpec]) -> list[HeadView]:
    """Views of the heads of all layers.

    The order of tokens and heads is not part of the spec; the shape tells it. Where both fit, because a
    kernel block has as many tokens as there are heads, the scales may go by tokens: no less exact.

    Raises:
        ConfigError: vLLM's caches cannot be kept as fp8.
    """
    if not all(is_full_attention(spec) for spec in specs):
        raise ConfigError("kv.store_dtype: fp8 needs a model with full attention in every layer; use auto")
    reasons = []
    for order in get_args(Order):
        try:
            return heads_of(caches, num_blocks, [_shape(spec, order) for spec in specs])
        except ValueError as error:
            reasons.append(str(error))
    raise ConfigError(f"kv.store_dtype: fp8 does not fit this model ({'; '.join(reasons)}); use auto")


def _shape(spec: KVCacheSpec, order: Order) -> HeadShape:
    return HeadShape(spec.num_kv_heads, spec.head_size, order, spec.head_size_v)
