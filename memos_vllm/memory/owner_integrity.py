"""Whether each user has the row in ``owners`` that his keys begin with, and making it again where he has not.

Without its row a user's whole memory would belong to nobody. But every record names its user, and its key
begins with his number; so does an epoch whose KV is still to be removed. From them the row can be told.
"""

from __future__ import annotations

import struct
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator

from memos_vllm.memory import tables
from memos_vllm.memory.checks import UNREADABLE, Checks, Problem, Repair, entries_under
from memos_vllm.memory.contract import Transaction
from memos_vllm.memory.records import NO_ID, parse_id, utc_now
from memos_vllm.memory.tables import Owner
from memos_vllm.types import Principal

_KEYS_HAVE_IDS = ("records", "links", "snapshots")


class OwnerChecks(Checks):
    """Rows that decode, of numbers that their records have, too; none twice, all below the next one."""

    def owners(self) -> Iterator[Problem]:
        told = self._told()
        left: dict[bytes, bytes] = {}
        for key, raw in self._rows("owners"):
            owner = _decode(raw)
            if owner is not None and owner.prefix in told[key]:
                self._owners[owner.prefix] = (key, owner)
            else:
                left[key] = raw
        for key, raw in list(left.items()):
            if free := told[key] - self._owners.keys():
                yield self._made_again(key, max(free), "does not fit its records", raw)
                del left[key]
        for key, raw in left.items():
            owner = _decode(raw)
            if owner is None:
                yield self._unreadable("owners", key, raw)
            elif owner.prefix in self._owners:
                yield Problem("owners", key.hex(), f"number {owner.number} is another user's, too")
            else:
                self._owners[owner.prefix] = (key, owner)
        for key in told.keys() - {key for key, _ in self._owners.values()}:
            if free := told[key] - self._owners.keys():
                yield self._made_again(key, max(free), "is missing")
        yield from self._next_owner()

    def _next_owner(self) -> Iterator[Problem]:
        next_owner = int(self._txn.get(b"next_owner", b"0", db=self._dbs["meta"]))
        highest = max((owner.number for _, owner in self._owners.values()), default=0)
        if next_owner <= highest:
            mend = self._put("meta", b"next_owner", str(highest + 1).encode())
            yield Problem("meta", "next_owner", f"{next_owner} was given already", mend)

    def _told(self) -> defaultdict[bytes, set[bytes]]:
        """By the key in ``owners``: what a user's keys begin with. Of several users the one whom most name."""
        names: defaultdict[bytes, Counter[Principal]] = defaultdict(Counter)
        for key, raw in self._rows("records", counted=False):
            record = self._decode(raw)
            if record is not None and parse_id(record.id) == uuid.UUID(bytes=key[8:]):
                names[key[:8]][Principal(record.tenant, record.user)] += 1
        for key, raw in self._rows("kv_removals", counted=False):
            try:
                names[key[:8]][tables.decode_principal(raw)] += 1
            except UNREADABLE:
                continue  # told by ``kv_removals``
        told: defaultdict[bytes, set[bytes]] = defaultdict(set)
        for prefix, users in names.items():
            told[tables.owner_key(users.most_common(1)[0][0])].add(prefix)
        return told

    def _made_again(self, key: bytes, prefix: bytes, text: str, raw: bytes | None = None) -> Problem:
        owner = self._owner_of(prefix)
        self._owners[prefix] = (key, owner)
        put: Repair = self._put("owners", key, owner)

        def mend(txn: Transaction) -> None:
            if raw is not None:
                self._keep_aside("owners", key, raw)
            put(txn)

        return Problem("owners", key.hex(), f"the row of user {owner.number} {text}; KV of before is not used", mend)

    def _owner_of(self, prefix: bytes) -> Owner:
        """From all that begins with a number: nothing may come again that was given with it before.

        Which KV epoch it was nothing tells. The time in milliseconds is above all that were counted up to.
        """
        changes = list(entries_under(self._txn, self._dbs["changes"], prefix))
        ids = [raw[1:] for _, raw in changes if len(raw) == 17]
        for table in _KEYS_HAVE_IDS:
            ids += [key[8:24] for key, _ in entries_under(self._txn, self._dbs[table], prefix)]
        removals = entries_under(self._txn, self._dbs["kv_removals"], prefix)
        epochs = [int.from_bytes(key[8:], "big") + 1 for key, _ in removals]
        return Owner(
            number=int.from_bytes(prefix, "big"),
            kv_epoch=max([tables.milliseconds(utc_now()), *epochs]),
            seq=max((int.from_bytes(key[8:], "big") for key, _ in changes), default=1),  # 0: he never wrote anything
            last_id=max((uuid.UUID(bytes=each) for each in ids), default=NO_ID),
        )


def _decode(raw: bytes) -> Owner | None:
    try:
        return Owner.decode(raw)
    except struct.error:
        return None
