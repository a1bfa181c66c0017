"""The check of a request's content type moved between vLLM versions.

Why: 0.32 keeps ``validate_json_request`` in ``entrypoints.serve.utils``, 0.26 in
``entrypoints.openai.utils`` or beside its server. It is a dependency of the route that we replace.
Goes when: the window starts at 0.32. ``tests/unit/test_compat.py`` fails then.
"""

from __future__ import annotations

try:
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request
except ImportError:
    from vllm.entrypoints.openai.utils import validate_json_request

__all__ = ["validate_json_request"]
