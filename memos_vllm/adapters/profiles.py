"""Users' default adapters: a table of references, by user. Every method runs in the caller's transaction."""

from __future__ import annotations

import json

import lmdb

from memos_vllm.adapters import records
from memos_vllm.adapters.names import Names
from memos_vllm.adapters.records import Scope
from memos_vllm.errors import NotFound
from memos_vllm.types import Principal

TABLE = b"profiles"


class Profiles:
    def __init__(self, env: lmdb.Environment) -> None:
        self._table = env.open_db(TABLE)

    def get(self, txn: lmdb.Transaction, who: Principal) -> str | None:
        raw = txn.get(_key(who), db=self._table)
        return None if raw is None else json.loads(raw)["adapter"]

    def set(self, txn: lmdb.Transaction, who: Principal, reference: str | None) -> None:
        if reference is None:
            txn.delete(_key(who), db=self._table)
        else:
            value = {"tenant": who.tenant, "user": who.user, "adapter": reference}
            txn.put(_key(who), json.dumps(value).encode(), db=self._table)

    def drop_dangling(self, txn: lmdb.Transaction, names: Names) -> int:
        """Removes defaults that mean nothing any more; how many."""
        dangling = []
        for key, raw in txn.cursor(self._table):
            profile = json.loads(raw)
            try:
                names.find(txn, Principal(profile["tenant"], profile["user"]), profile["adapter"])
            except NotFound:
                dangling.append(key)
        for key in dangling:
            txn.delete(key, db=self._table)
        return len(dangling)


def _key(who: Principal) -> bytes:
    return records.space_key(Scope.USER, who)
