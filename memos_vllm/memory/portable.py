"""A user's memories as lines of JSON, to leave one server and enter another.

    {"format": "memos-memories", "version": 1, "exported_at": ..., "memories": 2, "versions": 1, "links": 1, ...}
    {"memory": {as the API shows it}, "usage": {"uses": 3, "last_used_at": ...}}
    {"version": {an earlier version of the memory above}}
    {"link": {as the API shows it}}

The header comes first, versions behind their memory, links last. Vectors and KV are not in it: they are made again.
What is read was perhaps not written here, so every field is checked as if it came from anybody.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

from memos_vllm.core.lifecycle import State
from memos_vllm.errors import RequestError
from memos_vllm.memory import inputs, links, records
from memos_vllm.memory.documents.library import check_document_name
from memos_vllm.memory.links import Link
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserReader
from memos_vllm.memory.usage import Usage
from memos_vllm.types import MemoryId

FORMAT = "memos-memories"
FORMAT_VERSION = 1
MAX_LINE_BYTES = 16 * 2**20
MAX_COUNT = 10**9
"""Of uses and of versions; PostgreSQL's views have 32 bits."""

_MIN_MOMENT, _MAX_MOMENT = datetime(1, 1, 2, tzinfo=UTC), datetime(3000, 1, 1, tzinfo=UTC)
"""What can still be added to, and shown in any time zone."""

_MAX_ID_MS = 32_503_680_000_000
"""The year 3000. The ids of a user only grow: one from the end of time would leave none for what he says next."""

_PLAIN = ("text", "type", "pinned", "tags", "session", "origin", "priority", "sensitivity", "valid_from")
"""As in a new memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A memory, an earlier version of one (no usage), or a link."""

    record: MemoryRecord | None = None
    usage: Usage | None = None
    link: Link | None = None


@dataclass(frozen=True, slots=True)
class Header:
    memories: int
    versions: int
    links: int


def lines(user: UserReader, now: datetime) -> Iterator[bytes]:
    """All that the user has, as of the reader's moment. Needs no more memory than the longest line."""
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "exported_at": now.isoformat(),
        "tenant": user.who.tenant,
        "user": user.who.user,
        "memories": sum(1 for _ in user.rows("records")),
        "versions": sum(1 for _ in user.rows("versions")),
        "links": sum(1 for _ in user.rows("links")),
    }
    yield _line(header)
    for record in user.scan():
        used = user.usage(record.id)
        last = used.last_used_at.isoformat() if used.last_used_at else None
        yield _line({"memory": record.as_json(), "usage": {"uses": used.uses, "last_used_at": last}})
        for old in user.versions(record.id):
            yield _line({"version": old.as_json()})
    for _, raw in user.rows("links"):
        yield _line({"link": links.decode(raw).as_json()})


def read_header(file: BinaryIO) -> Header:
    """
    Raises:
        RequestError: it is no export, or one that only a newer version reads.
    """
    values = _parsed(file.readline(MAX_LINE_BYTES), 1)
    if values.get("format") != FORMAT:
        raise RequestError(f"line 1: this is no export of memories; its first line has 'format': '{FORMAT}'")
    version = _count(values.get("version"), "version", at_least=1)
    if version > FORMAT_VERSION:
        raise RequestError(
            f"line 1: the export has the format version {version}, and this server reads versions up to "
            f"{FORMAT_VERSION}; import it into a newer version of Memos"
        )
    return Header(*(_count(values.get(name), name) for name in ("memories", "versions", "links")))


def entries(file: BinaryIO) -> Iterator[Entry]:
    """What follows the header, each line checked alone.

    Raises:
        RequestError: names the line that is wrong.
    """
    number = 1
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if not line.strip():
            continue
        try:
            yield _entry(_parsed(line, number))
        except RequestError as error:
            said = str(error)
            raise RequestError(said if said.startswith("line ") else f"line {number}: {said}") from error


def derived_id(identifier: str, content: str) -> MemoryId:
    """Another id for what cannot keep its own: the same one each time, and as old."""
    digest = hashlib.blake2b(f"{identifier}\n{content}".encode(), digest_size=10).digest()
    bits = int.from_bytes(digest, "big")
    time = uuid.UUID(identifier).int >> 80
    return MemoryId(str(uuid.UUID(int=time << 80 | 0x7 << 76 | (bits >> 62 & 0xFFF) << 64 | 0b10 << 62 | bits % 2**62)))


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes, number: int) -> Mapping[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise RequestError(f"line {number} has more than {MAX_LINE_BYTES} bytes")
    try:
        values = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"line {number} is no JSON in UTF-8: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise RequestError(f"line {number} is no JSON object")
    return values


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _entry(values: Mapping[str, Any]) -> Entry:
    kinds = values.keys() - {"usage"}
    if kinds == {"memory"}:
        return Entry(_record(values["memory"]), _usage(values.get("usage") or {}))
    if values.keys() == {"version"}:
        return Entry(_record(values["version"]))
    if values.keys() == {"link"}:
        return Entry(link=_link(values["link"]))
    raise RequestError("a line has 'memory' (and 'usage'), 'version' or 'link'")


def _record(given: Any) -> MemoryRecord:
    values = _known(given, "memory", _RECORD)
    plain = inputs.check_memory({name: values[name] for name in _PLAIN if name in values})
    plain.pop("ttl_s")
    checked = {name: check(values.get(name), name) for name, check in _RECORD.items() if name not in _PLAIN}
    _check_origin(plain["origin"])
    created_at = checked.pop("created_at")
    if created_at is None:
        raise RequestError("'created_at' is missing")
    updated_at = checked.pop("updated_at") or created_at
    record = MemoryRecord(tenant="", user="", **{**plain, **checked}, created_at=created_at, updated_at=updated_at)
    if record.superseded_by is not None and record.valid_to is None:
        raise RequestError("'superseded_by' stands without 'valid_to'")
    _check_moment(record.valid_from, "valid_from")
    _check_encodes(lambda: records.encode(record))
    return record


def _usage(given: Any) -> Usage:
    values = _known(given, "usage", ("uses", "last_used_at"))
    return Usage(_count(values.get("uses", 0), "uses"), _moment(values.get("last_used_at"), "last_used_at"))


def _link(given: Any) -> Link:
    values = _known(given, "link", ("id", "from", "to", "type", "created_at", "valid_from", "valid_to", "origin"))
    moments = {name: _moment(values.get(name), name) for name in ("created_at", "valid_from", "valid_to")}
    created_at = moments["created_at"]
    if created_at is None:
        raise RequestError("'created_at' is missing")
    link = Link(
        id=_id(values.get("id"), "id"),
        source=_id(values.get("from"), "from"),
        target=_id(values.get("to"), "to"),
        type=inputs.check_link_type(values.get("type"), ()),
        created_at=created_at,
        valid_from=moments["valid_from"] or created_at,
        valid_to=moments["valid_to"],
        origin=inputs.check_origin(values.get("origin")),
    )
    if link.source == link.target:
        raise RequestError("a link joins two memories; 'to' is the memory itself")
    _check_encodes(lambda: links.encode(link))
    return link


def _known(given: Any, what: str, names: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"'{what}' is no object")
    if unknown := given.keys() - {*names, "tenant", "user"}:
        raise RequestError(f"unknown field {min(unknown)[:100]!r} in '{what}'")
    return given


def _check_origin(origin: Mapping[str, Any]) -> None:
    """Of the parts that search and documents read."""
    for name in ("cube", "speaker"):
        if origin.get(name) is not None:
            inputs.check_name(origin[name], name)
    keys = origin.get("keys") or []
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise RequestError("'origin.keys' must be a list of strings")
    place = origin.get("document")
    if place is None:
        return
    section = place.get("section") if isinstance(place, Mapping) else None
    if not isinstance(section, list) or not all(isinstance(heading, str) for heading in section):
        raise RequestError("'origin.document' of a piece has 'name', 'content_type', 'section' and 'offset'")
    check_document_name(place.get("name"))
    inputs.check_name(place.get("content_type"), "content_type")
    _count(place.get("offset"), "offset")
    if "page" in place:
        _count(place["page"], "page")


def _check_encodes(encode: Callable[[], bytes]) -> None:
    try:
        encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise RequestError("'origin' cannot be stored: send valid Unicode, not nested deeply") from error


def _id(value: Any, name: str) -> MemoryId:
    parsed = records.parse_id(value)
    if parsed is None or parsed.version != 7 or parsed.int >> 80 > _MAX_ID_MS:
        raise RequestError(f"'{name}' must be an id as exports have it (a UUID of version 7), not {str(value)[:64]!r}")
    return MemoryId(value)


def _id_or_none(value: Any, name: str) -> MemoryId | None:
    return None if value is None else _id(value, name)


def _count(value: Any, name: str, *, at_least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= MAX_COUNT:
        raise RequestError(f"'{name}' must be a whole number from {at_least} to {MAX_COUNT}, not {str(value)[:40]!r}")
    return value


def _moment(value: Any, name: str) -> datetime | None:
    if value is not None and not isinstance(value, str):
        raise RequestError(f"'{name}' must be a time such as 2026-05-03T10:00:00Z, not {str(value)[:40]!r}")
    return _check_moment(inputs.check_moment(value, name), name)


def _check_moment(moment: datetime | None, name: str) -> datetime | None:
    if moment is not None and not _MIN_MOMENT <= moment < _MAX_MOMENT:
        raise RequestError(f"'{name}' must be between the years 1 and 3000")
    return moment


def _state(value: Any, name: str) -> State:
    if value is None:
        return State.GENERATED
    if value not in list(State):
        raise RequestError(f"unknown state {str(value)[:40]!r}; use one of {', '.join(State)}")
    return State(value)


_RECORD: Mapping[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(_PLAIN, lambda value, name: value),
    "id": _id,
    "created_at": _moment,
    "updated_at": _moment,
    "version": lambda value, name: _count(1 if value is None else value, name, at_least=1),
    "state": _state,
    "expires_at": _moment,
    "uses": lambda value, name: _count(1 if value is None else value, name),
    "supersedes": _id_or_none,
    "superseded_by": _id_or_none,
    "valid_to": _moment,
}
