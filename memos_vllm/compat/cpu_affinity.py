"""Copies must not take the core of the forward pass while another core is idle, on a CPU.

Why: vLLM has OpenMP bind the threads of a CPU worker to cores (seen in 0.32, ``VLLM_CPU_OMP_THREADS_BIND``), the
main thread too, and what that thread starts inherits it. Copy threads then interrupt the forward pass, for
milliseconds each time.
Goes when: vLLM leaves the main thread's other children alone. ``tests/e2e/test_worker_threads.py`` says whether the
main thread is still bound.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def threads_on_all_cores() -> Iterator[None]:
    """Threads that start in this block may run wherever the parent process may; the calling thread as before."""
    if not hasattr(os, "sched_setaffinity"):  # not Linux
        yield
        return
    own = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setaffinity(0, own | os.sched_getaffinity(os.getppid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
