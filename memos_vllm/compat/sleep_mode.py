"""Whether what a connector puts on the GPU when it gets the KV caches is still there after a sleep.

Why: with ``--enable-sleep-mode`` vLLM before 0.32 registers the KV caches inside the memory pool of the KV cache, whose
content ``/sleep`` throws away. The kernels' tables of addresses, made there, would be garbage after ``/wake_up``, and
copies would go anywhere. From 0.32 on only the caches are in that pool, and what else is made then is kept.
Goes when: the oldest supported vLLM is 0.32.
"""

from __future__ import annotations

import inspect


def keeps_what_connectors_allocate() -> bool:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return "kv_cache_allocation_context" in inspect.signature(GPUModelRunner.initialize_kv_cache).parameters
