"""LoRA adapters for a model, and what each alone says: computed with torch and PEFT, without vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 8
MODULES = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}


def write_adapter(folder: Path, model: Path, seed: int, rank: int = RANK, scale: float = 0.12) -> Path:
    """A PEFT folder with random matrices that change every answer."""
    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    sizes = {
        "q_proj": (hidden, config["num_attention_heads"] * head),
        "v_proj": (hidden, config["num_key_value_heads"] * head),
        "down_proj": (config["intermediate_size"], hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (size_in, size_out) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{MODULES[name]}.{name}"
            for side, shape in (("A", (rank, size_in)), ("B", (size_out, rank))):
                weights[f"{prefix}.lora_{side}.weight"] = torch.randn(shape, generator=generator).mul(scale).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(sizes),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


class References:
    """Log-probabilities of the first answered token, per adapter and prompt, in float32.

    Args:
        adapters: name to PEFT folder.
        conversations: of the prompts, as the server gets them.
    """

    def __init__(self, model: Path, adapters: dict[str, Path], conversations: Sequence[list[dict[str, Any]]]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        prompts = [
            tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False) for each in conversations
        ]
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        names = list(adapters)
        peft = PeftModel.from_pretrained(base, str(adapters[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            peft.load_adapter(str(adapters[name]), adapter_name=name)
        self._logprobs: dict[str, list[torch.Tensor]] = {}  # of each prompt: [vocab]
        with torch.inference_mode():
            for name in names:
                peft.set_adapter(name)
                self._logprobs[name] = [self._last(peft, prompt) for prompt in prompts]
            with peft.disable_adapter():
                self._logprobs["base"] = [self._last(peft, prompt) for prompt in prompts]

    @staticmethod
    def _last(model: Any, prompt: list[int]) -> torch.Tensor:
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].float(), dim=-1)

    def distances(self, prompt: int, served: dict[int, float]) -> dict[str, float]:
        """How far served log-probabilities (token id to value) are from each adapter's, nearest first."""
        ids = torch.tensor(list(served))
        values = torch.tensor(list(served.values()))
        found = {name: (each[prompt][ids] - values).abs().max().item() for name, each in self._logprobs.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))
