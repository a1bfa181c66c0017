"""What ranks a conversation's turns for a question: Memos as it is served, its parts, and baselines."""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.locomo_data import Conversation
from memos_vllm.config import MemoryConfig
from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.memory.vectors import Vector
from memos_vllm.types import Principal

Ranking = list[int]
"""Places of turns, best first."""

Ranker = Callable[[str, int], Ranking]
"""A question and how many turns are wanted at most."""

RRF_K = 60
"""Of Cormack, Clarke and Büttcher, SIGIR 2009."""

RRF_DEPTH = 100

_WHO = Principal("benchmark", "user")
_MAP_BYTES = 2**30


def memos(
    conversation: Conversation, resources: ExitStack, embedder: Embedder | None = None, neighbours: bool = True
) -> MemoryService:
    """A service that has the conversation, a turn a memory; asked a day after its end."""
    folder = resources.enter_context(tempfile.TemporaryDirectory())
    store = MemoryStore(Path(folder), _MAP_BYTES)
    resources.callback(store.close)
    asked_at: datetime = conversation.turns[-1].said_at + timedelta(days=1)
    service = MemoryService(store, MemoryConfig(), now=lambda: asked_at, embedder=embedder)
    service.add_many(
        _WHO,
        [
            {
                "text": turn.text,
                "session": turn.session if neighbours else None,
                "valid_from": turn.said_at,
                "origin": {"speaker": turn.speaker, "place": place},
            }
            for place, turn in enumerate(conversation.turns)
        ],
    )
    return service


@contextmanager
def other_constants(constants: Mapping[str, float]) -> Iterator[None]:
    """Of modules of ``memos_vllm.memory``, as ``module.NAME``."""
    with ExitStack() as patches:
        for name, value in constants.items():
            patches.enter_context(mock.patch(f"memos_vllm.memory.{name}", value))
        yield


def searching(service: MemoryService, context: int = 0) -> Ranker:
    """With ``context``, what was said around a hit follows it and takes its place in the count."""

    def rank(question: str, limit: int) -> Ranking:
        found: dict[int, None] = {}
        for hit in service.search(_WHO, question, top_k=limit, context=context):
            for record in (hit.record, *hit.before[::-1], *hit.after):
                found[record.origin["place"]] = None
        return list(found)[:limit]

    return rank


def texts(conversation: Conversation, before: int = 0) -> list[str]:
    """As the baselines get them: date, speaker and words; with the turn before it where that is asked for."""
    own = [f"({turn.said_at:%-I:%M %p on %-d %B, %Y}) {turn.speaker}: {turn.text}" for turn in conversation.turns]
    if not before:
        return own
    out = []
    for place, turn in enumerate(conversation.turns):
        first = place - 1 if place and conversation.turns[place - 1].session == turn.session else place
        out.append(" ".join(own[first : place + 1]))
    return out


def bm25s(documents: Sequence[str]) -> Ranker:
    """BM25S with its English stop words and PyStemmer.

    Raises:
        ImportError: one of the two is not installed.
    """
    import bm25s as library
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    index = library.BM25()
    index.index(
        library.tokenize(list(documents), stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False
    )

    def rank(question: str, limit: int) -> Ranking:
        tokens = library.tokenize([question], stopwords="en", stemmer=stemmer, show_progress=False)
        found, scores = index.retrieve(tokens, k=min(limit, len(documents)), show_progress=False)
        return [int(place) for place, score in zip(found[0], scores[0], strict=True) if score > 0]

    return rank


def fts5(documents: Sequence[str], resources: ExitStack) -> Ranker:
    """SQLite's full-text index with its Porter stemmer; any word of the question may match."""
    database = sqlite3.connect(":memory:")
    resources.callback(database.close)
    database.execute("CREATE VIRTUAL TABLE turns USING fts5(text, tokenize='porter unicode61')")
    database.executemany("INSERT INTO turns(rowid, text) VALUES (?, ?)", enumerate(documents))

    def rank(question: str, limit: int) -> Ranking:
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", question))
        rows = database.execute("SELECT rowid FROM turns WHERE turns MATCH ? ORDER BY rank LIMIT ?", (words, limit))
        return [row[0] for row in rows]

    return rank


def exact_dense(documents: Sequence[str], embedder: Embedder) -> Ranker:
    """Cosine with every turn, nothing else."""
    rows = _normalised(embedder.embed(documents))

    def rank(question: str, limit: int) -> Ranking:
        scores = rows @ _normalised(embedder.embed([question]))[0]
        return [int(place) for place in np.argsort(-scores, kind="stable")[:limit]]

    return rank


def reciprocal_rank_fusion(rankers: Sequence[Ranker], num_turns: int) -> Ranker:
    """Of the first ``RRF_DEPTH`` of each ranking."""

    def rank(question: str, limit: int) -> Ranking:
        scores = np.zeros(num_turns)
        for ranker in rankers:
            for place, turn in enumerate(ranker(question, RRF_DEPTH), 1):
                scores[turn] += 1 / (RRF_K + place)
        return [int(turn) for turn in np.argsort(-scores, kind="stable")[:limit] if scores[turn] > 0]

    return rank


class Remembering(Embedder):
    """Another embedder that embeds no text twice; the arms ask for the same ones."""

    def __init__(self, embedder: Embedder):
        self._embedder = embedder
        self._known: dict[str, Vector] = {}
        self.name, self.num_dims = embedder.name, embedder.num_dims
        self.is_linear, self.is_stored = embedder.is_linear, False

    def embed(self, texts: Sequence[str]) -> Any:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._embedder.embed(new), strict=True))
        return np.array([self._known[text] for text in texts])


def _normalised(rows: Any) -> Any:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
