"""The named databases of the store and the keys in them.

    meta      schema_version, next_owner
    owners    digest of tenant and user      -> Owner
    records   owner, memory id               -> the record as it is now, JSON
    versions  owner, memory id, version      -> the record as it was, JSON
    current   owner, what the text says      -> ids of current memories that say it (several)
    changes   owner, sequence number         -> operation, memory id; the last ``CHANGES_KEPT``
    sessions  owner, digest of the session   -> the session's frozen memories, JSON

An owner is a number given at the user's first write, so keys are short and no separator in a name
can make two users one. Numbers are big-endian: LMDB's order is then the order of time.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass

from memos_vllm.memory.records import NO_ID
from memos_vllm.types import Principal

SCHEMA_VERSION = 1
NAMES = ("meta", "owners", "records", "versions", "current", "changes", "sessions")
SEVERAL_VALUES = frozenset({"current"})

CHANGES_KEPT = 10_000
"""Per user. An index that fell further behind is rebuilt, which costs about as much."""

PUT, REMOVE, CLEAR = b"P", b"R", b"C"

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


def number_key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def version_key(version: int) -> bytes:
    return version.to_bytes(4, "big")


def session_key(session: str) -> bytes:
    return hashlib.blake2b(session.encode(), digest_size=16).digest()
