"""On which cores the threads of a worker process run."""

from __future__ import annotations

import os

import psutil
import pytest

from tests.e2e.conftest import Memos

pytestmark = pytest.mark.e2e

COPY_THREADS = 3
"""One that loads and saves, two for files."""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux binds threads to cores")
def test_copies_may_run_on_another_core_than_the_forward_pass(memos: Memos) -> None:
    assert memos.server.process is not None
    processes = psutil.Process(memos.server.process.pid).children(recursive=True)
    (worker,) = [process for process in processes if "Worker" in process.name()]
    everywhere = os.sched_getaffinity(worker.ppid())
    anywhere = [thread.id for thread in worker.threads() if os.sched_getaffinity(thread.id) == everywhere]
    assert len(anywhere) >= COPY_THREADS
    if len(everywhere) > 1:
        assert worker.pid not in anywhere, "vLLM no longer binds the main thread: compat/cpu_affinity.py may go"
