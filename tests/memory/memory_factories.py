"""Small factories for the memory tests. Time is a clock that a test sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from memos_vllm.config import MemoryConfig
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal

ALICE, BOB = Principal("acme", "alice"), Principal("acme", "bob")
GIB = 2**30
HAS_PGVECTOR = os.environ.get("MEMOS_TEST_PGVECTOR") != "0"
"""Told to child processes too; ``conftest.postgres`` sets it."""


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
    where: Path | str,
    *,
    clock: Callable[[], datetime] | None = None,
    max_map_bytes: int = GIB,
    embedder: Embedder | None = None,
    **config: Any,
) -> MemoryService:
    """A service on a store in a folder, or in the database that a connection string names."""
    store = MemoryStore(where, max_map_bytes) if isinstance(where, Path) else open_database(where)
    return MemoryService(store, MemoryConfig(**config), count_words, clock or Clock(), embedder)


def open_database(dsn: str) -> Store:
    from memos_vllm.memory.postgresql import PostgresStore

    return PostgresStore(dsn, pgvector=HAS_PGVECTOR)


def says(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def texts(records: Any) -> list[str]:
    return [getattr(record, "record", record).text for record in records]
