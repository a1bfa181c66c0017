"""When the worker's copies may begin: behind all that the forward pass was given so far."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from memos_vllm.config import MemosConfig
from memos_vllm.integration.arriving_layers import ArrivingLayers
from memos_vllm.integration.messages import MemosMetadata
from memos_vllm.integration.worker_side import WorkerSide
from memos_vllm.store.layer_groups import layer_groups
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


@pytest.mark.parametrize("asks", [True, False], ids=["layer by layer", "at its begin"])
def test_the_stream_of_the_pass_waits_for_each_group_of_layers(asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    side = WorkerSide(SimpleNamespace(), SimpleNamespace(num_blocks=4, kv_cache_groups=[]), MemosConfig())  # type: ignore[arg-type]
    side.planes = [torch.zeros(4, 8)] * 2
    side._arriving = ArrivingLayers(layer_groups(side.planes, 2), {"first": (0,), "second": (1,)})
    side._transfer = SimpleNamespace(  # type: ignore[assignment]
        pace=lambda on: None, wait_for_layers=lambda op_id, group: [f"event {group} of {op_id}"]
    )
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_event=waited.append))
    side.wait_for_layer("first")
    assert waited == [], "nothing arrives"
    side.start(MemosMetadata(arriving=(7,)))
    if not asks:
        side.wait_for_all_layers()
        assert waited == ["event 0 of 7", "event 1 of 7"]
    side.wait_for_layer("first")
    assert waited[:1] == ["event 0 of 7"] and len(waited) == (1 if asks else 2)
    side.wait_for_layer("second")
    assert waited == ["event 0 of 7", "event 1 of 7"]
