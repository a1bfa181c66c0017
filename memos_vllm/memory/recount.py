"""What users have, counted anew from all entries: for stores of before it was kept, and for ``memos doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from memos_vllm.memory import holdings, records, tables
from memos_vllm.memory.checks import UNREADABLE, Checks, Problem
from memos_vllm.memory.contract import Tables, Transaction
from memos_vllm.memory.holdings import Holdings
from memos_vllm.types import Principal


def count(txn: Transaction, dbs: Tables) -> tuple[dict[bytes, Holdings], dict[bytes, Principal]]:
    """Holdings, and who it is as his records say, by what his keys begin with. A record that cannot be read names
    nobody."""
    held: dict[bytes, Holdings] = {}
    names: dict[bytes, Principal] = {}
    for table in sorted(holdings.COUNTED):
        is_record = table == "records"
        with txn.cursor(db=dbs[table]) as cursor:
            for key, raw in cursor:
                of_user = held.get(key[:8], Holdings()).plus(int(is_record), holdings.entry_bytes(key, raw))
                if is_record:
                    try:
                        record = records.decode(raw)
                    except UNREADABLE:
                        pass
                    else:
                        names.setdefault(bytes(key[:8]), Principal(record.tenant, record.user))
                        latest = max(record.updated_at, of_user.last_used_at or record.updated_at)
                        of_user = replace(of_user, last_used_at=latest)
                held[bytes(key[:8])] = of_user
    return held, names


def write_all(txn: Transaction, dbs: Tables) -> None:
    """Makes the table ``users`` anew. When somebody was last there is taken from his memories."""
    for key in list(txn.cursor(db=dbs["users"]).iternext(values=False)):
        txn.delete(key, db=dbs["users"])
    held, names = count(txn, dbs)
    for owner, who in names.items():
        txn.put(holdings.key_of(who, owner), holdings.encode(who, held[owner]), db=dbs["users"])


class HoldingsChecks(Checks):
    """An entry for each user who has memories, with the numbers that his entries in the other tables tell."""

    def users(self) -> Iterator[Problem]:
        held, names = count(self._txn, self._dbs)
        seen: set[bytes] = set()
        for key, raw in self._rows("users"):
            owner = key[holdings.KEY_BYTES - 8 :]
            try:
                who, kept = holdings.decode(raw)
            except ValueError:
                who, kept = names.get(owner, Principal("", "")), Holdings()
            known = self._owners.get(owner)
            if known is None or known[0] != tables.owner_key(who) or key != holdings.key_of(who, owner):
                yield Problem("users", key.hex(), "belongs to no user", self._delete("users", key))
                continue
            seen.add(owner)
            yield from self._compared(key, who, kept, held.get(owner, Holdings()))
        for owner, who in names.items():
            known = self._owners.get(owner)
            if owner not in seen and known is not None and known[0] == tables.owner_key(who):
                yield from self._compared(holdings.key_of(who, owner), who, Holdings(), held[owner])

    def _compared(self, key: bytes, who: Principal, kept: Holdings, there: Holdings) -> Iterator[Problem]:
        if (kept.memories, kept.size_bytes) == (there.memories, there.size_bytes):
            return
        told = f"says {kept.memories} memories of {kept.size_bytes} bytes, there are {there.memories} of"
        right = replace(there, last_used_at=kept.last_used_at or there.last_used_at)
        mend = self._put("users", key, holdings.encode(who, right)) if there else self._delete("users", key)
        yield Problem("users", key.hex(), f"{told} {there.size_bytes} bytes", mend)
