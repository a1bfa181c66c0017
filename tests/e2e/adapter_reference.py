"""LoRA adapters for a model, and what each alone says: computed with torch and PEFT, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import lora

RANK = 8


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """A PEFT folder with random matrices that change every answer."""
    return lora.write_adapter(folder, model, seed, rank=RANK, scale=0.12, modules=("q_proj", "v_proj", "down_proj"))


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
