"""LoRA adapters with random weights, as PEFT saves them, for any of the benchmarks' models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path,
    model: Path,
    seed: int,
    *,
    rank: int,
    scale: float = 0.1,
    modules: Sequence[str] = (*ATTENTION, *MLP),
    base_name: str | None = None,
) -> Path:
    """An adapter on every layer whose A and B are random, so that it changes every answer.

    Args:
        scale: standard deviation of both.
        base_name: what it says it was made for; default: the model's folder name.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, head, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {"q_proj": (hidden, heads), "k_proj": (hidden, kv_heads), "v_proj": (hidden, kv_heads)}
    sizes |= {"o_proj": (heads, hidden), "down_proj": (inner, hidden)}
    sizes |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name in modules:
            size_in, size_out = sizes[name]
            block = "self_attn" if name in ATTENTION else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            for side, shape in (("A", (rank, size_in)), ("B", (size_out, rank))):
                weights[f"{prefix}.lora_{side}.weight"] = torch.randn(shape, generator=generator).mul(scale).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or model.name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
