"""Adapters as they are stored: names, versions, who may use them, and where they came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from memos_vllm.errors import AdapterError, NotFound
from memos_vllm.types import Principal

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REFERENCE = re.compile(rf"(?P<name>{_NAME.pattern})(?:@(?P<version>[1-9]\d{{0,8}}))?")

FIRST_ID, LAST_ID = 2**16, 2**31 - 1
"""Smaller numbers are left to vLLM's own counter, which starts at 1 (``--lora-modules``)."""


NAME_PREFIX = "memos-"
"""Of what vLLM calls our adapters."""


class Scope(StrEnum):
    """Who may use an adapter besides its owner."""

    USER = "user"
    TENANT = "tenant"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Version:
    """One content under a name; it never changes."""

    version: int
    digest: str
    """Of the canonical content, 64 hex digits."""

    lora_int_id: int
    incarnation: str
    """Random: KV belongs to this version, and goes with it, even if others have the same content."""

    size_bytes: int
    rank: int
    dtype: str
    base: str
    """Fingerprint of the model it was made for."""

    created_at: str
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: where it came from; of a distilled one the memories with their versions, settings, evaluation."""

    @property
    def lora_name(self) -> str:
        """What vLLM calls it: names the content, and nobody's name for it."""
        return f"{NAME_PREFIX}{self.digest}-{self.incarnation}"

    def sources_of(self, who: Principal) -> Sequence[Mapping[str, Any]]:
        """A user's memories that it was distilled from: id, version, and the text's fingerprint."""
        source = self.origin.get("distilled") or {}
        if source.get("tenant") != who.tenant or source.get("user") != who.user:
            return ()
        memories: Sequence[Mapping[str, Any]] = source["memories"]
        return memories

    def memories_of(self, who: Principal) -> frozenset[tuple[str, int]]:
        """Id and version of the same."""
        return frozenset((memory["id"], memory["version"]) for memory in self.sources_of(who))


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name in a space (a user's, a tenant's, or everybody's) and its versions, oldest first."""

    name: str
    scope: Scope
    owner: Principal
    current: int
    versions: tuple[Version, ...]

    def version(self, number: int | None = None) -> Version:
        """
        Raises:
            NotFound: there is no such version.
        """
        wanted = self.current if number is None else number
        for version in self.versions:
            if version.version == wanted:
                return version
        raise NotFound(f"adapter {self.name!r} has no version {wanted}")

    def with_version(self, version: Version) -> Adapter:
        return replace(self, current=version.version, versions=(*self.versions, version))

    def without(self, numbers: set[int]) -> Adapter | None:
        """None if nothing is left. The newest of the rest is current if the current one goes."""
        left = tuple(version for version in self.versions if version.version not in numbers)
        if not left:
            return None
        current = self.current if self.current not in numbers else left[-1].version
        return replace(self, current=current, versions=left)

    def as_json(self, who: Principal) -> dict[str, Any]:
        """For a user who may use it. The provenance is the owner's."""
        mine = who == self.owner
        return {
            "name": self.name,
            "scope": self.scope,
            "owned": mine,
            "current": self.current,
            "versions": [
                {
                    "version": version.version,
                    "digest": version.digest,
                    "size_bytes": version.size_bytes,
                    "rank": version.rank,
                    "dtype": version.dtype,
                    "created_at": version.created_at,
                    **({"origin": dict(version.origin)} if mine else {}),
                }
                for version in self.versions
            ],
        }


def encode(adapter: Adapter) -> bytes:
    return json.dumps(asdict(adapter), separators=(",", ":")).encode()


def decode(raw: bytes) -> Adapter:
    values = json.loads(raw)
    return Adapter(
        name=values["name"],
        scope=Scope(values["scope"]),
        owner=Principal(**values["owner"]),
        current=values["current"],
        versions=tuple(Version(**version) for version in values["versions"]),
    )


RESERVED = frozenset({"default", "distill", "base"})
"""Words of the REST interface."""


def check_name(name: Any) -> str:
    if name in RESERVED:
        raise AdapterError(f"the name {name!r} is reserved; choose another one")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterError("'name' must have 1 to 64 of a-z, 0-9, '.', '_' and '-', and start with a letter or digit")
    return name


def parse_reference(reference: str) -> tuple[str, int | None]:
    """``name`` or ``name@version``."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise AdapterError(f"'adapter' must be a name or name@version, not {reference[:100]!r}")
    return match["name"], int(match["version"]) if match["version"] else None


SPACE_BYTES = 16


def space_key(scope: Scope, who: Principal) -> bytes:
    """For the names that one scope of a user holds."""
    parts = {Scope.USER: (who.tenant, who.user), Scope.TENANT: (who.tenant,), Scope.ALL: ()}[scope]
    digest = hashlib.blake2b(scope.value.encode(), digest_size=SPACE_BYTES)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(4, "big") + raw)
    return digest.digest()


def adapter_key(scope: Scope, who: Principal, name: str) -> bytes:
    """Where the index has a name."""
    return space_key(scope, who) + name.encode()


def key_of(adapter: Adapter) -> bytes:
    return adapter_key(adapter.scope, adapter.owner, adapter.name)


def name_of(key: bytes) -> str:
    return key[SPACE_BYTES:].decode()


def first_id(digest: bytes) -> int:
    """Where the search for a free number begins: the same in every process."""
    number = int.from_bytes(digest, "big") & LAST_ID
    return number if number >= FIRST_ID else number + FIRST_ID


def next_id(number: int) -> int:
    return number + 1 if number < LAST_ID else FIRST_ID
