"""The configuration of a PEFT adapter: what of it a server can honour, and what it must refuse."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memos_vllm.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20

_CANONICAL = ("alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora")
"""What of the configuration changes the computation, besides the tensors there are. All the rest must say
"nothing special"."""

_NOTHING_SPECIAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "layers_to_transform": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
    "exclude_modules": (None, []),
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""PiSSA, OLoRA, CorDA and LoftQ change the base model's weights, which a server cannot do for one request."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What an adapter must fit.

    Attributes:
        names: under which names an adapter may say it was made for this model.
        modules: linear modules by name, (out, in) features; None where they cannot be known here, and
            vLLM's own load is the only check of shapes.
        max_rank: vLLM's ``--max-lora-rank``.
        target_modules: vLLM's ``--lora-target-modules``; None: all.
        path: folder or hub name of its weights.
    """

    names: frozenset[str]
    modules: Mapping[str, tuple[int, int]] | None
    max_rank: int
    target_modules: frozenset[str] | None = None
    path: str = ""


def parse(raw: bytes, model: BaseModel) -> dict[str, Any]:
    """The checked configuration.

    Args:
        raw: the file's content; more than ``MAX_CONFIG_BYTES`` of it is refused.

    Raises:
        AdapterError: with what is wrong and what to do about it.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes", status=413)
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_FILE} must be a JSON object, as PEFT writes it")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG_FILE}: peft_type is {config.get('peft_type')!r}; only LORA can be served")
    for name, allowed in _NOTHING_SPECIAL.items():
        if config.get(name, allowed[0]) not in allowed:
            raise AdapterError(f"{CONFIG_FILE}: {name} = {config[name]!r} cannot be served; train without it")
    if not any(config.get("init_lora_weights", True) is init for init in _PLAIN_INITS[:3]) and (
        config["init_lora_weights"] not in _PLAIN_INITS[3:]
    ):
        raise AdapterError(
            f"{CONFIG_FILE}: init_lora_weights = {config['init_lora_weights']!r} changes the base model's weights; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    _check_base(config.get("base_model_name_or_path"), model)
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(_is_positive(value, kind) for value in pattern.values()):
            raise AdapterError(f"{CONFIG_FILE}: {name} must map module names to positive numbers")
        if not all(re.fullmatch(r"[\w.]{1,400}", key) for key in pattern):
            raise AdapterError(f"{CONFIG_FILE}: {name} has a regular expression; write module names")
        config[name] = pattern
    if not _is_positive(config.get("r"), int):
        raise AdapterError(f"{CONFIG_FILE}: r must be a whole number above 0, not {config.get('r')!r}")
    if not _is_positive(config.get("lora_alpha"), (int, float)):
        raise AdapterError(f"{CONFIG_FILE}: lora_alpha must be a number above 0, not {config.get('lora_alpha')!r}")
    largest = max([config["r"], *config["rank_pattern"].values()])
    if largest > model.max_rank:
        raise AdapterError(
            f"the adapter's rank is {largest}, the server takes up to {model.max_rank}; "
            "train with a lower r, or start the server with a higher --max-lora-rank"
        )
    return config


def _check_base(named: Any, model: BaseModel) -> None:
    if not isinstance(named, str) or not named:
        raise AdapterError(f"{CONFIG_FILE} does not say for which model the adapter is: set base_model_name_or_path")
    if named not in model.names and Path(named).name not in model.names:
        raise AdapterError(
            f"the adapter is for {named!r}, this server serves {', '.join(sorted(model.names))}; "
            "if that is the same model, set base_model_name_or_path, or have the operator list the name under "
            "adapters.base_models"
        )


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 2**31 and math.isfinite(value)


def canonical(config: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """What is kept: the fields that change the computation, and the modules that there are tensors for."""
    kept = {name: config[name] for name in _CANONICAL if name in config}
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return kept | {"bias": "none", "peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets}


def rank_of(module: str, config: Mapping[str, Any]) -> int:
    """As PEFT looks it up: the first pattern that is the name's end."""
    for pattern, rank in config["rank_pattern"].items():
        if module == pattern or module.endswith("." + pattern):
            return int(rank)
    return int(config["r"])
