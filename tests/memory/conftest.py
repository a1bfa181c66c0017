from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import Clock, make_service


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., MemoryService]]:
    """Makes a service on this test's directory; its stores are closed at the end."""
    made: list[MemoryService] = []

    def factory(**config: Any) -> MemoryService:
        made.append(make_service(tmp_path / "memory", **{"clock": clock, **config}))
        return made[-1]

    yield factory
    for service in made:
        service._store.close()


@pytest.fixture
def service(make: Callable[..., MemoryService]) -> MemoryService:
    return make()
