"""What one user has in the store: how many memories, how many bytes, and when he was last there.

It is counted with every write, in the same transaction, so a limit costs nothing to check and a list of users reads
one entry for each. The table ``users`` has it under the tenant's digest and the owner's number: a place that stays
the same as long as the user has anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from memos_vllm.memory import tables
from memos_vllm.types import Principal

COUNTED: Collection[str] = frozenset({"records", "versions", "links", "snapshots", "snapshot_entries"})
"""Tables whose entries count, with key and value. What else a user has is bounded by these, or by itself."""

_TENANT_BYTES = 16
KEY_BYTES = _TENANT_BYTES + 8


@dataclass(frozen=True, slots=True)
class Holdings:
    memories: int = 0
    """All that are stored: superseded, archived and merged ones, too."""

    size_bytes: int = 0
    """Of ``COUNTED``."""

    last_used_at: datetime | None = None
    """When something of the user's was last stored, changed or put into a prompt for him."""

    def __bool__(self) -> bool:
        return bool(self.memories or self.size_bytes)

    def plus(self, memories: int, size_bytes: int) -> Holdings:
        return replace(self, memories=self.memories + memories, size_bytes=self.size_bytes + size_bytes)

    def as_json(self) -> dict[str, Any]:
        return {"memories": self.memories, "bytes": self.size_bytes}


def tenant_key(tenant: str) -> bytes:
    """What the keys of all users of a tenant begin with."""
    return hashlib.blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=_TENANT_BYTES).digest()


def key_of(who: Principal, owner: bytes) -> bytes:
    """
    Args:
        owner: what the user's keys in the other tables begin with.
    """
    return tenant_key(who.tenant) + owner


def entry_bytes(key: bytes, value: bytes | None) -> int:
    """
    Args:
        key: with the owner; None for ``value``: there is no entry.
    """
    return 0 if value is None else len(key) + len(value)


def encode(who: Principal, held: Holdings) -> bytes:
    used_ms = 0 if held.last_used_at is None else tables.milliseconds(held.last_used_at)
    return json.dumps([who.tenant, who.user, held.memories, held.size_bytes, used_ms]).encode()


def decode(raw: bytes) -> tuple[Principal, Holdings]:
    """
    Raises:
        ValueError: it is no such entry.
    """
    try:
        tenant, user, memories, size_bytes, used_ms = json.loads(raw)
        used_at = tables.moment(used_ms) if used_ms else None
        return Principal(str(tenant), str(user)), Holdings(int(memories), int(size_bytes), used_at)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"no entry of a user: {error}") from error
