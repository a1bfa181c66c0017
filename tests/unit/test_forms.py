"""What is measured of a memory, without a model."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from memos_vllm.integration import forms
from memos_vllm.memory.records import MemoryRecord, utc_now
from memos_vllm.types import MemoryId


@pytest.mark.parametrize(("age_s", "observed_s"), [(7200, 3600), (60, 60), (-60, 0)])
def test_a_memory_is_observed_no_longer_than_it_has_been_there(age_s: float, observed_s: float) -> None:
    recalls = SimpleNamespace(of=lambda memory_id: 20, observed_s=3600.0)
    state: Any = SimpleNamespace(recalls=recalls, count_tokens=len)
    created = utc_now() - timedelta(seconds=age_s)
    record = MemoryRecord(
        MemoryId("m"), "acme", "alice", "fact", "I like tea.", False, (), None, created_at=created, updated_at=created
    )
    measured = forms._measure(state, record, {}, 120.0)
    assert measured.uses == 20 and observed_s <= measured.observed_s <= observed_s + 30
