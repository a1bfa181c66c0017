"""A request without an adapter must stay the base model's, also in a batch with adapters, on a CPU.

Why: vLLM marks its tokens with the adapter index -1. The GPU kernels skip that; the PyTorch operations
that a CPU runs (seen in 0.32) take it as an index, hence the weights of the last slot. The answer is then
another adapter's, and so is its KV, in every tier.
Goes when: vLLM's own ``bgmv_shrink`` leaves zeros for -1. ``tests/unit/test_compat.py`` fails then.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

_PUNICA = "vllm.lora.punica_wrapper.punica_cpu"


def skip_tokens_without_adapter() -> None:
    """Every way through the adapters begins with a shrink (x A^T); where it is zero, nothing is added.

    May be called twice.
    """
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops

    original = lora_ops.bgmv_shrink
    if hasattr(original, "_memos_original"):
        return

    @functools.wraps(original)
    def bgmv_shrink(
        inputs: Any, weights: Any, output_tensor: Any, lora_indices_tensor: Any, scaling: float = 1.0
    ) -> None:
        original(inputs, weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[: lora_indices_tensor.shape[0]][lora_indices_tensor < 0] = 0

    bgmv_shrink._memos_original = original  # type: ignore[attr-defined]
    # Each module has its own name for it; the last one only where LoRA is in use.
    for module in (lora_ops, torch_ops, sys.modules.get(_PUNICA)):
        if module is not None:
            module.bgmv_shrink = bgmv_shrink  # type: ignore[attr-defined]
