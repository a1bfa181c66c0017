"""The named databases of the store and the keys in them.

    meta        schema_version, next_owner
    owners      digest of tenant and user        -> Owner
    records     owner, memory id                 -> the record as it is now, JSON
    versions    owner, memory id, version        -> the record as it was, JSON
    current     owner, what the text says        -> ids of current memories that say it (several)
    vectors     owner, memory id                 -> its embedding
    changes     owner, sequence number           -> operation, memory id; the last ``CHANGES_KEPT``
    sessions    owner, digest of the session     -> the session's frozen memories, JSON
    usage       owner, memory id                 -> Usage: how often and when it was used, when time moves it
    due         moment, owner, memory id         -> nothing; what time moves next, of all users
    events      owner, memory id, number         -> an event of its life, JSON; the last ``EVENTS_KEPT``
    links       owner, link id                   -> Link, JSON
    link_ends   owner, memory id, link id        -> which end of the link the memory is
    snapshots   owner, snapshot id               -> Snapshot, JSON
    snapshot_entries  owner, snapshot id, memory id -> version and standing of the memory then, JSON
    pieces      owner, digest of a document's name, memory id -> nothing; the pieces it has or had
    unrefined   owner, memory id                 -> nothing; what waits for the model (``refining``)
    kv_removals owner, KV epoch                  -> tenant and user, JSON; KV that is still to be removed
    users       digest of the tenant, owner      -> tenant, user and what he has, JSON (``holdings``)

An owner is a number given at the user's first write, so keys are short and no separator in a name
can make two users one. Numbers are big-endian: LMDB's order is then the order of time.
"""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from memos_vllm.memory.records import NO_ID
from memos_vllm.types import Principal

SCHEMA_VERSION = 6
NAMES = (
    *("meta", "owners", "records", "versions", "current", "vectors", "changes", "sessions"),
    *("usage", "due", "events", "links", "link_ends", "snapshots", "snapshot_entries", "pieces"),
    *("kv_removals", "unrefined", "users"),
)
OF_A_MEMORY = ("versions", "vectors", "usage", "events", "unrefined")
"""Keys begin with owner and memory id; cleared when the memory is removed."""

OF_A_USER = (
    *(*OF_A_MEMORY, "records", "current", "sessions"),
    *("links", "link_ends", "snapshots", "snapshot_entries", "pieces"),
)
"""Keys begin with the owner; cleared when the user's memories are. Changes and KV removals stay."""

SEVERAL_VALUES = frozenset({"current"})

CHANGES_KEPT = 10_000
"""Per user. An index that fell further behind is rebuilt, which costs about as much."""

EVENTS_KEPT = 100
"""Per memory."""

DOCUMENT_KEY_BYTES = 16

PUT, REMOVE, CLEAR = b"P", b"R", b"C"

FROM, TO = b"F", b"T"
"""A memory as an end of a link."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OWNER = struct.Struct(">QQQ16s")


@dataclass(slots=True)
class Owner:
    """One user's row. It outlives the user's memories: ids and epochs never come back."""

    number: int
    kv_epoch: int = 0
    seq: int = 0
    """Of the user's last change."""

    last_id: uuid.UUID = NO_ID

    @property
    def prefix(self) -> bytes:
        return number_key(self.number)

    def encode(self) -> bytes:
        return _OWNER.pack(self.number, self.kv_epoch, self.seq, self.last_id.bytes)

    @classmethod
    def decode(cls, raw: bytes) -> Owner:
        number, kv_epoch, seq, last_id = _OWNER.unpack(raw)
        return cls(number, kv_epoch, seq, uuid.UUID(bytes=last_id))


def owner_key(who: Principal) -> bytes:
    parts = (part.encode("utf-8", "surrogatepass") for part in (who.tenant, who.user))
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


def encode_principal(who: Principal) -> bytes:
    return json.dumps([who.tenant, who.user]).encode()


def decode_principal(raw: bytes) -> Principal:
    return Principal(*json.loads(raw))


def number_key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def version_key(version: int) -> bytes:
    return version.to_bytes(4, "big")


def moment_key(moment: datetime) -> bytes:
    """Sorts as time does. Before 1970 counts as 1970."""
    return milliseconds(moment).to_bytes(8, "big")


def milliseconds(moment: datetime) -> int:
    """Since 1970, exactly: a float would be one off now and then, and its key would not be found again."""
    return max((moment - _EPOCH) // timedelta(milliseconds=1), 0)


def moment(milliseconds: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=milliseconds)


def session_key(session: str) -> bytes:
    return hashlib.blake2b(session.encode(), digest_size=16).digest()


def document_key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=DOCUMENT_KEY_BYTES).digest()
