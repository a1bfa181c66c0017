"""A question to a user's memories, and what answers it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memos_vllm.memory import analysis, times
from memos_vllm.memory.vectors import Vector
from memos_vllm.types import MemoryId

MAX_QUERY_CHARS = 10_000


@dataclass(frozen=True, slots=True)
class Query:
    """Of a very long text the beginning and the end count."""

    text: str
    asked_at: datetime
    """What "yesterday" in it refers to; what has expired by then is not found."""

    vector: Vector | None = None
    """The text's embedding, where there is an embedder."""

    def terms(self) -> list[str]:
        text = self.text
        if len(text) > MAX_QUERY_CHARS:
            text = text[: MAX_QUERY_CHARS // 2] + " " + text[-MAX_QUERY_CHARS // 2 :]
        return analysis.query_terms(text) + times.mentioned_terms(text, self.asked_at)


@dataclass(frozen=True, slots=True)
class Match:
    id: MemoryId
    score: float
    why: dict[str, Any]
    """As JSON: ``method``; each retriever's score and rank; each term's part of the lexical score."""
