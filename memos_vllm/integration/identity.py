"""Who a request acts for: from the API key, a trusted gateway's header, and only then the body.

The key decides the tenant. A key that stands for one user, or a gateway's header, decides the user
too; otherwise the key is an application's, which names its users itself. Nothing in a body reaches
another tenant, or another user than the one the credential stands for. A key that is not listed is a
person's own, so its user need not be named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from memos_vllm import api_keys
from memos_vllm.config import IdentityConfig, KeyConfig
from memos_vllm.errors import Forbidden, RequestError, Unauthorized
from memos_vllm.types import Principal

DEFAULT_USER = "default"
"""Of an unlisted key that names nobody: the one person who has the key."""

_MAX_USER_CHARS = 256


@dataclass(frozen=True, slots=True)
class Identity:
    principal: Principal
    memory_by_default: bool | None
    """What the key's configuration says about requests without a ``memos`` field."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Who may see users, without acting for any."""

    tenant: str | None
    """Whose; None: all tenants', and the server itself."""


class UserNotNamed(RequestError):
    """A request with an application's key says not for whom it is; one user for all would mix people's memories."""

    def __init__(self, key: str, memory_by_default: bool | None) -> None:
        super().__init__(
            "this API key is an application's with many users; name the user: 'memos.user' in a chat request, 'user' "
            "in the body or the form of another, ?user= where there is none, or the header of a trusted gateway"
        )
        self.key = key
        """Of which tenant it is, and how its digest begins."""

        self.memory_by_default = memory_by_default


def resolve(headers: Mapping[str, str], config: IdentityConfig, user_field: str | None = None) -> Identity:
    """The identity behind a request.

    Args:
        headers: case-insensitive.
        user_field: the user that the body or query names, or None.

    Raises:
        Unauthorized: no key, or one that is not listed where that is required.
        Forbidden: ``user_field`` names another user than the credential stands for.
        UserNotNamed: the key is listed and stands for no one user, and nobody is named.
        RequestError: ``user_field``, or what the gateway's header says, is no usable name.
    """
    digest, entry = _credential(headers, config)
    if entry is None and config.unlisted_keys == "refuse":
        raise Unauthorized("this API key has no memory here; the operator lists keys under identity.keys")
    tenant = entry.tenant if entry else f"key-{digest[:32]}"
    fixed_user = entry.user if entry else None
    if config.trusted_user_header:
        named = _named_by_gateway(headers, config.trusted_user_header)
        if not named and fixed_user is None:
            raise Unauthorized(f"the gateway named no user in {config.trusted_user_header}")
        if named and fixed_user not in (None, named):
            raise Forbidden(f"this API key stands for one user, not for {named!r} from {config.trusted_user_header}")
        fixed_user = _checked(named) if named else fixed_user
    user_field = None if user_field is None else _checked(user_field)
    if fixed_user is not None and user_field not in (None, fixed_user):
        raise Forbidden(f"this API key stands for one user and cannot act for {user_field!r}")
    if entry is not None and fixed_user is None and user_field is None:
        raise UserNotNamed(f"sha256:{digest[:8]}... of the tenant {tenant}", entry.memory)
    user = fixed_user or user_field or DEFAULT_USER
    return Identity(Principal(tenant, user), entry.memory if entry else None)


def operator_of(headers: Mapping[str, str], config: IdentityConfig) -> Operator | None:
    """The right that the key's configuration gives; None without one.

    What a gateway sends for a user is that user's, whatever its key may do.

    Raises:
        Unauthorized: no key.
    """
    _, entry = _credential(headers, config)
    if entry is None or entry.operator is None:
        return None
    if config.trusted_user_header and config.trusted_user_header in headers:  # also for an empty one: for nobody
        return None
    return Operator(None if entry.operator == "all" else entry.tenant)


def _credential(headers: Mapping[str, str], config: IdentityConfig) -> tuple[str, KeyConfig | None]:
    """Digest of the key, and what it is listed as."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise Unauthorized("memory needs an API key, which says whose memory it is: send 'Authorization: Bearer KEY'")
    digest = hashlib.sha256(key.encode()).hexdigest()
    # The digest of a key, which a configuration may show, is not a key.
    listed_as = None if key.startswith(api_keys.PREFIX) else config.keys.get(key)
    return digest, listed_as or config.keys.get(api_keys.PREFIX + digest)


def _named_by_gateway(headers: Mapping[str, str], header: str) -> str | None:
    """In UTF-8, as bodies and the configuration are; the server has read its bytes as Latin-1."""
    value = headers.get(header)
    try:
        return None if value is None else value.encode("latin-1").decode()
    except UnicodeError as error:  # a guess could be another user
        raise RequestError(f"the gateway's header {header} is not in UTF-8") from error


def _checked(user: str) -> str:
    if not 0 < len(user) <= _MAX_USER_CHARS:
        raise RequestError(f"'user' must have 1 to {_MAX_USER_CHARS} characters")
    try:
        user.encode()
    except UnicodeEncodeError as error:  # JSON can name what no salt can be made of
        raise RequestError("'user' has half of a surrogate pair, which is no character") from error
    return user
