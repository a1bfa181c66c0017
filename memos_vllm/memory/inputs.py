"""Checks on what callers hand in; each failure is a ``RequestError`` of one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from memos_vllm.errors import RequestError
from memos_vllm.memory.records import TYPES

MAX_TEXT_BYTES = 2**20
MAX_TAGS = 10_000
MAX_NAME_CHARS = 256
"""Of a tag or a session."""

MAX_LIMIT = 1000
MAX_BATCH = 10_000
MAX_BATCH_BYTES = 64 * 2**20
"""Of the texts of a batch; while it is written, every other writer waits."""


def check_memory(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a new memory, checked and with their defaults; ``text`` is required."""
    if unknown := values.keys() - _FIELDS.keys():
        raise RequestError(f"unknown field {min(unknown)!r}; a memory has {', '.join(_FIELDS)}")
    return {name: check(values.get(name, default)) for name, (check, default) in _FIELDS.items()}


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
    unique = tuple(dict.fromkeys(_name(tag, "tags") for tag in tags))
    if len(unique) > MAX_TAGS:
        raise RequestError(f"{len(unique)} tags are too many; a memory has at most {MAX_TAGS}")
    return unique


def check_session(session: Any) -> str | None:
    return None if session is None else _name(session, "session")


def check_origin(origin: Any) -> dict[str, Any]:
    if not isinstance(origin or {}, Mapping):
        raise RequestError(f"'origin' must be an object, not {type(origin).__name__}")
    return dict(origin or {})


def check_limit(value: Any, name: str = "limit") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_LIMIT:
        raise RequestError(f"'{name}' must be a whole number from 1 to {MAX_LIMIT}, not {value!r}")
    return value


def _name(value: Any, name: str) -> str:
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
}
"""What a new memory is made of: the check of each field and its default."""
