"""When the worker's copies may begin: behind all that the forward pass was given so far."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from memos_vllm.config import MemosConfig
from memos_vllm.integration.messages import MemosMetadata
from memos_vllm.integration.worker_side import WorkerSide
from memos_vllm.store.ops import Load, Save


@pytest.mark.parametrize("has_gpu", [True, False])
def test_copies_start_behind_an_event_of_the_compute_stream(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With asynchronous scheduling a pass that still writes a block is queued when the block is given to a load."""
    recorded: list[object] = []

    class Event:
        def record(self) -> None:  # on the current stream, vLLM's
            recorded.append(self)

    submitted: list[object] = []
    side = WorkerSide(SimpleNamespace(), SimpleNamespace(num_blocks=4, kv_cache_groups=[]), MemosConfig())  # type: ignore[arg-type]
    side._transfer = SimpleNamespace(  # type: ignore[assignment]
        pace=lambda on: None, submit=lambda ops, after: submitted.append((ops, after, list(recorded)))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for operations in ([Save(1, (0,), (0,))], [Load(2, (0,), (1,))]):
        side.start(MemosMetadata(operations))
    side.start(MemosMetadata())
    assert [ops for ops, _, _ in submitted] == [[Save(1, (0,), (0,))], [Load(2, (0,), (1,))]]
    for _, after, before in submitted:
        assert after is before[-1] if has_gpu else after is None and not before
    assert len(recorded) == (2 if has_gpu else 0), "one for each step that copies"
