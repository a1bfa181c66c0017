"""One engine with LoRA adapters, in a process of its own: vLLM keeps one KV connector per process, and
the shared engine has it. Prints nothing; writes what was cached and answered to a JSON file.

    python -m tests.engine.adapter_run MODEL FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from memos_vllm import data_dir
from memos_vllm.integration import salts
from memos_vllm.types import Principal
from tests.engine.conftest import BLOCK_SIZE, Engine, make_engine
from tests.engine.test_kv_tiers import prompt

RANK = 8
NUM_BLOCKS = 9
RESULT_FILE = "result.json"

Answer = dict[str, Any]


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """An adapter on all attention projections, with random A and B, as PEFT saves it."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    kv_heads = config["num_key_value_heads"] * config["head_dim"]
    sizes = {"q_proj": (hidden, heads), "k_proj": (hidden, kv_heads), "v_proj": (hidden, kv_heads)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (size_in, size_out) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, size_in, generator=generator) * 0.1
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size_out, RANK, generator=generator) * 0.1
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(sizes), "bias": "none"}
        )
    )
    return folder


class Run:
    """The engine, and the adapters under their names."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.engine: Engine = make_engine(
            model, folder / "data", enable_lora=True, max_loras=2, max_lora_rank=RANK, seed=0
        )
        self.salt = salts.salt_of(data_dir.secret(folder / "data"), Principal("shop", "alice"), 0)

    def ask(self, token_ids: list[int], adapter: Any = None) -> Answer:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": token_ids, "cache_salt": self.salt}]
        (output,) = self.engine.llm.generate(prompts, params, lora_request=adapter, use_tqdm=False)
        self.engine.settle()
        steps = output.outputs[0]
        return {
            "cached": output.num_cached_tokens,
            "tokens": list(steps.token_ids),
            "logprobs": [
                round(step[token].logprob, 2) for token, step in zip(steps.token_ids, steps.logprobs, strict=True)
            ],
        }

    def leave_in(self, tier: str) -> None:
        """Empties the tiers above ``tier``."""
        if tier != "gpu":
            self.engine.drop_gpu()
        if tier == "disk":
            self.engine.tiers.drop_host()

    def adapters(self, tier: str, token_ids: list[int]) -> dict[str, Answer]:
        """A saves; B and the base model must not find it; A must."""
        from vllm.lora.request import LoRARequest

        one = LoRARequest("a", 1, str(write_adapter(self.folder / "a", self.model, seed=1)))
        two = LoRARequest("b", 2, str(write_adapter(self.folder / "b", self.model, seed=2)))
        answers = {"first": self.ask(token_ids, one)}
        self.leave_in(tier)
        answers["other"] = self.ask(token_ids, two)
        answers["base"] = self.ask(token_ids)
        self.leave_in(tier)
        answers["again"] = self.ask(token_ids, one)
        return answers

    def changed(self, tier: str, token_ids: list[int], first_id: int, in_place: bool = False) -> dict[str, Answer]:
        """An adapter is saved anew under its name and path: vLLM's own hash stays the same."""
        from vllm.lora.request import LoRARequest

        folder = self.folder / f"changing-{first_id}"

        def load(seed: int, offset: int) -> LoRARequest:
            path = str(write_adapter(folder, self.model, seed))
            lora_id = first_id if in_place else first_id + offset
            return LoRARequest(folder.name, lora_id, path, load_inplace=in_place and offset > 0)

        answers = {"first": self.ask(token_ids, load(3, 0))}
        self.leave_in(tier)
        answers["changed"] = self.ask(token_ids, load(4, 1))
        self.leave_in(tier)
        if in_place:  # the worker has the new weights; nothing says so any more
            answers["after"] = self.ask(token_ids, LoRARequest(folder.name, first_id, str(folder)))
            self.leave_in(tier)
        answers["back"] = self.ask(token_ids, load(3, 2))
        return answers

    def without_digest(self, body: Callable[[], Answer]) -> Answer:
        from memos_vllm.integration import block_names

        original = block_names.adapter_digest
        block_names.adapter_digest = lambda lora_request: b""
        try:
            return body()
        finally:
            block_names.adapter_digest = original

    def all(self) -> dict[str, Any]:
        num_tokens = NUM_BLOCKS * BLOCK_SIZE + 5
        result: dict[str, Any] = {}
        for seed, tier in enumerate(["host", "disk"]):
            result[tier] = {
                "adapters": self.adapters(tier, prompt(7000 + seed, num_tokens)),
                "changed": self.changed(tier, prompt(7100 + seed, num_tokens), 100 * (seed + 1)),
                "in_place": self.changed(tier, prompt(7200 + seed, num_tokens), 100 * (seed + 1) + 50, in_place=True),
                "without_digest": self.without_digest(
                    lambda tier=tier, seed=seed: self.changed(
                        tier, prompt(7300 + seed, num_tokens), 100 * (seed + 1) + 80
                    )
                ),
            }
        self.engine.drop_gpu()
        self.engine.tiers.check_integrity()
        return result


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    target = Path(sys.argv[2])
    run = Run(Path(sys.argv[1]), target)
    outcome = run.all()
    (target / RESULT_FILE).write_text(json.dumps(outcome))
    run.engine.core.shutdown()
