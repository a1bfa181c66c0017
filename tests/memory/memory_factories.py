"""Small factories for the memory tests. Time is a clock that a test sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from memos_vllm.config import MemoryConfig
from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal

ALICE, BOB = Principal("acme", "alice"), Principal("acme", "bob")
GIB = 2**30


@dataclass
class Clock:
    now: datetime = field(default_factory=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def count_words(text: str) -> int:
    """Without the list item's dash, so that a budget of n is n words."""
    return len(text.split()) - 1


def make_service(
    path: Path,
    *,
    clock: Callable[[], datetime] | None = None,
    max_map_bytes: int = GIB,
    embedder: Embedder | None = None,
    **config: Any,
) -> MemoryService:
    store = MemoryStore(path, max_map_bytes)
    return MemoryService(store, MemoryConfig(**config), count_words, clock or Clock(), embedder)


def says(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def texts(records: Any) -> list[str]:
    return [getattr(record, "record", record).text for record in records]
