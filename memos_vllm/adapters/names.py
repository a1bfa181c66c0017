"""Which names there are, what they mean for whom, and whose they are: a table of adapters, by space and name.

Every method runs in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterator

import lmdb

from memos_vllm.adapters import records
from memos_vllm.adapters.records import Adapter, Scope, Version
from memos_vllm.errors import Forbidden, NotFound
from memos_vllm.types import Principal

TABLE = b"adapters"


class Names:
    def __init__(self, env: lmdb.Environment) -> None:
        self._table = env.open_db(TABLE)

    def put(self, txn: lmdb.Transaction, adapter: Adapter) -> None:
        txn.put(records.key_of(adapter), records.encode(adapter), db=self._table)

    def remove(self, txn: lmdb.Transaction, adapter: Adapter) -> None:
        txn.delete(records.key_of(adapter), db=self._table)

    def at(self, txn: lmdb.Transaction, key: bytes) -> Adapter | None:
        """By ``records.adapter_key``."""
        raw = txn.get(key, db=self._table)
        return None if raw is None else records.decode(raw)

    def count(self, txn: lmdb.Transaction) -> int:
        return int(txn.stat(self._table)["entries"])

    def all(self, txn: lmdb.Transaction) -> list[Adapter]:
        return [records.decode(raw) for _, raw in txn.cursor(self._table)]

    def versions(self, txn: lmdb.Transaction) -> Iterator[Version]:
        return (version for adapter in self.all(txn) for version in adapter.versions)

    # -- rights ---------------------------------------------------------------------------------

    def usable_by(self, txn: lmdb.Transaction, who: Principal) -> list[Adapter]:
        """The user's own, then the tenant's, then everybody's."""
        found: list[Adapter] = []
        for scope in Scope:
            space = records.space_key(scope, who)
            cursor = txn.cursor(self._table)
            if cursor.set_range(space):
                for key, raw in cursor:
                    if not key.startswith(space):
                        break
                    found.append(records.decode(raw))
        return found

    def find(self, txn: lmdb.Transaction, who: Principal, reference: str) -> tuple[Adapter, Version]:
        """What a reference means for a user; his own names go before shared ones.

        Raises:
            NotFound: the user may use no such adapter; whether somebody else has one does not show.
        """
        name, number = records.parse_reference(reference)
        for scope in Scope:
            if (adapter := self.at(txn, records.adapter_key(scope, who, name))) is not None:
                return adapter, adapter.version(number)
        raise NotFound(f"no adapter {name!r}")

    def to_extend(self, txn: lmdb.Transaction, scope: Scope, who: Principal, name: str) -> Adapter | None:
        """The name that a new version of the user goes under; None: it is free.

        Raises:
            Forbidden: it is somebody else's.
        """
        adapter = self.at(txn, records.adapter_key(scope, who, name))
        if adapter is not None and adapter.owner != who:
            raise Forbidden(f"the shared name {name!r} belongs to somebody else; choose another one")
        return adapter

    def owned(self, txn: lmdb.Transaction, who: Principal, name: str) -> Adapter:
        """
        Raises:
            NotFound: the user owns no such name.
        """
        for scope in Scope:
            adapter = self.at(txn, records.adapter_key(scope, who, name))
            if adapter is not None and adapter.owner == who:
                return adapter
        raise NotFound(f"you own no adapter {name!r}")
