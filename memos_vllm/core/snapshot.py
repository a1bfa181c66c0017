"""A learned state as text, cut into small parts: copied part by part, encoded part by part.

A loop that must not stop for long copies a few parts, goes on with its work, and copies the next. While
it copies nothing may change; that is short. What was copied does not change any more, so encoding it,
which takes several times as long, can be spread out at leisure.

    state   mappings, nested, down to values; a large table is an iterator over its records
    part    path of keys, whether its value is a piece of a table, and the value
    text    one line of JSON per part, after a line that says how many follow
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

PART_RECORDS = 64
"""Records of a table in one part; it takes about 0.1 ms to copy and 0.4 ms to encode, on a core as CI machines have."""

Part = tuple[tuple[str, ...], bool, Any]


def parts(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Part]:
    """Copies the state; each step copies one part. Values must be immutable or copies already."""
    for key, value in state.items():
        where = (*path, key)
        if isinstance(value, Mapping) and value:
            yield from parts(value, where)
        elif isinstance(value, Iterator):
            records = list(islice(value, PART_RECORDS))
            yield where, True, records
            while records := list(islice(value, PART_RECORDS)):
                yield where, True, records
        else:
            yield where, False, value


def encode(part: Part) -> bytes:
    """A line. Frozen dataclasses become objects."""
    return json.dumps(part, separators=(",", ":"), default=asdict).encode() + b"\n"


def head(copied: Sequence[Part]) -> bytes:
    return json.dumps({"parts": len(copied)}).encode() + b"\n"


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """All at once."""
    copied = list(parts(state))
    return head(copied) + b"".join(map(encode, copied))


def from_bytes(data: bytes) -> dict[str, Any]:
    """The state; its tables as lists.

    Raises:
        ValueError: not such a text, or not all of it.
    """
    lines = data.splitlines()
    try:
        first = json.loads(lines[0])
        if not isinstance(first, dict) or first.get("parts") != len(lines) - 1:
            raise ValueError(f"{len(lines) - 1} parts, where the first line says {first}")
        return _joined(map(json.loads, lines[1:]))
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a snapshot: {error!r}") from error


def _joined(read: Iterable[Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for (*above, key), is_piece, value in read:
        inner = state
        for name in above:
            inner = inner.setdefault(name, {})
        if is_piece:
            inner.setdefault(key, []).extend(value)
        else:
            inner[key] = value
    return state
