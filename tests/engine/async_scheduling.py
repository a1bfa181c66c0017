"""A plugin of pytest: engines on a CPU schedule asynchronously, as vLLM does by default on a GPU.

The scheduler is then a step ahead of the results: blocks are given away while a pass that was queued still writes them,
and copies are planned before it is known how the step before them ended.
"""

from __future__ import annotations

from typing import Any

import pytest

_steps = 0


def pytest_configure(config: pytest.Config) -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.engine.core import EngineCore

    original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    step = EngineCore.step_with_batch_queue

    def step_with_batch_queue(self: Any) -> Any:
        global _steps
        _steps += 1
        return step(self)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[assignment]
    EngineCore.step_with_batch_queue = step_with_batch_queue  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{_steps} steps with asynchronous scheduling")
