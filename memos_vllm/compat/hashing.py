"""Block hashes must be the same after a restart.

Why: before 0.32 vLLM seeds its block hashes with random bytes unless ``PYTHONHASHSEED`` is set, so
KV on disk would never be found again. From 0.32 on the seed of sha256 is fixed.
Goes when: the window starts at 0.32. ``tests/unit/test_compat.py`` fails then.
"""

from __future__ import annotations

import os


def make_block_hashes_stable() -> None:
    """Sets a fixed seed where vLLM would choose a random one. Child processes inherit it."""
    from vllm.v1.core import kv_cache_utils

    if not hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED"):
        os.environ.setdefault("PYTHONHASHSEED", "0")
