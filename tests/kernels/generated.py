"""How many examples Hypothesis draws."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# Triton's interpreter is slow; there, generated shapes alone have every dtype.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

GENERATED = settings(
    max_examples=12 if INTERPRETED else 25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=INTERPRETED,
    phases=[Phase.explicit, Phase.generate] if INTERPRETED else tuple(Phase),  # shrinking would take minutes
)
