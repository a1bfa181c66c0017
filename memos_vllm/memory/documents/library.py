"""A user's documents: what the HTTP layer calls. Each call is for one user and thread-safe."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from memos_vllm.config import DocumentsConfig
from memos_vllm.errors import DocumentError, NotFound
from memos_vllm.memory import inputs, removal, tables
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.documents import formats, isolated, keeping
from memos_vllm.memory.documents.isolated import Limits
from memos_vllm.memory.documents.keeping import Stored
from memos_vllm.memory.limits import UserLimits
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.removal import Removed
from memos_vllm.memory.results import DeletionReceipt, Document
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.types import Principal

MAX_PIECES = inputs.MAX_BATCH
Receipt = Callable[[Principal, Removed, int], DeletionReceipt]


class Library:
    """
    Args:
        now: the time in UTC; tests set it.
        receipt: makes a deletion's receipt.
        take_in: makes search follow what is new of a user's.
        keeps_history: whether pieces that a new edition no longer has stay as superseded memories.

    Raises as ``service.MemoryService``; ``DocumentError`` for a document that cannot be taken.
    """

    def __init__(
        self,
        store: Store,
        config: DocumentsConfig,
        now: Callable[[], datetime],
        receipt: Receipt,
        take_in: Callable[[Principal], Any],
        limits: UserLimits,
        keeps_history: bool = True,
    ):
        self._store = store
        self._config = config
        self._now = now
        self._receipt = receipt
        self._take_in = take_in
        self._limits = limits
        self._keeps_history = keeps_history

    def put(
        self,
        who: Principal,
        name: str,
        data: bytes,
        content_type: str | None = None,
        *,
        tags: Iterable[str] | None = None,
        pinned: bool | None = None,
        cube: str | None = None,
    ) -> Stored:
        """Stores a document, or its new edition; all of it or nothing.

        Args:
            name: what it is called; the same name again is a new edition.
            content_type: as in HTTP; without one the name's suffix says what it is.
            tags, pinned, cube: of every piece; None leaves those of an earlier edition.
        """
        name = check_document_name(name)
        given: dict[str, Any] = {}
        if tags is not None:
            given["tags"] = inputs.check_tags(tags)
        if pinned is not None:
            given["pinned"] = inputs.check_pinned(pinned)
        if cube is not None:
            given["cube"] = inputs.check_name(cube, "cube")
        if len(data) > self._config.max_bytes:
            raise DocumentError(
                f"the document has {len(data)} bytes, memory.documents.max_bytes allows {self._config.max_bytes}", 413
            )
        type, charset = formats.content_type(content_type, name)
        limits = Limits(self._config.piece_words, MAX_PIECES, self._config.read_timeout_s)
        cut = isolated.pieces_of(data, type, charset, limits)

        def keep(user: UserWriter) -> Stored:
            now = self._now()
            stored = keeping.keep(user, name, type, cut, given, now, history=self._keeps_history)
            user.was_used(now)
            self._limits.check(user)
            return stored

        stored = self._store.write(who, keep, frees=not self._keeps_history)
        self._take_in(who)
        return stored

    def get(self, who: Principal, name: str) -> tuple[Document, Sequence[MemoryRecord]]:
        """A document and its pieces in their order.

        Raises:
            NotFound: the user has no such document.
        """
        with self._store.read(who) as user:
            found = keeping.current(user, name)
        if not found:
            raise NotFound(f"no document {name!r}")
        return _document(found), found

    def list(self, who: Principal) -> Sequence[Document]:
        """By name; reads every piece."""
        with self._store.read(who) as user:
            documents = [_document(found) for name in _names(user) if (found := keeping.current(user, name))]
        return sorted(documents, key=lambda document: document.name)

    def names(self, who: Principal) -> Sequence[str]:
        with self._store.read(who) as user:
            return list(_names(user))

    def delete(self, who: Principal, name: str) -> DeletionReceipt:
        """Removes a document with all pieces that it ever had.

        Raises:
            NotFound: the user has no such document.
        """

        def remove(user: UserWriter) -> tuple[Removed, int]:
            removed = removal.remove_several(user, [record.id for record in user.pieces(name)])
            if not removed.ids:
                raise NotFound(f"no document {name!r}")
            if not self._keeps_history:
                user.clear("kv_removals")
            return removed, user.kv_epoch

        return self._receipt(who, *self._store.write(who, remove, frees=True))


def check_document_name(name: Any) -> str:
    name = inputs.check_name(name, "name")
    if not name.isprintable() or not name.strip():
        raise DocumentError("'name' must be printable, such as handbook.pdf")
    return name


def _names(user: UserReader) -> Iterable[str]:
    """Of each document, from its first piece."""
    seen = b""
    for key, _ in user.rows("pieces"):
        if (document := key[: tables.DOCUMENT_KEY_BYTES]) != seen:
            seen = document
            record = user.get(str(uuid.UUID(bytes=key[tables.DOCUMENT_KEY_BYTES :])))
            assert record is not None and record.document is not None
            yield record.document


def _document(found: Sequence[MemoryRecord]) -> Document:
    place = found[0].origin["document"]
    return Document(
        name=place["name"],
        content_type=place["content_type"],
        pieces=len(found),
        created_at=min(record.created_at for record in found),
        updated_at=max(record.updated_at for record in found),
    )
