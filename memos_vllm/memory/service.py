"""The memory service: what the HTTP layer calls. Every call is for one user and thread-safe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from memos_vllm.config import MemoryConfig
from memos_vllm.core.lifecycle import OVER, State
from memos_vllm.errors import Conflict, RequestError, StoreError
from memos_vllm.memory import inputs, own_words, records, removal, sessions, succession, tables, tool_use
from memos_vllm.memory.abstract_store import Store, StoreSize
from memos_vllm.memory.documents.library import Library
from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.extraction import extract
from memos_vllm.memory.filters import Filter
from memos_vllm.memory.holdings import KEY_BYTES, Holdings
from memos_vllm.memory.indexes import Indexes
from memos_vllm.memory.life import MemoryLife, existing
from memos_vllm.memory.limits import UserLimits
from memos_vllm.memory.messages import last_user_message, last_user_text
from memos_vllm.memory.portability import Portability
from memos_vllm.memory.prepared import PreparedChoices
from memos_vllm.memory.recall import Budget, chosen, fitting, long_lived, num_left_out, succeeded
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.refining import Refining
from memos_vllm.memory.remembering import keep
from memos_vllm.memory.removal import Removed
from memos_vllm.memory.results import DeletionReceipt, Hit, Page, Prepared, Recall, UsersPage
from memos_vllm.memory.retrieval import Retrieval
from memos_vllm.memory.search import UserIndex
from memos_vllm.memory.transactions import UserReader, UserWriter
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
        embedder: for the dense part of search; without one it goes by words, times and links.
        keeps_editions: whether what a document said before stays in the history.

    All calls that write raise ``StoreFull`` where there is no room and ``StoreError`` where the store
    fails, those that add raise ``LimitReached`` where the user would have too much; nothing of the write is
    then stored. All raise ``RequestError`` for bad input.
    """

    def __init__(
        self,
        store: Store,
        config: MemoryConfig,
        count_tokens: Callable[[str], int] = estimate_tokens,
        now: Callable[[], datetime] = records.utc_now,
        embedder: Embedder | None = None,
        keeps_editions: bool = True,
    ):
        self._store = store
        self._config = config
        self._count_tokens = count_tokens
        self._now = now
        self._indexes = Indexes(embedder)
        self._retrieval = Retrieval(store, self._indexes, embedder)
        self.limits = UserLimits.of(config)
        self.life = MemoryLife(store, now, self.limits)
        self.refining = Refining(store, config.refiner, count_tokens, now, self.limits)
        self._prepared = PreparedChoices()
        self.portability = Portability(store, now, self.limits, self._take_in)
        self.documents = Library(
            store, config.documents, now, self._receipt, self._take_in, self.limits, keeps_history=keeps_editions
        )

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
        **more: Any,
    ) -> MemoryRecord:
        """Stores a text as it is: no deduplication, nothing is superseded.

        Args:
            more: ``priority``, ``sensitivity``, ``valid_from`` (since when it is true, if not now) and
                ``ttl_s`` (seconds from now, after which it expires).
        """
        values = inputs.check_memory(
            {"text": text, "type": type, "pinned": pinned, "tags": tags, "session": session, "origin": origin, **more}
        )
        return self._add_checked(who, [values])[0]

    def add_many(self, who: Principal, memories: Iterable[Mapping[str, Any]]) -> Sequence[MemoryRecord]:
        """Like ``add`` for each, in one transaction: all are stored, or none.

        Args:
            memories: the arguments of ``add`` by name, at most ``inputs.MAX_BATCH``.
        """
        return self._add_checked(who, inputs.check_batch(memories))

    def _add_checked(self, who: Principal, checked: Sequence[Mapping[str, Any]]) -> Sequence[MemoryRecord]:
        def insert(user: UserWriter) -> Sequence[MemoryRecord]:
            now = self._now()
            added = [self._insert(user, now, values) for values in checked]
            self._note_addition(user, now)
            return added

        return self._store.write(who, insert)

    def get(self, who: Principal, memory_id: str) -> MemoryRecord:
        """
        Raises:
            NotFound: the user has no such memory; whether somebody else has does not show.
        """
        with self._store.read(who) as user:
            return existing(user, memory_id)

    def distillable(self, who: Principal, memory_id: str) -> MemoryRecord:
        """
        Raises:
            NotFound: see ``get``.
            Conflict: it may not go into an adapter's weights, or not any more.
        """
        record = self.get(who, memory_id)
        if not record.is_distillable(self._now()):
            raise Conflict(
                f"the memory {memory_id} cannot be distilled: an adapter takes facts, preferences and profiles that "
                "are in recall, neither sensitive nor expired nor superseded"
            )
        return record

    def list(
        self,
        who: Principal,
        *,
        limit: int = 100,
        after: str | None = None,
        type: str | None = None,
        tag: str | None = None,
        session: str | None = None,
        state: str | None = None,
        include_superseded: bool = False,
    ) -> Page:
        """Memories in the order of creation, from the first one after the id ``after``.

        Those that are current, archived ones among them; what is merged or expired, if ``state`` asks for it.

        Args:
            include_superseded: what is not current, too: with no filter, all that the user has.
        """
        inputs.check_limit(limit)
        if state is not None and state not in list(State):
            raise RequestError(f"unknown state {state!r}; use one of {', '.join(State)}")
        wanted = _filter(type, tag)
        with_past = include_superseded or state in OVER
        start = records.NO_ID if after is None else records.parse_id(after)
        if start is None:
            raise RequestError(f"'after' must be the 'next' of the page before, not {after!r}")
        found: list[MemoryRecord] = []
        with self._store.read(who) as user:
            for record in user.scan(start):
                if not (record.is_current or with_past) or session not in (None, record.session):
                    continue
                if state not in (None, record.state):
                    continue
                if wanted(record.type, record.tags):
                    found.append(record)
                if len(found) > limit:
                    return Page(tuple(found[:limit]), found[limit - 1].id)
        return Page(tuple(found), None)

    def history(self, who: Principal, memory_id: str) -> Sequence[MemoryRecord]:
        """What became this memory, oldest first: what it superseded or took over, its earlier versions, itself.

        Raises:
            NotFound: see ``get``.
        """
        with self._store.read(who) as user:
            return succession.history(user, existing(user, memory_id))

    def update(self, who: Principal, memory_id: str, **changes: Any) -> MemoryRecord:
        """A new version with the changes, or the memory as it is where it has all these values already.

        A new text makes the KV of the old one unreachable.

        What a model made of it is archived with a new text; sensitivity and end of life become its own, too.

        Args:
            changes: ``inputs.CHANGEABLE``, by name.

        Raises:
            NotFound: see ``get``.
            Conflict: it is frozen.
        """
        values = inputs.check_changes(changes)

        def change(user: UserWriter) -> MemoryRecord:
            now, old = self._now(), existing(user, memory_id)
            if old.state is State.FROZEN:
                raise Conflict(f"the memory {memory_id} is frozen; set its state to 'activated' to change it")
            if values.get("text", old.text) != old.text:
                user.new_kv_epoch()
                succession.archive_restated(user, old, now)
            ended = _with_end(values, now)
            limits = {name: value for name, value in ended.items() if name in ("sensitivity", "expires_at")}
            derived = succession.restated(user, old) if limits else []
            changed = [user.change(each, now, **limits) for each in derived if _differs(each, limits)]
            new = user.change(old, now, **ended) if _differs(old, ended) else old
            if changed or new is not old:
                user.was_used(now)
            if not _only_lessens(old, new):
                self.limits.check(user)
            return new

        return self._store.write(who, change)

    def delete(self, who: Principal, memory_id: str) -> DeletionReceipt:
        """Removes a memory with its history.

        Raises:
            NotFound: see ``get``.
        """

        def remove(user: UserWriter) -> tuple[Removed, int]:
            existing(user, memory_id)
            return removal.remove(user, memory_id), user.kv_epoch

        return self._receipt(who, *self._store.write(who, remove, frees=True))

    def delete_all(self, who: Principal) -> DeletionReceipt:
        """Removes all memories, histories and sessions of the user."""
        return self._receipt(
            who, *self._store.write(who, lambda user: (removal.remove_all(user), user.kv_epoch), frees=True)
        )

    def drop_kv(self, who: Principal) -> None:
        """Makes the user's KV unreachable, and due for removal. Nothing else changes."""
        self._store.write(who, lambda user: user.new_kv_epoch())

    def search(
        self,
        who: Principal,
        query: str,
        *,
        top_k: int | None = None,
        type: str | None = None,
        tag: str | None = None,
        tags: Iterable[str] = (),
        session: str | None = None,
        cube: str | None = None,
        said_from: datetime | None = None,
        said_before: datetime | None = None,
        include_archived: bool = False,
        context: int = 0,
        max_tokens: int | None = None,
    ) -> Sequence[Hit]:
        """The user's current memories that answer the query best, best first; see ``memory.retrieval``.

        Args:
            tag, tags: a memory must have all of them.
            said_from, said_before: when it was said, or since when it is true.
            context: how many memories before and after each hit, in its conversation, come with it.
            max_tokens: the hits that fit into a budget, their context not counted.
        """
        if not isinstance(query, str):
            raise RequestError(f"'query' must be a string, not {query.__class__.__name__}")
        wanted = Filter(
            type=None if type is None else inputs.check_type(type),
            tags=inputs.check_tags([*([] if tag is None else [tag]), *tags]),
            session=inputs.check_session(session),
            cube=cube,
            said_from=said_from,
            said_before=said_before,
            archived=include_archived,
        )
        top_k = self._config.top_k if top_k is None else inputs.check_limit(top_k, "top_k")
        context = inputs.check_context(context)
        asked = self._retrieval.query(who, query, self._now())
        with self._store.read(who) as user, self._indexes.current(user) as index:
            hits = self._retrieval.hits(user, index, asked, top_k, wanted, context)
        return hits if max_tokens is None else fitting(hits, Budget(max_tokens, self._count_tokens))

    def recall(
        self,
        who: Principal,
        messages: Sequence[Message],
        *,
        session: str | None = None,
        top_k: int | None = None,
        count_left_out: bool = False,
    ) -> Recall:
        """What belongs into the prompt of these messages; see ``memory.recall`` for the rules.

        With a session, the choice of long-lived memories is that of the session's first recall, in
        every process; texts are current, what was superseded gave way to what superseded it, and what was
        deleted is gone.
        """
        session = inputs.check_session(session)
        top_k = self._config.top_k if top_k is None else inputs.check_limit(top_k, "top_k")
        ids = self._frozen_ids(who, session) if session else None
        now = self._now()
        asked = self._retrieval.query(who, last_user_text(messages), now)
        with self._store.read(who) as user, self._indexes.current(user) as index:
            if ids is None:
                standing = self._long_lived(user, index)
            else:
                room = Budget(self._config.long_lived_tokens, self._count_tokens)
                standing = chosen(user, succeeded(user, ids), room, now)
            stand = {record.id for record in standing}
            hits, answering = self._retrieval.hits_beside(user, index, asked, top_k, stand)
            left_out = num_left_out(user, index, stand, now) if count_left_out else None
            noted = [user.get(memory_id) for memory_id in (index.working(session, now) if session else ())]
        working = [Hit(record, 0.0, {"method": "session"}) for record in noted if record and record.is_recallable(now)]
        budget = Budget(self._config.late_tokens, self._count_tokens)
        latest = fitting(reversed(working), budget)  # where there are too many, the first of them are left out
        late = (*reversed(latest), *fitting(hits, budget))
        return Recall(tuple(standing), late, answering=tuple(answering), left_out=left_out)

    def prepare(self, who: Principal) -> Prepared:
        """Chooses the long-lived memory of the user's next session, whose first recall then need not.

        Loads the user's search index too, so that recall does not begin with it.
        """
        with self._store.read(who) as user, self._indexes.current(user) as index:
            return Prepared(tuple(self._long_lived(user, index)), user.seq, user.kv_epoch)

    def remember(
        self,
        who: Principal,
        messages: Sequence[Message],
        *,
        session: str | None = None,
        request: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        as_of: tuple[int, int] | None = None,
    ) -> Sequence[MemoryRecord]:
        """Stores what is worth keeping of the last user message (``memory.extraction``), all or nothing.

        Nothing of a message that asks not to be remembered (``memory.own_words``), nor of the calls made for it.
        See ``memory.remembering`` for what happens to repetitions and contradictions, and ``memory.tool_use``
        for what is kept of the calls of tools after the message.

        Args:
            tools: of the request, as the OpenAI API has them.
            as_of: ``memory_version`` when it was said. What was said before ``delete_all`` is not stored after it.

        Returns:
            A record per statement, tool and trajectory, new or known.
        """
        session = inputs.check_session(session)
        said = last_user_text(messages)
        if own_words.are_withheld(said):
            return []
        kept = extract(said)
        for extracted in kept:
            inputs.check_text(extracted.text, "message")
        if not kept and not tool_use.steps(messages):
            return []
        origin = {"source": "chat", "session": session, "request": request, **last_user_message(messages)}

        def store(user: UserWriter) -> Sequence[MemoryRecord]:
            if as_of is not None and user.was_cleared_since(*as_of):
                return []
            before = user.last_id
            told = [keep(user, extracted, origin, self._now()) for extracted in kept]
            for record in told:
                if record.id > before:
                    self.refining.wait(user, record)
            told += tool_use.keep(user, messages, tools, origin, self._now())
            self._note_addition(user, self._now())
            return told

        known = self._store.write(who, store)
        self._retrieval.prepare(who)
        return known

    def kv_epoch(self, who: Principal) -> int:
        """Grows when text was deleted or changed; part of the user's KV salt."""
        with self._store.read(who) as user:
            return user.kv_epoch

    def memory_version(self, who: Principal) -> tuple[int, int]:
        """``seq`` and ``kv_epoch``, as ``Prepared`` has them: which state of the user's memories this is."""
        with self._store.read(who) as user:
            return user.seq, user.kv_epoch

    def stamp(self) -> int:
        """Another whenever anything was written, by whichever process."""
        return self._store.stamp()

    def users_with_past_kv(self) -> Sequence[Principal]:
        """Of whom KV of a past epoch may still be somewhere; a crash came between, or a removal is under way."""
        return list(dict.fromkeys(who for who, _ in self._store.kv_removals()))

    def past_kv_epochs(self, who: Principal) -> Sequence[int]:
        """Epochs whose KV was not reported as removed yet, oldest first."""
        with self._store.read(who) as user:
            return [int.from_bytes(key, "big") for key, _ in user.rows("kv_removals")]

    def kv_removed(self, who: Principal, epochs: Iterable[int]) -> None:
        """The KV of these epochs is gone from every tier."""
        keys = [tables.number_key(epoch) for epoch in epochs]
        if keys:
            self._store.write(who, lambda user: [user.delete_row("kv_removals", key) for key in keys], frees=True)

    def stats(self) -> dict[str, int]:
        """Counts over all users; sizes in bytes."""
        return {**self._store.stats(), "indexed_users": len(self._indexes)}

    def holdings(self, who: Principal) -> Holdings:
        """What the user has in the store."""
        with self._store.read(who) as user:
            return user.holdings

    def users(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> UsersPage:
        """Users who have memories, from the first one after ``after``, which is the ``next`` of the page before.

        Args:
            tenant: whose; None for all tenants'.
        """
        inputs.check_limit(limit)
        place = inputs.check_place(after, KEY_BYTES)
        found = self._store.users(tenant, place, limit + 1)
        listed = tuple((who, held) for _, who, held in found[:limit])
        return UsersPage(listed, found[limit - 1][0].hex() if len(found) > limit else None)

    def store_size(self) -> StoreSize:
        return self._store.size()

    @property
    def embedder_failures(self) -> int:
        """How often the embedder failed since the start."""
        return self._retrieval.embedder_failures

    def _frozen_ids(self, who: Principal, session: str) -> Sequence[MemoryId] | None:
        """The session's choice, made now if it has none; None if it cannot be written down."""
        now, ttl_s = self._now(), self._config.session_ttl_s
        with self._store.read(who) as user:
            frozen = user.session(session)
            if frozen and not frozen.is_over(now, ttl_s) and not frozen.needs_touch(now, ttl_s):
                return frozen.ids
            with self._indexes.current(user) as index:
                now_chosen = [record.id for record in self._long_lived(user, index)]
                working = index.working(session, now)

        def freeze(user: UserWriter) -> Sequence[MemoryId]:
            for record in map(user.get, working):
                if record and record.is_current:
                    user.put(replace(record, expires_at=sessions.end_of(now, ttl_s)), record)
            known = user.session(session)  # another process may have been faster
            user.drop_sessions(now, ttl_s)
            ids = known.ids if known and not known.is_over(now, ttl_s) else now_chosen
            user.was_used(now)
            user.put_session(session, sessions.freeze(ids, now))
            return ids

        try:
            return self._store.write(who, freeze)
        except StoreError as error:  # a full store must not stop the chat
            logger.warning("the session of a recall could not be kept: %s", error)
            return frozen.ids if frozen else None

    def _long_lived(self, user: UserReader, index: UserIndex) -> Sequence[MemoryRecord]:
        now = self._now()
        if (ids := self._prepared.get(user.who, user.seq)) is not None:
            found = (user.get(memory_id) for memory_id in ids)
            return [record for record in found if record is not None and record.is_recallable(now)]
        standing = long_lived(user, index, Budget(self._config.long_lived_tokens, self._count_tokens), now)
        self._prepared.put(user.who, user.seq, [record.id for record in standing])
        return standing

    def _note_addition(self, user: UserWriter, now: datetime) -> None:
        """At the end of a write by which the user may have more than before."""
        user.was_used(now)
        self.limits.check(user)

    def _insert(self, user: UserWriter, now: datetime, values: Mapping[str, Any]) -> MemoryRecord:
        values = _with_end(values, now)
        if values["type"] == "working":
            values["expires_at"] = sessions.end_of(now, self._config.session_ttl_s)
        return user.insert(now, **values)

    def _take_in(self, who: Principal) -> None:
        """Makes index and vectors follow what was written, so that the next search need not: documents are large."""
        with self._store.read(who) as user, self._indexes.current(user):
            pass
        self._retrieval.prepare(who)

    def _receipt(self, who: Principal, removed: Removed, kv_epoch: int) -> DeletionReceipt:
        with self._store.read(who) as user:
            postings = self._indexes.drop_removed(user)
        return DeletionReceipt(
            tenant=who.tenant,
            user=who.user,
            records=tuple(removed.ids),
            versions=removed.versions,
            postings=postings,
            sessions=removed.sessions,
            links=removed.links,
            snapshot_entries=removed.snapshot_entries,
            derived=tuple(removed.derived),
            kv_epoch=kv_epoch,
        )


def _with_end(values: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """A time to live becomes the moment of its end."""
    out = dict(values)
    if "ttl_s" in out:
        ttl_s = out.pop("ttl_s")
        out["expires_at"] = None if ttl_s is None else now + timedelta(seconds=ttl_s)
    return out


def _filter(type: str | None, tag: str | None) -> Callable[[str, Iterable[str]], bool]:
    if type is not None:
        inputs.check_type(type)
    return lambda has_type, has_tags: type in (None, has_type) and (tag is None or tag in has_tags)


def _differs(record: MemoryRecord, values: Mapping[str, Any]) -> bool:
    return any(getattr(record, name) != value for name, value in values.items())


def _only_lessens(old: MemoryRecord, new: MemoryRecord) -> bool:
    """Whether a change only hides a memory, has it end some day or takes its pin, each of which it can do once."""
    ends = new.expires_at != old.expires_at
    hides, unpins = new.sensitivity != old.sensitivity, new.pinned != old.pinned
    if (ends and old.expires_at is not None) or (hides and new.sensitivity != "sensitive") or (unpins and new.pinned):
        return False
    changed = {"expires_at": new.expires_at, "sensitivity": new.sensitivity, "pinned": new.pinned}
    is_all = replace(old, **changed, version=new.version, updated_at=new.updated_at) == new
    return is_all and (ends or hides or unpins)
