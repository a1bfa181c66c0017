"""Where vLLM asks a KV connector, layer by layer, whether the layer's KV has arrived.

Why: its attention operators do, each before it reads its own cache, and run between the pieces of a piecewise CUDA
graph. In the replay of a full graph nobody asks, and other readers of a cache (an indexer of sparse attention, a
drafter with a graph of its own) do not ask at all. vLLM tells a connector neither.
Goes when: it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def layers_ask() -> bool:
    """Whether every layer of the pass that is about to run asks before it reads; False where that is not certain."""
    if not is_forward_context_available():
        return False
    context = get_forward_context()
    if context.attn_metadata is None or getattr(context, "ubatch_slices", None) is not None:
        return False  # no pass; or two at a time, each on a stream of its own
    return context.cudagraph_runtime_mode != CUDAGraphMode.FULL


def why_not(vllm_config: VllmConfig, layer_names: Iterable[str]) -> str | None:
    """What keeps a model's passes from asking for each of these layers; None: nothing does."""
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return "on this platform not every backend of vLLM asks"
    if vllm_config.speculative_config is not None:
        return "speculative decoding reads the KV of its own layers without asking"
    attention = _attention_classes()
    layers = vllm_config.compilation_config.static_forward_context
    for name in layer_names:
        layer = layers.get(name)
        if type(layer) not in attention:  # what derives from them may read in other places
            return f"{name} is a {type(layer).__name__}, which does not ask"
    return None


def _attention_classes() -> tuple[type, ...]:
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    return Attention, MLAAttention
