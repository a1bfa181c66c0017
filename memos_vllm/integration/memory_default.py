"""Whether a chat request that says nothing of memory has it: by its key, or by the server; and what else it may not
have meant."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from memos_vllm.errors import RequestError
from memos_vllm.integration import identity
from memos_vllm.integration.state import MemosState
from memos_vllm.types import Principal

logger = logging.getLogger(__name__)


def is_on(headers: Mapping[str, str], state: MemosState) -> bool:
    """A request without a key never has it, nor one of an application's that names no user."""
    if not headers.get("authorization"):
        return False
    try:
        by_key = identity.resolve(headers, state.config.identity).memory_by_default
    except identity.UserNotNamed as error:
        if _applies(error.memory_by_default, state):
            _warn(error.key, state)
        return False
    except RequestError:
        return False
    return _applies(by_key, state)


def _applies(by_key: bool | None, state: MemosState) -> bool:
    return state.config.memory.default == "on" if by_key is None else by_key


def _warn(key: str, state: MemosState) -> None:
    """Once for each key: its application does the same with every request."""
    if key not in state.nameless_keys:
        state.nameless_keys.add(key)
        logger.warning(
            "requests with the API key %s have memory by default, but are answered without: it has many users and they "
            "name none. Give the key a 'user' under identity.keys, set identity.trusted_user_header, or have the "
            "application send 'memos': {'user': ...}",
            key,
        )


_OPENAI_USER = "user of OpenAI's API"


def warn_of_openai_user(who: Principal, openai_user: str | None, state: MemosState) -> None:
    """OpenAI's field ``user`` is whom an application serves, too; ours stands in ``memos``. Said once: anybody may
    send any number of keys that are not listed."""
    if not openai_user or openai_user == who.user or who.user != identity.DEFAULT_USER:
        return
    if _OPENAI_USER not in state.nameless_keys:
        state.nameless_keys.add(_OPENAI_USER)
        logger.warning(
            "a chat request of the tenant %s has memory and the field 'user' of OpenAI's API, which names nobody here: "
            "whoever sends this API key shares the memory of one user, 'default'. Where they are several people, have "
            "the application send 'memos': {'user': ...} (said once)",
            who.tenant,
        )
