"""The indexes that a process holds: one per user, of those who asked last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.search import UserIndex
from memos_vllm.memory.transactions import UserReader
from memos_vllm.types import Principal

MAX_INDEXED_USERS = 1024
MAX_INDEXED_MEMORIES = 1_000_000
"""Of all users together; about 2 KB each, 1 KB of it the vector of the default embedder. One user may have
more."""


class Indexes:
    """The indexes of the users who asked last; others are built again when they come back."""

    def __init__(self, embedder: Embedder | None = None, max_users: int = MAX_INDEXED_USERS):
        self._embedder = embedder
        self._max_users = max_users
        self._lock = threading.Lock()
        self._indexes: OrderedDict[Principal, UserIndex] = OrderedDict()

    def __len__(self) -> int:
        return len(self._indexes)

    @contextmanager
    def current(self, user: UserReader) -> Iterator[UserIndex]:
        """The index as of the transaction or later, for the caller alone."""
        with self._lock:
            index = self._indexes.setdefault(user.who, UserIndex(self._embedder))
            self._indexes.move_to_end(user.who)
            self._make_room()
        with index.lock:
            index.catch_up(user)
            yield index

    def _make_room(self) -> None:
        """Drops the indexes that were used longest ago; the last one stays."""
        num_memories = sum(map(len, self._indexes.values()))
        while len(self._indexes) > self._max_users or (num_memories > MAX_INDEXED_MEMORIES and len(self._indexes) > 1):
            _, dropped = self._indexes.popitem(last=False)
            num_memories -= len(dropped)

    def drop_removed(self, user: UserReader) -> int:
        """After a deletion: how many postings it took out of the index, if the user has one."""
        with self._lock:
            index = self._indexes.get(user.who)
        if index is None:
            return 0
        with index.lock:
            return index.catch_up(user)
