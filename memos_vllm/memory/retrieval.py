"""Retrieval: from a question to the memories that may answer it.

The index ranks by words, times and vectors (``search``); links between memories bring in what they lead to,
and a hit may come with what was said around it. The question is embedded before any transaction begins: an
embedder may be slow, or away, and then the words decide alone.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice

import numpy as np
import numpy.typing as npt

from memos_vllm.errors import EmbedderError, EmbedderRefused, StoreError
from memos_vllm.memory import links
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.backlog import Backlog
from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.filters import Filter
from memos_vllm.memory.indexes import Indexes
from memos_vllm.memory.neighbours import WEIGHT_PER_STEP
from memos_vllm.memory.query import Match, Query
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.results import Hit
from memos_vllm.memory.search import UserIndex, text_of
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.memory.vectors import Vector
from memos_vllm.types import MemoryId, Principal

logger = logging.getLogger(__name__)

_EMBED_BATCH = 64
"""So many texts at most are embedded before a question is; the rest of a user's follows meanwhile."""

_QUICK_BATCH = 1024
"""Of an embedder that makes a vector as fast as it could be read; nothing of it is left for later."""

RETRY_AFTER_S = 30.0
"""An embedder that failed is left alone for so long: a server that is away would cost every question its
time-out."""


class Retrieval:
    """
    Args:
        embedder: None for words, times and links alone.
        monotonic_s: a clock that never goes back; tests set it.
    """

    def __init__(
        self,
        store: Store,
        indexes: Indexes,
        embedder: Embedder | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ):
        self._store = store
        self._indexes = indexes
        self._embedder = embedder
        self._monotonic_s = monotonic_s
        self._left_alone_until_s = -math.inf
        self.embedder_failures = 0
        """Since the start. After each, search goes by words alone for ``RETRY_AFTER_S``."""

        self._backlog = Backlog("memos-embedding", self._embed_rest)

    def query(self, who: Principal, text: str, asked_at: datetime) -> Query:
        """A question with its embedding; not within a transaction. Embeds what is new of the user's before, if that
        is not much."""
        return Query(text, asked_at, self._embed_query(who, text) if self._embedder and text.strip() else None)

    def hits(
        self, user: UserReader, index: UserIndex, query: Query, top_k: int, wanted: Filter, context: int = 0
    ) -> list[Hit]:
        """The best memories that the filter lets through, best first.

        Args:
            context: how many memories before and after each hit, in its conversation, come with it.
        """
        return self._hits(user, index, query, index.rank(query, top_k, wanted), top_k, wanted, context)

    def hits_beside(
        self, user: UserReader, index: UserIndex, query: Query, top_k: int, standing: Collection[MemoryId]
    ) -> tuple[list[Hit], list[MemoryId]]:
        """For a prompt: the best beside what stands in it, and which of that would have been among the best."""
        wanted = Filter(for_prompt=True)
        matches, answering = index.rank_beside(query, top_k, wanted, standing)
        return self._hits(user, index, query, matches, top_k, replace(wanted, without=standing)), answering

    def _hits(
        self,
        user: UserReader,
        index: UserIndex,
        query: Query,
        matches: list[Match],
        top_k: int,
        wanted: Filter,
        context: int = 0,
    ) -> list[Hit]:
        matches = self._with_linked(user, index, matches, query, wanted)[:top_k]
        may_stand_around = Filter(archived=wanted.archived, for_prompt=wanted.for_prompt)
        allows = index.allowing(may_stand_around, query.asked_at) if context else None
        found = []
        for match in matches:
            record = user.get(match.id)
            if record is None:  # deleted between this transaction and the index
                continue
            sides = index.around(match.id, context) if allows else ((), ())
            before, after = (_records(user, filter(allows, side)) for side in sides)
            found.append(Hit(record, match.score, match.why, before, after))
        return found

    def prepare(self, who: Principal) -> None:
        """Embeds what is new of the user's, or begins to, so that the next query need not."""
        try:
            if not self._is_left_alone():
                self._embed_new(who)
        except EmbedderError as error:
            self._leave_alone(error)

    def _embed_query(self, who: Principal, text: str) -> Vector | None:
        assert self._embedder is not None
        if self._is_left_alone():
            return None
        try:
            self._embed_new(who)
            return self._embedder.embed_query(text)
        except EmbedderRefused as error:
            logger.info("a question is answered by words alone: %s", error)
        except EmbedderError as error:
            self._leave_alone(error)
        return None

    def _embed_new(self, who: Principal) -> None:
        """Of an embedder that is not quick a batch, without what it refuses; the backlog has the rest.

        Raises:
            EmbedderError: the embedder failed.
        """
        embedder = self._embedder
        if embedder is None or who in self._backlog:
            return
        try:
            while is_left := self._embed_batch(who, embedder.embed):
                if embedder.is_stored:
                    break
        except EmbedderRefused:
            is_left = True
        if is_left:
            self._backlog.add(who)

    def _embed_rest(self, who: Principal) -> bool:
        """A batch of what no request waits for; whether more is left."""
        try:
            return not self._is_left_alone() and self._embed_batch(who, self._embed_each)
        except EmbedderError as error:
            self._leave_alone(error)
            return False

    def _embed_batch(self, who: Principal, embed: Callable[[Sequence[str]], npt.NDArray[np.float32]]) -> bool:
        """Embeds memories that have no vector, and stores the vectors; whether more are without."""
        assert self._embedder is not None
        size = _EMBED_BATCH if self._embedder.is_stored else _QUICK_BATCH
        with self._store.read(who) as user, self._indexes.current(user) as index:
            missing = list(islice(index.without_vector().items(), size))
        if not missing:
            return False
        rows = embed([text for _, text in missing])
        vectors = {memory_id: row for (memory_id, _), row in zip(missing, rows, strict=True)}
        texts = dict(missing)
        with self._store.read(who) as user, self._indexes.current(user) as index:
            now_missing = index.without_vector()
            vectors = {id: row for id, row in vectors.items() if now_missing.get(id) == texts[id]}
            index.put_vectors(vectors)
            is_left = bool(index.without_vector())
        if self._embedder.is_stored:
            self._keep(who, vectors, texts)
        return is_left

    def _embed_each(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """All that the embedder takes; a text that it refuses has zeros, which say nothing. [num texts, num dims]"""
        assert self._embedder is not None
        try:
            return self._embedder.embed(texts)
        except EmbedderRefused as error:
            if len(texts) == 1:
                logger.info("a memory is found by words alone: %s", error)
                return np.zeros((1, self._embedder.num_dims), np.float32)
            middle = len(texts) // 2
            return np.concatenate([self._embed_each(texts[:middle]), self._embed_each(texts[middle:])])

    def _is_left_alone(self) -> bool:
        return self._monotonic_s() < self._left_alone_until_s

    def _leave_alone(self, error: EmbedderError) -> None:
        logger.warning("memory is searched by words alone for %g s: %s", RETRY_AFTER_S, error)
        self._left_alone_until_s = self._monotonic_s() + RETRY_AFTER_S
        self.embedder_failures += 1

    def _keep(self, who: Principal, vectors: Mapping[MemoryId, Vector], texts: Mapping[MemoryId, str]) -> None:
        embedder = self._embedder
        assert embedder is not None

        def put(user: UserWriter) -> None:
            for memory_id, vector in vectors.items():
                record = user.get(memory_id)
                if record is not None and text_of(record) == texts[memory_id]:  # it may have changed meanwhile
                    user.put_row("vectors", uuid.UUID(memory_id).bytes, embedder.encode(vector))

        try:
            self._store.write(who, put)
        except StoreError as error:  # they are made again after a restart
            logger.warning("vectors could not be kept: %s", error)

    def _with_linked(
        self, user: UserReader, index: UserIndex, matches: list[Match], query: Query, wanted: Filter
    ) -> list[Match]:
        """Adds what the matches are linked with, one step away, at the weight of a neighbour one step away."""
        known = {match.id for match in matches}
        allows = None
        linked: dict[MemoryId, Match] = {}
        for match in matches:
            for link in links.of(user, match.id):
                other = link.target if link.source == match.id else link.source
                if other in known or other in linked or not link.is_valid(query.asked_at):
                    continue
                allows = allows or index.allowing(wanted, query.asked_at)
                if allows(other):
                    why = {**match.why, "retrievers": {"link": {"from": match.id, "type": link.type}}, "terms": {}}
                    linked[other] = Match(other, match.score * WEIGHT_PER_STEP, why)
        if not linked:
            return matches
        return sorted([*matches, *linked.values()], key=lambda match: -match.score)


def _records(user: UserReader, ids: Iterable[MemoryId]) -> tuple[MemoryRecord, ...]:
    found = (user.get(memory_id) for memory_id in ids)
    return tuple(record for record in found if record is not None)
