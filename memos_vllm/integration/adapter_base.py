"""What adapters must fit on this server: from vLLM's configuration to ``adapters.BaseModel``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from memos_vllm.adapters.base_model import linear_modules
from memos_vllm.adapters.peft_config import BaseModel
from memos_vllm.config import AdaptersConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def base_of(vllm_config: VllmConfig, config: AdaptersConfig) -> BaseModel | None:
    """None where the server runs without LoRA."""
    lora, model = vllm_config.lora_config, vllm_config.model_config
    if lora is None:
        return None
    served: Iterable[str] | str | None = model.served_model_name
    names = [served] if isinstance(served, str) else list(served or ())
    names += [str(model.model), Path(str(model.model)).name, *config.base_models]
    targets = lora.target_modules
    return BaseModel(
        names=frozenset(names),
        modules=linear_modules(model.hf_config.get_text_config()),
        max_rank=lora.max_lora_rank,
        target_modules=None if targets is None else frozenset(targets),
        path=str(model.model),
    )
