"""Checks on what callers hand in; each failure is a ``RequestError`` of one sentence."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from memos_vllm.core.lifecycle import PRIORITIES, State
from memos_vllm.errors import RequestError
from memos_vllm.memory.records import SENSITIVITIES, TYPES

MAX_TEXT_BYTES = 2**20
MAX_TAGS = 10_000
MAX_NAME_CHARS = 256
"""Of a tag or a session."""

MAX_LIMIT = 1000
MAX_CONTEXT = 10
"""Memories before and after a hit."""
MAX_TTL_S = 100 * 365 * 86400.0
SETTABLE = (State.ACTIVATED, State.ARCHIVED, State.FROZEN)
_LINK_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}")

MAX_BATCH = 10_000
MAX_BATCH_BYTES = 64 * 2**20
"""Of the texts of a batch; while it is written, every other writer waits."""


def check_memory(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a new memory, checked and with their defaults; ``text`` is required."""
    if unknown := values.keys() - _FIELDS.keys():
        raise RequestError(f"unknown field {min(unknown)!r}; a memory has {', '.join(_FIELDS)}")
    checked = {name: check(values.get(name, default)) for name, (check, default) in _FIELDS.items()}
    if checked["type"] == "working" and (checked["session"] is None or checked["ttl_s"] is not None):
        raise RequestError("a memory of type 'working' ends with its session: give 'session', and no 'ttl_s'")
    return checked


def check_changes(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is to change of a memory, checked."""
    if unknown := values.keys() - set(CHANGEABLE):
        raise RequestError(f"{min(unknown)!r} cannot be changed; {', '.join(CHANGEABLE)} can")
    if values.get("type") == "working":
        raise RequestError("a memory is 'working' from its beginning; add it anew with its 'session'")
    return {name: _FIELDS[name][0](value) for name, value in values.items()}


def check_batch(memories: Any) -> list[dict[str, Any]]:
    """Each as ``check_memory``; a problem names the place of the memory that has it."""
    if isinstance(memories, (str, bytes, Mapping)) or not isinstance(memories, Iterable):
        raise RequestError(f"'memories' must be a list of memories, not {type(memories).__name__}")
    checked: list[dict[str, Any]] = []
    size_bytes = 0
    for place, values in enumerate(memories):
        if place == MAX_BATCH:
            raise RequestError(f"'memories' has more than {MAX_BATCH} memories; split the batch")
        if not isinstance(values, Mapping):
            raise RequestError(f"memories[{place}] must be an object with a text, not {type(values).__name__}")
        try:
            checked.append(check_memory(values))
        except RequestError as error:
            raise RequestError(f"memories[{place}]: {error}") from error
        size_bytes += len(checked[-1]["text"].encode())
        if size_bytes > MAX_BATCH_BYTES:
            raise RequestError(f"'memories' has more than {MAX_BATCH_BYTES} bytes of text; split the batch")
    return checked


def check_text(text: Any, name: str = "text") -> str:
    if not isinstance(text, str):
        raise RequestError(f"'{name}' must be a string, not {type(text).__name__}")
    if not text.strip():
        raise RequestError(f"'{name}' is empty; give it at least one character")
    size_bytes = len(_utf8(text, name))
    if size_bytes > MAX_TEXT_BYTES:
        raise RequestError(f"'{name}' has {size_bytes} bytes; a memory holds at most {MAX_TEXT_BYTES}: split it")
    return text


def check_type(value: Any) -> str:
    if value not in TYPES:
        raise RequestError(f"unknown type {value!r}; use one of {', '.join(TYPES)}")
    return str(value)


def check_pinned(value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"'pinned' must be true or false, not {value!r}")
    return value


def check_tags(tags: Any) -> tuple[str, ...]:
    """Without repeats, in their order."""
    if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable):
        raise RequestError(f"'tags' must be a list of strings, not {type(tags).__name__}")
    unique = tuple(dict.fromkeys(check_name(tag, "tags") for tag in tags))
    if len(unique) > MAX_TAGS:
        raise RequestError(f"{len(unique)} tags are too many; a memory has at most {MAX_TAGS}")
    return unique


def check_priority(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in PRIORITIES:
        raise RequestError(f"'priority' must be a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]}, not {value!r}")
    return value


def check_sensitivity(value: Any) -> str:
    if value not in SENSITIVITIES:
        raise RequestError(f"unknown sensitivity {value!r}; use one of {', '.join(SENSITIVITIES)}")
    return str(value)


def check_ttl(value: Any) -> float | None:
    """Seconds; None and 0 for no end."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= MAX_TTL_S:
        raise RequestError(f"'ttl_s' must be seconds from 0 (for ever) to {MAX_TTL_S:.0f}, not {value!r}")
    return float(value) or None


def check_moment(value: Any, name: str) -> datetime | None:
    """A time in UTC. Text is ISO 8601; without a time zone it is UTC."""
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, AttributeError, OverflowError) as error:
        raise RequestError(f"'{name}' must be a time such as 2026-05-03T10:00:00Z, not {value!r}") from error


def check_state(value: Any) -> State:
    """A state that can be asked for."""
    if value not in SETTABLE:
        raise RequestError(f"'state' can be set to {', '.join(SETTABLE)}, not {value!r}")
    return State(value)


def check_link_type(value: Any, reserved: Collection[str]) -> str:
    if not isinstance(value, str) or not _LINK_TYPE.fullmatch(value):
        raise RequestError(f"the type of a link is a word such as 'related_to' or 'part_of', not {value!r}")
    if value in reserved:
        raise RequestError(f"links of type '{value}' follow the memories; merge, correct or roll back instead")
    return value


def check_others(others: Any, memory_id: str) -> tuple[str, ...]:
    if isinstance(others, (str, bytes)) or not isinstance(others, Iterable):
        raise RequestError("'with' must be a list of memory ids")
    found = tuple(dict.fromkeys(others))
    if not found or len(found) > MAX_LIMIT or memory_id in found or not all(isinstance(each, str) for each in found):
        raise RequestError(f"'with' must name 1 to {MAX_LIMIT} other memories")
    return found


def check_session(session: Any) -> str | None:
    return None if session is None else check_name(session, "session")


def check_origin(origin: Any) -> dict[str, Any]:
    if not isinstance(origin or {}, Mapping):
        raise RequestError(f"'origin' must be an object, not {type(origin).__name__}")
    return dict(origin or {})


def check_context(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_CONTEXT:
        raise RequestError(f"'context' must be a whole number from 0 to {MAX_CONTEXT}, not {value!r}")
    return value


def check_limit(value: Any, name: str = "limit") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_LIMIT:
        raise RequestError(f"'{name}' must be a whole number from 1 to {MAX_LIMIT}, not {value!r}")
    return value


def check_place(value: str | None, num_bytes: int) -> bytes:
    """Where a page of a list ended; empty before the first one."""
    if value is None:
        return b""
    try:
        place = bytes.fromhex(value)
    except ValueError:
        place = b""
    if len(place) != num_bytes:
        raise RequestError(f"'after' must be the 'next' of the page before, not {value[:100]!r}")
    return place


def check_name(value: Any, name: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME_CHARS:
        raise RequestError(f"'{name}': {str(value)[:40]!r} is not a string of 1 to {MAX_NAME_CHARS} characters")
    _utf8(value, name)
    return value


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"'{name}' has half of a surrogate pair at {error.start}; send valid Unicode") from error


_FIELDS = {
    "text": (check_text, None),
    "type": (check_type, "fact"),
    "pinned": (check_pinned, False),
    "tags": (check_tags, ()),
    "session": (check_session, None),
    "origin": (check_origin, None),
    "priority": (check_priority, 0),
    "sensitivity": (check_sensitivity, "normal"),
    "valid_from": (lambda value: check_moment(value, "valid_from"), None),
    "ttl_s": (check_ttl, None),
}
"""What a new memory is made of: the check of each field and its default."""

CHANGEABLE = ("text", "type", "pinned", "tags", "priority", "sensitivity", "valid_from", "ttl_s")
