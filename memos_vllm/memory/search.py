"""Search within one user's memories: an index in memory that follows the store.

The index is a copy. The store is the truth, and its change log tells the index what it missed, whichever
process wrote it. A memory is a row of numbers in every structure here, its *slot*: postings and lengths
(``lexical``), vectors (``vectors``), neighbours in its conversation (``neighbours``). A change takes a new
slot; the old one is passed over, and closed once half of them are such. What was deleted goes at once.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
import numpy.typing as npt

from memos_vllm.memory import analysis, filters, fusion, tables, times
from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.filters import Filter
from memos_vllm.memory.lexical import Lexical, Scores, TermScores
from memos_vllm.memory.query import Match, Query
from memos_vllm.memory.records import STANDING_TYPES, MemoryRecord
from memos_vllm.memory.transactions import UserReader
from memos_vllm.memory.vectors import NUM_CANDIDATES, Similarities, Vector, Vectors
from memos_vllm.types import MemoryId

_MIN_DEAD_SLOTS = 64
_NEVER = float("inf")

_STANDS_OUT = 1.0
"""Standard deviations above the mean similarity. Every vector is similar to every other one to some degree;
without a bound each query would find as many memories as it may, whatever it asks."""


@dataclass(slots=True)
class Entry:
    """What the index knows of one memory beside its numbers."""

    slot: int
    type: str
    pinned: bool
    session: str | None
    num_terms: int


@dataclass(frozen=True, slots=True)
class _Ranking:
    """What one query makes of every slot."""

    matched: Sequence[TermScores]
    retrieved: Mapping[str, Scores]
    scores: Scores
    found: npt.NDArray[np.bool_]

    def match(self, memory_id: MemoryId, slot: int) -> Match:
        why = {
            "method": "bm25" if len(self.retrieved) == 1 else "hybrid",
            "retrievers": {name: _standing(of, slot) for name, of in self.retrieved.items() if of[slot]},
            "terms": {each.term: part for each in self.matched if (part := each.of(slot))},
        }
        return Match(memory_id, float(self.scores[slot]), why)


class UserIndex:
    """One user's current memories. Callers hold ``lock`` while they use it."""

    def __init__(self, embedder: Embedder | None = None) -> None:
        self.lock = threading.Lock()
        self._embedder = embedder
        self._entries: dict[MemoryId, Entry] = {}
        self._seq = 0
        self._clear()

    def __len__(self) -> int:
        return len(self._entries)

    def catch_up(self, user: UserReader) -> int:
        """Follows the change log to what the transaction sees; how many postings deletions took out."""
        removed = 0
        if user.seq <= self._seq:  # another thread was here with a later view
            return removed
        if self._seq == 0 or user.seq - self._seq > tables.CHANGES_KEPT:
            removed = self._clear()
            for record in user.scan():
                self._put(record, user)
        else:
            for operation, memory_id in user.changes_after(self._seq):
                if operation == tables.CLEAR:
                    removed += self._clear()
                elif operation == tables.PUT and (record := user.get(memory_id)):
                    self._put(record, user)
                else:
                    removed += self._remove(memory_id)
        self._seq = user.seq
        num_dead = self._lexical.num_slots - 1 - len(self._entries)
        if (removed and num_dead) or num_dead > max(_MIN_DEAD_SLOTS, len(self._entries)):
            self._close_gaps()
        return removed

    def rank(self, query: Query, top_k: int, wanted: Filter) -> list[Match]:
        """The best that the filter lets through, best first, newer ones first among equals.

        Found is what shares a term with the query, itself or beside it in its conversation, and what stands
        out among the user's memories as near to the query's vector.
        """
        ranking = self._ranking(query)
        return [ranking.match(self._ids[slot], int(slot)) for slot in self._best(ranking, query, top_k, wanted)]

    def rank_beside(
        self, query: Query, top_k: int, wanted: Filter, standing: Collection[MemoryId]
    ) -> tuple[list[Match], list[MemoryId]]:
        """Like ``rank``, without what stands in the prompt already; and which of that ``rank`` would have found."""
        ranking = self._ranking(query)
        best = self._best(ranking, query, top_k, replace(wanted, without=standing))
        answering = (self._ids[slot] for slot in self._best(ranking, query, top_k, wanted)) if standing else ()
        return (
            [ranking.match(self._ids[slot], int(slot)) for slot in best],
            [memory_id for memory_id in answering if memory_id in standing],
        )

    def _ranking(self, query: Query) -> _Ranking:
        matched = self._lexical.match(query.terms())
        retrieved = {"lexical": self._lexical.total(matched)}
        among = {"lexical": self._lexical.alive}
        found = retrieved["lexical"] > 0
        if query.vector is not None and len(self._vectors):
            dense = self._dense(query.vector, retrieved["lexical"])
            retrieved["dense"], among["dense"] = dense.scores, dense.sample
            found |= fusion.standardised(dense.scores, dense.sample) > _STANDS_OUT
        if times.asks_for_recent(query.text):
            retrieved["recency"], among["recency"] = self._recency(found), found
        return _Ranking(matched, retrieved, fusion.fuse(retrieved, among), found)

    def _best(self, ranking: _Ranking, query: Query, top_k: int, wanted: Filter) -> npt.NDArray[np.int64]:
        allowed = ranking.found & self._allowed(wanted, query.asked_at)
        return fusion.best_first(ranking.scores, allowed, top_k, self._ordered())

    def allowing(self, wanted: Filter, now: datetime) -> Callable[[MemoryId], bool]:
        """Tells of a memory whether the index has it and the filter lets it through."""
        allowed = self._allowed(wanted, now)

        def allows(memory_id: MemoryId) -> bool:
            entry = self._entries.get(memory_id)
            return entry is not None and bool(allowed[entry.slot])

        return allows

    def around(self, memory_id: MemoryId, steps: int) -> tuple[list[MemoryId], list[MemoryId]]:
        """What was said up to ``steps`` memories before and after it in its conversation."""
        entry = self._entries.get(memory_id)
        if entry is None:
            return [], []
        before, after = self._lexical.neighbours.around(entry.slot, steps)
        return [self._ids[slot] for slot in before], [self._ids[slot] for slot in after]

    def pinned(self) -> list[MemoryId]:
        """For every conversation; a note of one session stands in that session's alone."""
        return [id for id, entry in self._in_order() if entry.pinned and entry.type != "working"]

    def standing(self, types: Collection[str] = STANDING_TYPES) -> Iterator[MemoryId]:
        """Statements about the user that are not pinned, newest first."""
        self._in_order()
        entries = reversed(self._entries.items())
        return (memory_id for memory_id, entry in entries if entry.type in types and not entry.pinned)

    def working(self, session: str, now: datetime) -> list[MemoryId]:
        """Of the session, in the order of creation."""
        allowed = self._allowed(Filter("working", session=session), now)
        return sorted(self._ids[slot] for slot in np.flatnonzero(allowed))

    def without_vector(self) -> Mapping[MemoryId, str]:
        """Id and text of the memories that are still to be embedded."""
        return self._without_vector

    def put_vectors(self, vectors: Mapping[MemoryId, Vector]) -> None:
        """Of memories whose text may have changed meanwhile: those are left to be embedded again."""
        for memory_id, vector in vectors.items():
            if memory_id in self._entries and self._without_vector.pop(memory_id, None) is not None:
                self._vectors.put(self._entries[memory_id].slot, vector)

    def _dense(self, vector: Vector, lexical: Scores) -> Similarities:
        neighbours = self._lexical.neighbours
        spreads = self._embedder is not None and self._embedder.is_linear
        best = None if self._vectors.are_few else fusion.best_first(lexical, lexical > 0, NUM_CANDIDATES)
        dense = self._vectors.score(vector, self._lexical.num_slots, best, neighbours.reach if spreads else None)
        if not spreads:
            return dense
        # The sum of a window's words is the sum of its memories'.
        return Similarities(neighbours.spread(dense.scores).astype(np.float32), dense.sample)

    def _recency(self, found: npt.NDArray[np.bool_]) -> Scores:
        """The rank of what is found by the time at which it was said, the latest being 1."""
        places = np.flatnonzero(found)
        order = np.argsort(self._said_s[places], kind="stable")
        recency = np.zeros(len(found), np.float32)
        recency[places[order]] = np.arange(1, len(places) + 1) / max(1, len(places))
        return recency

    def _allowed(self, wanted: Filter, now: datetime) -> npt.NDArray[np.bool_]:
        num_slots = self._lexical.num_slots
        allowed = self._lexical.alive & (self._expires_s[:num_slots] > now.timestamp())
        for label in wanted.labels():
            has = np.zeros(num_slots, bool)
            has[self._lexical.holders(label)] = True
            allowed &= has
        for label in wanted.unwanted_labels():
            allowed[self._lexical.holders(label)] = False
        if wanted.said_from is not None:
            allowed &= self._said_s[:num_slots] >= wanted.said_from.timestamp()
        if wanted.said_before is not None:
            allowed &= self._said_s[:num_slots] < wanted.said_before.timestamp()
        for memory_id in wanted.without:
            if memory_id in self._entries:
                allowed[self._entries[memory_id].slot] = False
        return allowed

    def _put(self, record: MemoryRecord, user: UserReader) -> None:
        """Adds a memory or takes over its change; one that is not current goes out."""
        old = self._entries.get(record.id)
        order = self._order[old.slot] if old else -1
        self._remove(record.id)
        if not record.is_current:
            return
        counts: dict[str, int] = Counter(analysis.terms(text_of(record)))
        num_terms, length = len(counts), sum(counts.values())
        said_at = record.said_at
        for term in times.moment_terms(said_at).union(times.mentioned_terms(record.text, said_at)):
            counts[term] = 1
        for label in filters.labels_of(record):
            counts[label] = 1
        slot = self._lexical.add(counts, length)
        self._entries[record.id] = Entry(slot, record.type, record.pinned, record.session, num_terms)
        if slot >= len(self._said_s):
            self._said_s = np.resize(self._said_s, 2 * slot)
            self._expires_s = np.resize(self._expires_s, 2 * slot)
            self._order = np.resize(self._order, 2 * slot)
        if record.id > self._last_id:
            self._last_id, order, self._next_order = record.id, self._next_order, self._next_order + 1
        else:
            self._is_in_order = False
            self._is_order_known &= old is not None
        self._order[slot] = order
        self._ids.append(record.id)
        self._said_s[slot] = said_at.timestamp()
        frozen = record.state == "frozen"
        self._expires_s[slot] = record.expires_at.timestamp() if record.expires_at and not frozen else _NEVER
        if record.session is not None:
            self._place(slot, record.session)
        if self._embedder is not None:
            stored = self._embedder.decode(user.row("vectors", uuid.UUID(record.id).bytes))
            if stored is None:
                self._without_vector[record.id] = text_of(record)
            else:
                self._vectors.put(slot, stored)

    def _place(self, slot: int, session: str) -> None:
        """Into the chain of its conversation, by the order of ids."""
        after, at = 0, self._last_of.get(session, 0)
        while at and self._ids[at] > self._ids[slot]:
            after, at = at, self._lexical.neighbours.before(at)
        if at:
            self._lexical.neighbours.link(at, slot)
        elif after:
            self._lexical.neighbours.link_first(slot, after)
        if not after:
            self._last_of[session] = slot

    def _remove(self, memory_id: MemoryId) -> int:
        """How many terms it had; 0 where the index does not have it."""
        entry = self._entries.pop(memory_id, None)
        if entry is None:
            return 0
        if entry.session is not None and self._last_of.get(entry.session) == entry.slot:
            if before := self._lexical.neighbours.before(entry.slot):
                self._last_of[entry.session] = before
            else:
                del self._last_of[entry.session]
        self._lexical.remove(entry.slot)
        self._vectors.remove(entry.slot)
        self._without_vector.pop(memory_id, None)
        return entry.num_terms

    def _close_gaps(self) -> None:
        """Numbers the slots anew, without those that are out; nothing of a removed memory is left."""
        old_slots = np.array([entry.slot for entry in self._entries.values()], np.int64)
        old_slots.sort()
        new_slots = np.zeros(self._lexical.num_slots, np.int64)
        new_slots[old_slots] = np.arange(1, len(old_slots) + 1)
        self._lexical = self._lexical.renumbered(new_slots, len(old_slots) + 1)
        self._vectors = self._vectors.renumbered(new_slots, len(old_slots) + 1)
        self._ids = [self._ids[0], *(self._ids[slot] for slot in old_slots)]
        kept = np.concatenate([[0], old_slots])
        self._said_s, self._expires_s, self._order = self._said_s[kept], self._expires_s[kept], self._order[kept]
        self._last_of = {session: int(new_slots[slot]) for session, slot in self._last_of.items()}
        for entry in self._entries.values():
            entry.slot = int(new_slots[entry.slot])

    def _clear(self) -> int:
        removed = sum(entry.num_terms for entry in self._entries.values())
        self._entries.clear()
        self._lexical = Lexical()
        self._vectors = Vectors(self._embedder.num_dims if self._embedder else 1)
        self._without_vector: dict[MemoryId, str] = {}
        self._ids = [MemoryId("")]  # of slot 0
        self._said_s = np.zeros(16)
        self._expires_s = np.zeros(16)
        self._order = np.zeros(16, np.int64)  # of creation
        self._next_order = 0
        self._last_of: dict[str, int] = {}  # conversation -> its last slot
        self._last_id = MemoryId("")
        self._is_in_order = True  # the entries
        self._is_order_known = True  # of every slot
        return removed

    def _ordered(self) -> npt.NDArray[np.int64]:
        """The order of creation. [num slots]"""
        if not self._is_order_known:  # an old memory came back
            for place, (_, entry) in enumerate(self._in_order()):
                self._order[entry.slot] = place
            self._next_order = len(self._entries)
            self._is_order_known = True
        return self._order[: self._lexical.num_slots]

    def _in_order(self) -> Iterator[tuple[MemoryId, Entry]]:
        """In the order of creation, which is that of the ids."""
        if not self._is_in_order:
            self._entries = dict(sorted(self._entries.items()))
            self._is_in_order = True
        return iter(self._entries.items())


def text_of(record: MemoryRecord) -> str:
    """What is indexed and embedded: who said it, where that is known, what, and other words for it."""
    speaker, keys = record.origin.get("speaker"), record.origin.get("keys") or ()
    return " ".join([f"{speaker}: {record.text}" if speaker else record.text, *map(str, keys)])


def _standing(scores: Scores, slot: int) -> dict[str, float | int]:
    return {"rank": 1 + int(np.count_nonzero(scores > scores[slot])), "score": float(scores[slot])}
