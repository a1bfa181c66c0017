"""What one may choose about a distillation; without torch, so that a command line can name it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one distillation; all of them go into the adapter's provenance."""

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1.5e-3
    steps: int = 150
    facts_per_step: int = 16
    controls_per_step: int = 24
    num_controls: int = 480
    """Trained on; as many again, others, are evaluated."""

    max_answer_tokens: int = 32
    min_answered: float = 0.9
    """The bar: share of the distilled facts that are answered without the memory."""

    max_control_loss: float = 0.02
    """The harm check: how much of the control set may get worse."""

    seed: int = 0
