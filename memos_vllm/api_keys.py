"""API keys as a configuration lists them: in plain text, or as ``sha256:`` and the hex digest of one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

PREFIX = "sha256:"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TO_BE_FILLED_IN = re.compile(r"[A-Z-]+")
"""As in the examples of configurations: DIGEST-OF-THE-GATEWAYS-KEY."""

_HOW = 'compute that of your own key with: printf %s "$KEY" | sha256sum'
_GUESSABLE = (
    *("", "EMPTY", "dummy", "none", "null", "foo", "bar", "baz", "foobar", "test", "demo", "example", "hello"),
    *("key", "KEY", "$KEY", "api-key", "api_key", "apikey", "my-key", "mykey", "sk-test", "token", "token-abc123"),
    *("secret", "password", "changeme", "change-me", "admin", "123", "1234", "123456"),
)


def digest_of(key: str) -> str:
    """As a configuration may list the key."""
    return PREFIX + hashlib.sha256(key.encode()).hexdigest()


_GUESSED: Mapping[str, str] = {digest_of(key + end): key for key in _GUESSABLE for end in ("", "\n")}
"""With a line break too, as ``echo`` adds one."""


def shown(listed: str) -> str:
    """As messages name a key, for the operator to find it and for nobody to use it."""
    if not listed.lower().startswith(PREFIX):
        return f"{listed[: min(4, len(listed) // 2)]}…" if listed else ""
    digest = listed[len(PREFIX) :]
    if _TO_BE_FILLED_IN.fullmatch(digest):
        return listed
    return listed[: len(PREFIX) + (8 if _DIGEST.fullmatch(digest.lower()) else 4)] + "…"


def checked(listed: str) -> str:
    """A key of ``identity.keys`` as requests are compared with it.

    Raises:
        ValueError: no key at all, a digest that no key has, or one of a key that anybody guesses.
    """
    if not listed.strip():
        raise ValueError("is no key; give one, or its digest")
    if not listed.lower().startswith(PREFIX):
        return listed
    digest = listed[len(PREFIX) :].strip().lower()
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"is no digest of a key, which has 64 hex digits behind '{PREFIX}'; {_HOW}")
    if (key := _GUESSED.get(PREFIX + digest)) is not None:
        what = f"is the digest of {key!r}, which anybody guesses" if key else "is the digest of no text at all"
        raise ValueError(f"{what}; {_HOW}")
    return PREFIX + digest


def check_distinct(listed: Iterable[str]) -> None:
    """
    Raises:
        ValueError: two entries are of one key, in other letters or once in plain text.
    """
    known: set[str] = set()
    for each in listed:
        digest = each.lower() if each.lower().startswith(PREFIX) else digest_of(each)
        if digest in known:
            raise ValueError(f"lists one key twice: {digest}")
        known.add(digest)
