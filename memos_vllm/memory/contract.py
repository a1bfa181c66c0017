"""What plaintext memory asks of the engine that keeps it: ordered tables of bytes, in transactions.

Everything above - records, claims, links, usage, the change log, snapshots, forgetting - is the same code for
every engine. The tables and their keys are in ``tables``. An engine promises:

    order       a table is sorted by the bytes of its keys; ``tables.SEVERAL_VALUES`` have several values under a
                key, sorted too. Keys have at most 511 bytes, values at most 512 MiB.
    writers     one at a time, over all processes: a write sees all writes that were acknowledged before it
                began, and none that is under way. So the writes are serializable, in the order of their commits.
    readers     see the store as of one moment between two writes, for as long as they read; they wait for no
                writer, and no writer waits for them.
    durability  a write that returned is on disk, and survives the death of this process and of the engine's.
                A write that failed left nothing. Where it cannot be told which of the two, the error says so.
    errors      what the engine raises becomes ``StoreError``, or ``StoreFull`` where there is no room, with what
                to do about it; what the caller's work raises comes through as it is, to its caller alone.

``store`` keeps the promise with LMDB, ``postgresql`` with PostgreSQL; what both do the same is in
``abstract_store``. ``Transaction`` and ``Cursor`` are the part of
py-lmdb's classes of these names that is used, so LMDB's own are passed on and cost nothing on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

Tables = Mapping[str, Any]
"""Name to the engine's handle of each table."""


class Cursor(Protocol):
    """A place in a table; before the first entry at first. Sees what its transaction wrote, also meanwhile."""

    def __enter__(self) -> Cursor: ...
    def __exit__(self, *_: object) -> None: ...
    def __iter__(self) -> Iterator[tuple[bytes, bytes]]: ...
    def iternext(self, keys: bool = True, values: bool = True) -> Iterator[Any]:
        """All entries, of a cursor that stands nowhere yet."""

    def set_range(self, key: bytes) -> bool:
        """To the first entry whose key is not below this one; False, and nowhere, if there is none."""

    def set_key_dup(self, key: bytes, value: bytes) -> bool:
        """To this very entry."""

    def next(self) -> bool: ...
    def key(self) -> bytes:
        """Empty where the cursor stands nowhere."""

    def value(self) -> bytes: ...
    def item(self) -> tuple[bytes, bytes]: ...
    def delete(self) -> bool:
        """Takes the entry out and stands on the one after it."""


class Transaction(Protocol):
    def get(self, key: bytes, default: bytes | None = None, *, db: Any) -> bytes | None:
        """The value, of several the first."""

    def put(self, key: bytes, value: bytes, *, overwrite: bool = True, db: Any) -> bool: ...
    def delete(self, key: bytes, value: bytes = b"", *, db: Any) -> bool:
        """Whether it was there. Of several values the one that is given, or all."""

    def cursor(self, db: Any) -> Cursor: ...
