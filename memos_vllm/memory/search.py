"""Search within one user's memories: an inverted index in memory, ranked by BM25.

The index is a copy. LMDB is the truth, and its change log tells the index what it missed, whichever
process wrote it. Scores follow Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25
and Beyond" (2009), with the constants usual there and an inverse document frequency that stays
positive (Lucene's: a term that stands in every memory still counts a little).
"""

from __future__ import annotations

import heapq
import math
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from memos_vllm.memory import analysis, tables
from memos_vllm.memory.records import STANDING_TYPES, MemoryRecord
from memos_vllm.memory.transactions import UserReader
from memos_vllm.types import MemoryId, Principal

K1 = 1.2
B = 0.75
MAX_QUERY_CHARS = 10_000
MAX_INDEXED_USERS = 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index knows of one memory."""

    terms: tuple[str, ...]
    """Distinct; in ``postings`` for each."""

    length: int
    """Terms with repeats."""

    type: str
    tags: frozenset[str]
    pinned: bool


@dataclass(frozen=True, slots=True)
class Match:
    id: MemoryId
    score: float
    terms: dict[str, float]
    """Each matched term's part of the score."""


class UserIndex:
    """One user's current memories. Callers hold ``lock`` while they use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: dict[MemoryId, Entry] = {}  # in the order of creation
        self._postings: dict[str, dict[MemoryId, int]] = defaultdict(dict)
        self._total_length = 0
        self._seq = 0

    def catch_up(self, user: UserReader) -> int:
        """Follows the change log to what the transaction sees; how many postings went away."""
        removed = 0
        if user.seq <= self._seq:  # another thread was here with a later view
            return removed
        if self._seq == 0 or user.seq - self._seq > tables.CHANGES_KEPT:
            removed = self._clear()
            for record in user.scan():
                self._put(record)
        else:
            for operation, memory_id in user.changes_after(self._seq):
                if operation == tables.CLEAR:
                    removed += self._clear()
                elif operation == tables.PUT and (record := user.get(memory_id)):
                    self._put(record)
                else:
                    removed += self._remove(memory_id)
        self._seq = user.seq
        return removed

    def rank(self, query: str, top_k: int, accept: Callable[[MemoryId, Entry], bool]) -> list[Match]:
        """The best matches that ``accept`` lets through, best first, newer ones first among equals.

        Of a very long query the beginning and the end count.
        """
        if len(query) > MAX_QUERY_CHARS:
            query = query[: MAX_QUERY_CHARS // 2] + " " + query[-MAX_QUERY_CHARS // 2 :]
        terms = analysis.query_terms(query)
        scores: dict[MemoryId, float] = defaultdict(float)
        for term in terms:
            for memory_id, score in self._term_scores(term):
                scores[memory_id] += score
        best = heapq.nlargest(
            top_k, ((score, found) for found, score in scores.items() if accept(found, self.entries[found]))
        )
        parts: dict[MemoryId, dict[str, float]] = {memory_id: {} for _, memory_id in best}
        for term in terms:
            for memory_id, score in self._term_scores(term, parts):
                parts[memory_id][term] = score
        return [Match(memory_id, score, parts[memory_id]) for score, memory_id in best]

    def pinned(self) -> list[MemoryId]:
        return [memory_id for memory_id, entry in self.entries.items() if entry.pinned]

    def standing(self) -> Iterator[MemoryId]:
        """Statements about the user that are not pinned."""
        return (
            memory_id for memory_id, entry in self.entries.items() if entry.type in STANDING_TYPES and not entry.pinned
        )

    def _term_scores(self, term: str, among: Iterable[MemoryId] | None = None) -> list[tuple[MemoryId, float]]:
        """What the term adds to the score of each memory that has it, or of those among the given ones."""
        holders = self._postings.get(term)
        if not holders:
            return []
        found = holders.items() if among is None else [(held, holders[held]) for held in among if held in holders]
        weight = (K1 + 1) * math.log(1 + (len(self.entries) - len(holders) + 0.5) / (len(holders) + 0.5))
        shortest, per_term = K1 * (1 - B), K1 * B * len(self.entries) / self._total_length
        entries = self.entries
        return [
            (held, weight * frequency / (frequency + shortest + per_term * entries[held].length))
            for held, frequency in found
        ]

    def _put(self, record: MemoryRecord) -> None:
        """Adds a memory or takes over its change; a superseded one goes out."""
        self._unpost(record.id)
        if not record.is_current:
            self.entries.pop(record.id, None)
            return
        counts = Counter(analysis.terms(record.text))
        self.entries[record.id] = Entry(
            tuple(counts), counts.total(), record.type, frozenset(record.tags), record.pinned
        )
        self._total_length += counts.total()
        for term, frequency in counts.items():
            self._postings[term][record.id] = frequency

    def _remove(self, memory_id: MemoryId) -> int:
        removed = self._unpost(memory_id)
        self.entries.pop(memory_id, None)
        return removed

    def _unpost(self, memory_id: MemoryId) -> int:
        entry = self.entries.get(memory_id)
        if entry is None:
            return 0
        self._total_length -= entry.length
        for term in entry.terms:
            holders = self._postings[term]
            del holders[memory_id]
            if not holders:
                del self._postings[term]
        return len(entry.terms)

    def _clear(self) -> int:
        removed = sum(map(len, self._postings.values()))
        self.entries.clear()
        self._postings.clear()
        self._total_length = 0
        return removed


class Indexes:
    """The indexes of the users who asked last; others are built again when they come back."""

    def __init__(self, max_users: int = MAX_INDEXED_USERS):
        self._max_users = max_users
        self._lock = threading.Lock()
        self._indexes: OrderedDict[Principal, UserIndex] = OrderedDict()

    def __len__(self) -> int:
        return len(self._indexes)

    @contextmanager
    def current(self, user: UserReader) -> Iterator[UserIndex]:
        """The index as of the transaction or later, for the caller alone."""
        with self._lock:
            index = self._indexes.setdefault(user.who, UserIndex())
            self._indexes.move_to_end(user.who)
            if len(self._indexes) > self._max_users:
                self._indexes.popitem(last=False)
        with index.lock:
            index.catch_up(user)
            yield index

    def drop_removed(self, user: UserReader) -> int:
        """After a deletion: how many postings it took out of the index, if the user has one."""
        with self._lock:
            index = self._indexes.get(user.who)
        if index is None:
            return 0
        with index.lock:
            return index.catch_up(user)
