"""The linear modules of a model, by name and shape, from its configuration alone."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def linear_modules(hf_config: Any) -> dict[str, tuple[int, int]] | None:
    """Name to (out, in) features, as transformers builds the model; None if it does not know the model.

    Nothing is allocated: the model is built on torch's ``meta`` device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
    except (ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        logger.warning("shapes of adapters are left to vLLM to check: transformers cannot build the model (%s)", error)
        return None
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
