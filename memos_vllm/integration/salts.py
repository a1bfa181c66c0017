"""Tenant salts: what keeps one user's KV from ever serving another.

The salt goes into vLLM's ``cache_salt``, hence into the hash of a prompt's first block and through
the chain into all others, in every tier. It derives from the server's secret, so nobody can name
another user's salt; and from the user's KV epoch, so that a deletion makes all older KV unreachable.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from memos_vllm.errors import RequestError
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_PREFIX = "memos:"
_DIGEST_CHARS, _SEAL_CHARS = 64, 16


def salt_of(secret: bytes, who: Principal, kv_epoch: int) -> str:
    """What a user's salts in a KV epoch begin with, and what they are deleted by."""
    message = b"".join(len(part).to_bytes(4, "big") + part for part in (who.tenant.encode(), who.user.encode()))
    digest = hmac.digest(secret, message + kv_epoch.to_bytes(8, "big"), hashlib.sha256).hex()
    return _PREFIX + digest + _seal(secret, digest)


def _seal(secret: bytes, digest: str) -> str:
    return hmac.digest(secret, b"seal:" + digest.encode(), hashlib.sha256).hex()[:_SEAL_CHARS]


def is_genuine(secret: bytes, salt: str) -> bool:
    """Whether a salt that looks like memory's is: who does not know the secret cannot make one."""
    made = salt.split(":")[1]
    digest, seal = made[:_DIGEST_CHARS], made[_DIGEST_CHARS:]
    return hmac.compare_digest(seal.encode(), _seal(secret, digest).encode())


def foreign(salt: str) -> str:
    """What becomes of one that is not: a client's salt like any other."""
    return "client-" + salt


def of_store(salt: str, store_dtype: str) -> str:
    """Sets apart what goes through an approximate store, in the GPU's prefix cache too.

    The tag of what is stored stays the user's, so that a deletion finds KV of either kind.
    """
    return salt if store_dtype == "auto" else f"{salt}:{store_dtype}"


def of_user(secret: bytes, store_dtype: str, who: Principal, kv_epoch: int) -> str:
    """The ``cache_salt`` of a user's requests on a server with this store."""
    return of_store(salt_of(secret, who, kv_epoch), store_dtype)


def combine(salt: str, client_salt: str | None) -> str:
    """A client's own salt narrows further; it cannot leave the user's."""
    if not client_salt:
        return salt
    return salt + ":" + hashlib.sha256(client_salt.encode()).hexdigest()[:32]


def is_memory_salt(salt: str | None) -> bool:
    return salt is not None and salt.startswith(_PREFIX)


def check_client_salt(salt: str | None) -> None:
    """Refuses a client's salt that looks like ours: it would be saved as memory without being it."""
    if is_memory_salt(salt):
        raise RequestError(f"cache_salt must not start with '{_PREFIX}'; choose another one")


def tag(salt: str | None) -> bytes:
    """What stored KV is filed under, so that a deletion finds it: a digest of the user's salt.

    A client's own salt does not count, so that one deletion finds all of a user's KV.
    """
    if is_memory_salt(salt):
        assert salt is not None
        salt = ":".join(salt.split(":")[:2])
    return hashlib.sha256((salt or "").encode()).digest()


def adapter_tag(lora_name: str) -> bytes:
    """What stands behind the user's tag where an adapter computed the KV; our names name the content."""
    return hashlib.sha256(b"adapter:" + lora_name.encode()).digest()


def tag_of(salt: str | None, lora_request: LoRARequest | None) -> bytes:
    """What a request's KV is filed under (``store.tags``): user, and adapter if it has one."""
    return tag(salt) if lora_request is None else tag(salt) + adapter_tag(lora_request.lora_name)
