"""What became of scenes and of the blocks that were brought for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SceneTotals:
    """Since the start. An arrival is a request that names a scene which was registered before."""

    ready: int = 0
    """Arrivals that found all they share with the scene on the GPU."""
    late: int = 0
    """Arrivals whose prefetch was under way."""
    missed: int = 0
    """Arrivals that found less, with nothing under way."""
    other: int = 0
    """Arrivals whose prompt shares no block with the scene: memory or system prompt changed."""
    prefetched_blocks: int = 0
    used_blocks: int = 0
    """Prefetched blocks that a request was given."""
    wasted_blocks: int = 0
    """Prefetched blocks that were gone before a request was given them."""
    failed_blocks: int = 0
