"""What becomes of a document's pieces when it is stored: kept, new, superseded, or over.

The pieces are the document. Nothing else is stored of it, so a rollback, a deletion of a single piece or a
correction by hand leaves nothing that could disagree with them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from memos_vllm.core.lifecycle import State
from memos_vllm.memory import links, removal, succession, tables
from memos_vllm.memory.documents.pieces import Piece
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.types import MemoryId

_START = -1


@dataclass(slots=True)
class Stored:
    """A document as it is now, and what storing it did."""

    name: str
    content_type: str
    memories: list[MemoryId] = field(default_factory=list)
    """Its pieces in their order."""

    kept: int = 0
    added: int = 0
    superseded: int = 0
    ended: int = 0
    """Pieces that are no longer in it, and nothing in their place."""

    def as_json(self) -> dict[str, Any]:
        return {
            "object": "document",
            "name": self.name,
            "content_type": self.content_type,
            "memories": list(self.memories),
            **{name: getattr(self, name) for name in ("kept", "added", "superseded", "ended")},
        }


def current(user: UserReader, name: str) -> list[MemoryRecord]:
    """The document's pieces in their order."""
    return sorted((record for record in user.pieces(name) if record.is_current), key=_offset)


def keep(
    user: UserWriter,
    name: str,
    content_type: str,
    pieces: Sequence[Piece],
    given: Mapping[str, Any],
    now: datetime,
    *,
    history: bool = True,
) -> Stored:
    """Stores a document in the place of what has its name.

    A piece with the same text keeps its id, hence its vector and its KV. One with another text in the same
    place supersedes it; it inherits tags and pin.

    Args:
        given: ``tags``, ``pinned`` and ``cube`` where they were given; they then hold for every piece.
        history: whether pieces that are over stay readable, as superseded memories do, or are removed.
    """
    old = current(user, name)
    matches = match([record.text for record in old], [piece.text for piece in pieces])
    stored = Stored(name, content_type)
    records: list[MemoryRecord] = []
    unmatched = set(range(len(old)))
    for piece, known in zip(pieces, matches, strict=True):
        before = None if known is None else old[known]
        origin = _origin(name, content_type, piece, before, given)
        if known is not None:
            unmatched.discard(known)
        if before is not None and before.text == piece.text:
            records.append(_kept(user, before, origin, given, now))
            stored.kept += 1
            continue
        new = _new(user, piece, origin, before if history else None, given, now)
        records.append(new)
        stored.added += before is None
        stored.superseded += before is not None
        if before is not None and history:
            _unlink(user, before, now)
            succession.supersede(user, before, new, now)
        elif before is not None:
            removal.remove(user, before.id)
    for place in unmatched:
        stored.ended += _end(user, old[place], now, history)
    _connect(user, records, now)
    if not history:  # nobody's prompts are salted by this user: there is no KV to remove
        user.clear("kv_removals")
    stored.memories = [record.id for record in records]
    return stored


def match(old: Sequence[str], new: Sequence[str]) -> list[int | None]:
    """For each new text the old one it is, or takes the place of.

    First equal texts, in their order. Then those that stand at the same distance behind the same equal one:
    what was edited in place.
    """
    places: dict[str, deque[int]] = defaultdict(deque)
    for place, text in enumerate(old):
        places[text].append(place)
    found = [places[text].popleft() if places.get(text) else None for text in new]
    new_of = {known: place for place, known in enumerate(found) if known is not None}
    behind: dict[int, deque[int]] = defaultdict(deque)
    anchor = _START
    for place in range(len(old)):
        if place in new_of:
            anchor = new_of[place]
        else:
            behind[anchor].append(place)
    anchor = _START
    for place, known in enumerate(found):
        if known is not None:
            anchor = place
        elif behind.get(anchor):
            found[place] = behind[anchor].popleft()
    return found


def _kept(
    user: UserWriter, record: MemoryRecord, origin: Mapping[str, Any], given: Mapping[str, Any], now: datetime
) -> MemoryRecord:
    """The same text, perhaps at another place. What was archived comes back."""
    if record.state is State.FROZEN:
        return record
    values = {name: given[name] for name in ("tags", "pinned") if name in given}
    if any(getattr(record, name) != value for name, value in values.items()):
        record = user.change(record, now, origin=origin, **values)
    elif record.origin != origin:
        moved = replace(record, origin=origin, updated_at=now)
        user.put(moved, record)
        record = moved
    return user.use(record, "stored_again", now) if record.state is State.ARCHIVED else record


def _new(
    user: UserWriter,
    piece: Piece,
    origin: Mapping[str, Any],
    before: MemoryRecord | None,
    given: Mapping[str, Any],
    now: datetime,
) -> MemoryRecord:
    return user.insert(
        now,
        text=piece.text,
        type="document",
        pinned=given.get("pinned", before.pinned if before else False),
        tags=given.get("tags", before.tags if before else ()),
        session=None,
        sensitivity=before.sensitivity if before else "normal",
        priority=before.priority if before else 0,
        origin=origin,
        supersedes=before.id if before and before.state is not State.FROZEN else None,
    )


def _end(user: UserWriter, record: MemoryRecord, now: datetime, history: bool) -> bool:
    """It is no longer in the document; a frozen one stays as it is."""
    if not history:
        removal.remove(user, record.id)
        return True
    if record.state is State.FROZEN:
        return False
    _unlink(user, record, now)
    user.put(replace(record, valid_to=now, updated_at=now), record)
    user.happened(record, "ended", now, by="document")
    return True


def _unlink(user: UserWriter, record: MemoryRecord, now: datetime) -> None:
    for link in list(links.of(user, record.id, type=links.FOLLOWED_BY)):
        if link.valid_to is None:
            links.close(user, link, now)


def _connect(user: UserWriter, records: Sequence[MemoryRecord], now: datetime) -> None:
    """Each with the next one, and with no other."""
    for place, record in enumerate(records):
        follows = records[place + 1].id if place + 1 < len(records) else None
        is_linked = False
        for link in list(links.of(user, record.id, end=tables.FROM, type=links.FOLLOWED_BY)):
            if link.target == follows and link.valid_to is None:
                is_linked = True
            elif link.valid_to is None:
                links.close(user, link, now)
        if follows is not None and not is_linked:
            links.connect(user, record.id, follows, links.FOLLOWED_BY, now)


def _origin(
    name: str, content_type: str, piece: Piece, before: MemoryRecord | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    place = {"name": name, "content_type": content_type, "section": list(piece.path), "offset": piece.offset}
    if piece.page is not None:
        place["page"] = piece.page
    cube = given.get("cube") or (before.origin.get("cube") if before else None)
    return {"source": "document", "document": place, **({"cube": cube} if cube else {})}


def _offset(record: MemoryRecord) -> tuple[int, str]:
    return record.origin["document"]["offset"], record.id
