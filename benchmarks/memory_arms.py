"""What is compared: Memos, SQLite FTS5, BM25S and exact dense search. Each stores texts and answers questions."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import xxhash

from benchmarks import locomo_arms
from memos_vllm.config import MemoryConfig
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal

TOP_K = 10
MAP_BYTES = 64 * 2**30
Search = Callable[[str], object]


def principal(number: int) -> Principal:
    return Principal("benchmark", f"user-{number}")


def open_memos(where: Path | str, embedder: Embedder | None = None) -> tuple[Store, MemoryService]:
    """On a store in a folder, or in the database that a connection string names."""
    if isinstance(where, Path):
        store: Store = MemoryStore(where, MAP_BYTES)
    else:
        from memos_vllm.memory.postgresql import PostgresStore

        store = PostgresStore(where, pgvector=False)  # these vectors are not stored
    config = MemoryConfig(max_user_memories=None, max_user_bytes=None)
    return store, MemoryService(store, config, embedder=embedder)


class DrawnVectors(Embedder):
    """A random vector per text, at next to no cost: what is measured is the search."""

    is_stored = False

    def __init__(self, num_dims: int):
        self.name, self.num_dims = "drawn", num_dims

    def embed(self, texts: Sequence[str]) -> Any:
        seeds = (xxhash.xxh3_64_intdigest(text.encode()) for text in texts)
        rows = [numpy.random.default_rng(seed).standard_normal(self.num_dims, numpy.float32) for seed in seeds]
        return numpy.array(rows)


def add_batches(service: MemoryService, who: Principal, texts: Sequence[str], size: int) -> None:
    for begin in range(0, len(texts), size):
        service.add_many(who, [{"text": text} for text in texts[begin : begin + size]])


def add_concurrently(service: MemoryService, who: Principal, texts: Sequence[str], threads: int) -> None:
    """One memory a call, from several threads at once."""

    def work(mine: Sequence[str]) -> None:
        for text in mine:
            service.add(who, text)

    workers = [threading.Thread(target=work, args=(texts[number::threads],)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


class FTS5:
    """SQLite's full-text index with its Porter stemmer. A commit is on disk: WAL, ``synchronous=FULL``."""

    def __init__(self, path: Path):
        self._database = sqlite3.connect(path)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute(
            "CREATE VIRTUAL TABLE IF NOT EXISTS memories USING fts5(text, tokenize='porter unicode61')"
        )

    def add(self, texts: Sequence[str]) -> None:
        with self._database:
            self._database.executemany("INSERT INTO memories(text) VALUES (?)", ((text,) for text in texts))

    def search(self, question: str) -> object:
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", question))
        query = "SELECT text FROM memories WHERE memories MATCH ? ORDER BY rank LIMIT ?"
        return self._database.execute(query, (words, TOP_K)).fetchall()

    def close(self) -> None:
        self._database.close()


def bm25s(texts: Sequence[str]) -> Search | None:
    """In memory, built once; None where it is not installed."""
    try:
        rank = locomo_arms.bm25s(texts)
    except ImportError:
        return None
    return lambda question: rank(question, TOP_K)


def exact_dense(rows: numpy.ndarray, queries: numpy.ndarray) -> Search:
    """A query of each call after the other; the embedding of the text is not part of it."""
    place = 0

    def search(_: str) -> object:
        nonlocal place
        place += 1
        scores = rows @ queries[place % len(queries)]
        best = numpy.argpartition(scores, -TOP_K)[-TOP_K:]
        return best[numpy.argsort(scores[best])[::-1]]

    return search
