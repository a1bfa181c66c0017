"""The body of vLLM's answers to bad requests moved between vLLM versions.

Why: 0.29 moved ``ErrorResponse`` from ``entrypoints.openai`` to ``entrypoints.serve``. Where a route of ours
asks vLLM's serving object itself, it has to tell an error from an answer.
Goes when: the window starts at 0.29. ``tests/unit/test_compat.py`` fails then.
"""

from __future__ import annotations

try:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
except ImportError:
    from vllm.entrypoints.openai.engine.protocol import ErrorResponse

__all__ = ["ErrorResponse"]
