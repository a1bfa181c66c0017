"""Small adapters, sound and broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from memos_vllm.adapters.peft_config import BaseModel
from memos_vllm.adapters.registry import AdapterRegistry
from memos_vllm.config import AdaptersConfig
from memos_vllm.types import Principal

ALICE, BOB, EVE = Principal("shop", "alice"), Principal("shop", "bob"), Principal("other", "eve")
MODULE = "model.layers.0.self_attn.q_proj"
BASE = BaseModel(names=frozenset({"tiny"}), modules={MODULE: (6, 4)}, max_rank=8)
FINGERPRINT = "f" * 64
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
}


def weights(seed: int = 0, rank: int = 2, module: str = MODULE, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": rng.standard_normal((rank, 4)).astype(dtype),
        f"{prefix}.lora_B.weight": rng.standard_normal((6, rank)).astype(dtype),
    }


def adapter_folder(
    folder: Path, seed: int = 0, config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None
) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    save_file(weights(seed) if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def open_registry(root: Path, fingerprint: str = FINGERPRINT, base: BaseModel | None = BASE, **config: Any) -> Any:
    return AdapterRegistry(root, AdaptersConfig.model_validate(config), base, fingerprint)
