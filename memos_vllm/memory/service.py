"""The memory service: what the HTTP layer calls. Every call is for one user and thread-safe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from memos_vllm.config import MemoryConfig
from memos_vllm.errors import NotFound, RequestError, StoreError
from memos_vllm.memory import inputs, records, sessions
from memos_vllm.memory.extraction import extract
from memos_vllm.memory.messages import last_user_text
from memos_vllm.memory.recall import Budget, fitting, long_lived
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.remembering import keep
from memos_vllm.memory.results import DeletionReceipt, Hit, Page, Recall
from memos_vllm.memory.search import Indexes, UserIndex
from memos_vllm.memory.store import MemoryStore
from memos_vllm.memory.transactions import Removed, UserReader, UserWriter
from memos_vllm.types import MemoryId, Principal

logger = logging.getLogger(__name__)
Message = Mapping[str, Any]


def estimate_tokens(text: str) -> int:
    """About four bytes of UTF-8 to a token; for where no tokenizer is at hand."""
    return -(-len(text.encode("utf-8", "replace")) // 4)


class MemoryService:
    """
    Args:
        count_tokens: with the served model's tokenizer, for the budgets.
        now: the time in UTC; tests set it.

    All calls that write raise ``StoreFull`` where there is no room and ``StoreError`` where LMDB
    fails; nothing of the write is then stored. All raise ``RequestError`` for bad input.
    """

    def __init__(
        self,
        store: MemoryStore,
        config: MemoryConfig,
        count_tokens: Callable[[str], int] = estimate_tokens,
        now: Callable[[], datetime] = records.utc_now,
    ):
        self._store = store
        self._config = config
        self._count_tokens = count_tokens
        self._now = now
        self._indexes = Indexes()

    def add(
        self,
        who: Principal,
        text: str,
        *,
        type: str = "fact",
        pinned: bool = False,
        tags: Iterable[str] = (),
        session: str | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> MemoryRecord:
        """Stores a text as it is: no deduplication, nothing is superseded."""
        values = inputs.check_memory(
            {"text": text, "type": type, "pinned": pinned, "tags": tags, "session": session, "origin": origin}
        )
        return self._store.write(who, lambda user: user.insert(self._now(), **values))

    def add_many(self, who: Principal, memories: Iterable[Mapping[str, Any]]) -> Sequence[MemoryRecord]:
        """Like ``add`` for each, in one transaction: all are stored, or none.

        Args:
            memories: the arguments of ``add`` by name, at most ``inputs.MAX_BATCH``.
        """
        checked = inputs.check_batch(memories)

        def insert(user: UserWriter) -> Sequence[MemoryRecord]:
            now = self._now()
            return [user.insert(now, **values) for values in checked]

        return self._store.write(who, insert)

    def get(self, who: Principal, memory_id: str) -> MemoryRecord:
        """
        Raises:
            NotFound: the user has no such memory; whether somebody else has does not show.
        """
        with self._store.read(who) as user:
            return _existing(user, memory_id)

    def list(
        self,
        who: Principal,
        *,
        limit: int = 100,
        after: str | None = None,
        type: str | None = None,
        tag: str | None = None,
        session: str | None = None,
        include_superseded: bool = False,
    ) -> Page:
        """Memories in the order of creation, from the first one after the id ``after``."""
        inputs.check_limit(limit)
        wanted = _filter(type, tag)
        start = records.NO_ID if after is None else records.parse_id(after)
        if start is None:
            raise RequestError(f"'after' must be the 'next' of the page before, not {after!r}")
        found: list[MemoryRecord] = []
        with self._store.read(who) as user:
            for record in user.scan(start):
                if not (record.is_current or include_superseded) or session not in (None, record.session):
                    continue
                if wanted(record.type, record.tags):
                    found.append(record)
                if len(found) > limit:
                    return Page(tuple(found[:limit]), found[limit - 1].id)
        return Page(tuple(found), None)

    def history(self, who: Principal, memory_id: str) -> Sequence[MemoryRecord]:
        """What became this memory, oldest first: what it superseded, its earlier versions, itself.

        Raises:
            NotFound: see ``get``.
        """
        with self._store.read(who) as user:
            record: MemoryRecord | None = _existing(user, memory_id)
            newest_first: list[MemoryRecord] = []
            while record is not None:
                newest_first += [record, *reversed(tuple(user.versions(record.id)))]
                record = user.get(record.supersedes) if record.supersedes else None
        return newest_first[::-1]

    def update(
        self,
        who: Principal,
        memory_id: str,
        *,
        text: str | None = None,
        type: str | None = None,
        pinned: bool | None = None,
        tags: Iterable[str] | None = None,
    ) -> MemoryRecord:
        """Changes what is not None. A new text makes the KV of the old one unreachable.

        Raises:
            NotFound: see ``get``.
        """
        checks = {
            "text": (text, inputs.check_text),
            "type": (type, inputs.check_type),
            "pinned": (pinned, inputs.check_pinned),
            "tags": (tags, inputs.check_tags),
        }
        values = {name: check(value) for name, (value, check) in checks.items() if value is not None}

        def change(user: UserWriter) -> MemoryRecord:
            old = _existing(user, memory_id)
            if values.get("text", old.text) != old.text:
                user.new_kv_epoch()
            return user.change(old, self._now(), **values)

        return self._store.write(who, change)

    def delete(self, who: Principal, memory_id: str) -> DeletionReceipt:
        """Removes a memory with its history.

        Raises:
            NotFound: see ``get``.
        """

        def remove(user: UserWriter) -> tuple[Removed, int]:
            _existing(user, memory_id)
            return user.remove(memory_id), user.kv_epoch

        return self._receipt(who, *self._store.write(who, remove, frees=True))

    def delete_all(self, who: Principal) -> DeletionReceipt:
        """Removes all memories, histories and sessions of the user."""
        return self._receipt(who, *self._store.write(who, lambda user: (user.remove_all(), user.kv_epoch), frees=True))

    def search(
        self, who: Principal, query: str, *, top_k: int | None = None, type: str | None = None, tag: str | None = None
    ) -> Sequence[Hit]:
        """The current memories that share terms with the query, best first."""
        if not isinstance(query, str):
            raise RequestError(f"'query' must be a string, not {query.__class__.__name__}")
        wanted = _filter(type, tag)
        top_k = self._config.top_k if top_k is None else inputs.check_limit(top_k, "top_k")
        with self._store.read(who) as user, self._indexes.current(user) as index:
            return _hits(user, index, query, top_k, lambda _, entry: wanted(entry.type, entry.tags))

    def recall(
        self, who: Principal, messages: Sequence[Message], *, session: str | None = None, top_k: int | None = None
    ) -> Recall:
        """What belongs into the prompt of these messages; see ``memory.recall`` for the rules.

        With a session, the choice of long-lived memories is that of the session's first recall, in
        every process; texts are current, and what was deleted or superseded is gone.
        """
        session = inputs.check_session(session)
        top_k = self._config.top_k if top_k is None else inputs.check_limit(top_k, "top_k")
        ids = self._frozen_ids(who, session) if session else None
        with self._store.read(who) as user, self._indexes.current(user) as index:
            if ids is None:
                standing = self._long_lived(user, index)
            else:
                found = (user.get(memory_id) for memory_id in ids)
                standing = [record for record in found if record and record.is_current]
            shown = {record.id for record in standing}
            query = last_user_text(messages)
            hits = _hits(user, index, query, top_k, lambda memory_id, _: memory_id not in shown)
        budget = Budget(self._config.late_tokens, self._count_tokens)
        return Recall(tuple(standing), tuple(fitting(hits, budget)))

    def remember(
        self,
        who: Principal,
        messages: Sequence[Message],
        *,
        session: str | None = None,
        request: str | None = None,
    ) -> Sequence[MemoryRecord]:
        """Stores what is worth keeping of the last user message (``memory.extraction``), all or nothing.

        See ``memory.remembering`` for what happens to repetitions and contradictions.

        Returns:
            A record per statement, new or known.
        """
        session = inputs.check_session(session)
        kept = extract(last_user_text(messages))
        for extracted in kept:
            inputs.check_text(extracted.text, "message")
        if not kept:
            return []
        origin = {"source": "chat", "role": "user", "session": session, "request": request}
        return self._store.write(who, lambda user: [keep(user, extracted, origin, self._now()) for extracted in kept])

    def kv_epoch(self, who: Principal) -> int:
        """Grows when text was deleted or changed; part of the user's KV salt."""
        with self._store.read(who) as user:
            return user.kv_epoch

    def stats(self) -> dict[str, int]:
        """Counts over all users; sizes in bytes."""
        return {**self._store.stats(), "indexed_users": len(self._indexes)}

    def _frozen_ids(self, who: Principal, session: str) -> Sequence[MemoryId] | None:
        """The session's choice, made now if it has none; None if it cannot be written down."""
        now, ttl_s = self._now(), self._config.session_ttl_s
        with self._store.read(who) as user:
            frozen = user.session(session)
            if frozen and not frozen.is_over(now, ttl_s) and not frozen.needs_touch(now, ttl_s):
                return frozen.ids
            with self._indexes.current(user) as index:
                chosen = [record.id for record in self._long_lived(user, index)]

        def freeze(user: UserWriter) -> Sequence[MemoryId]:
            known = user.session(session)  # another process may have been faster
            user.drop_sessions(now, ttl_s)
            ids = known.ids if known and not known.is_over(now, ttl_s) else chosen
            user.put_session(session, sessions.freeze(ids, now))
            return ids

        try:
            return self._store.write(who, freeze)
        except StoreError as error:  # a full store must not stop the chat
            logger.warning("the session of a recall could not be kept: %s", error)
            return frozen.ids if frozen else None

    def _long_lived(self, user: UserReader, index: UserIndex) -> Sequence[MemoryRecord]:
        return long_lived(user, index, Budget(self._config.long_lived_tokens, self._count_tokens))

    def _receipt(self, who: Principal, removed: Removed, kv_epoch: int) -> DeletionReceipt:
        with self._store.read(who) as user:
            postings = self._indexes.drop_removed(user)
        return DeletionReceipt(tuple(removed.ids), removed.versions, postings, removed.sessions, kv_epoch)


def _existing(user: UserReader, memory_id: str) -> MemoryRecord:
    record = user.get(memory_id)
    if record is None:
        raise NotFound(f"no memory {memory_id!r}")
    return record


def _filter(type: str | None, tag: str | None) -> Callable[[str, Iterable[str]], bool]:
    if type is not None:
        inputs.check_type(type)
    return lambda has_type, has_tags: type in (None, has_type) and (tag is None or tag in has_tags)


def _hits(user: UserReader, index: UserIndex, query: str, top_k: int, accept: Callable[..., bool]) -> list[Hit]:
    hits = []
    for match in index.rank(query, top_k, accept):
        if record := user.get(match.id):  # None: deleted between this transaction and the index
            hits.append(Hit(record, match.score, {"method": "bm25", "terms": match.terms}))
    return hits
