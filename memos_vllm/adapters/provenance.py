"""Which versions were distilled from whose memories: a table of its own, so that a user's is found without reading
anybody else's adapter.

    key     whose memories (16 bytes), the adapter's key in the index, version (4 bytes)
    value   a line about the distillation, a line of its memories; both JSON

All of it follows from the index and is written with it; what another release left out is made up for at the start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lmdb

from memos_vllm.adapters import records
from memos_vllm.adapters.records import Adapter, Scope, Version
from memos_vllm.types import Principal

TABLE = b"distilled"
_USER_BYTES, _VERSION_BYTES = 16, 4


@dataclass(frozen=True, slots=True)
class Distilled:
    """A version, and the memories it knows: id, version and fingerprint of each."""

    adapter_key: bytes
    version: int
    memories: Sequence[Mapping[str, Any]]

    @property
    def reference(self) -> str:
        return f"{records.name_of(self.adapter_key)}@{self.version}"


class Provenance:
    """Every method runs in the caller's transaction."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._table = env.open_db(TABLE)

    def add(self, txn: lmdb.Transaction, adapter: Adapter, version: Version) -> None:
        for key, value in _rows(adapter, [version]):
            txn.put(key, value, db=self._table)

    def remove(self, txn: lmdb.Transaction, adapter: Adapter, versions: Iterable[Version]) -> None:
        for key, _ in _rows(adapter, versions):
            txn.delete(key, db=self._table)

    def restore(self, txn: lmdb.Transaction, adapters: Iterable[Adapter]) -> None:
        """Makes the table what it is to be for an index of these adapters."""
        wanted = {key: value for adapter in adapters for key, value in _rows(adapter, adapter.versions)}
        present = {bytes(key): bytes(value) for key, value in txn.cursor(self._table)}
        for key in present.keys() - wanted.keys():
            txn.delete(key, db=self._table)
        for key, value in wanted.items():
            if present.get(key) != value:
                txn.put(key, value, db=self._table)

    def users(self, txn: lmdb.Transaction) -> set[Principal]:
        """Those of whose memories a version was distilled."""
        return {Principal(each["tenant"], each["user"]) for each in self._distillations(txn)}

    def of(self, txn: lmdb.Transaction, who: Principal) -> Iterator[Distilled]:
        """The versions that were distilled from a user's memories, by adapter and age."""
        user = _user_key(who)
        cursor = txn.cursor(self._table)
        if not cursor.set_range(user):
            return
        for key, raw in cursor:
            if not key.startswith(user):
                return
            number = int.from_bytes(key[-_VERSION_BYTES:], "big")
            yield Distilled(key[_USER_BYTES:-_VERSION_BYTES], number, json.loads(raw.partition(b"\n")[2]))

    def newest_took_s(self, txn: lmdb.Transaction) -> float | None:
        """How long the newest distillation took; None: there is none."""
        newest = max(self._distillations(txn), key=lambda each: each["created_at"], default=None)
        return None if newest is None else newest["took_s"]

    def _distillations(self, txn: lmdb.Transaction) -> Iterator[dict[str, Any]]:
        return (json.loads(raw.partition(b"\n")[0]) for _, raw in txn.cursor(self._table))


def _rows(adapter: Adapter, versions: Iterable[Version]) -> Iterator[tuple[bytes, bytes]]:
    for version in versions:
        if not (source := version.origin.get("distilled")):
            continue
        who = Principal(source["tenant"], source["user"])
        about = {
            "tenant": who.tenant,
            "user": who.user,
            "created_at": version.created_at,
            "took_s": source.get("took_s"),
        }
        lines = (json.dumps(each, separators=(",", ":")).encode() for each in (about, source["memories"]))
        number = version.version.to_bytes(_VERSION_BYTES, "big")
        yield _user_key(who) + records.key_of(adapter) + number, b"\n".join(lines)


def _user_key(who: Principal) -> bytes:
    return records.space_key(Scope.USER, who)
