"""How many examples Hypothesis draws, and the sizes and dtypes that must be among them wherever few are drawn."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import HealthCheck, Phase, settings

_T = TypeVar("_T")

HEAD_SIZES = [64, 80, 96, 128, 192, 256]


def every_head_size_with_one_of(*others: Sequence[_T]) -> list[tuple[int | _T, ...]]:
    """Each head size once, each of the others at least once (those of which there are up to six)."""
    return list(zip(HEAD_SIZES, *map(itertools.cycle, others), strict=False))


# Triton's interpreter is slow.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

GENERATED = settings(
    max_examples=12 if INTERPRETED else 25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=INTERPRETED,
    phases=[Phase.explicit, Phase.generate] if INTERPRETED else tuple(Phase),  # shrinking would take minutes
)
