"""One memory takes the place of another: it contradicts it, or it says the same.

Both stay in the history, joined by a link, and by fields of the records that the link repeats:

    supersedes   new -> old     the old one's validity ends; its text was true until then
    merged_into  copy -> kept   the copy is ``merged``; the kept one has the provenance of both
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from memos_vllm.core.lifecycle import IN_RECALL, Move, State
from memos_vllm.errors import Conflict
from memos_vllm.memory import links, tables
from memos_vllm.memory.links import Link
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserReader, UserWriter
from memos_vllm.types import MemoryId


def supersede(user: UserWriter, old: MemoryRecord, new: MemoryRecord, now: datetime) -> None:
    """Takes an old memory out of use; ``new.supersedes`` names it already if it is the last one of several.

    A frozen one stays as it is, beside the new one: a link says that they contradict each other.
    """
    if old.state is State.FROZEN:
        links.connect(user, new.id, old.id, links.CONTRADICTS, now)
        return
    user.put(replace(old, superseded_by=new.id, valid_to=now, updated_at=now), old)
    links.renew(user, new.id, old.id, links.SUPERSEDES, now)
    user.happened(old, "superseded", now, by=new.id)
    for derived in restated(user, old):
        if derived.is_current and derived.id != new.id:
            supersede(user, derived, new, now)


def merge(
    user: UserWriter, kept: MemoryRecord, copies: Sequence[MemoryRecord], now: datetime, text: str | None = None
) -> MemoryRecord:
    """The kept memory takes over what the copies have: tags, pin, priority, how often they were said.

    Args:
        text: what the memory says from now on; None leaves it, and is no new version unless the rest changes.

    Raises:
        Conflict: one of them is frozen, over or superseded.
    """
    for record in (kept, *copies):
        if not record.is_current or record.state is State.FROZEN:
            standing = record.state if record.state is State.FROZEN or record.valid_to is None else "not current"
            raise Conflict(f"the memory {record.id} is {standing} and cannot be merged")
    values = {
        "text": kept.text if text is None else text,
        "tags": tuple(dict.fromkeys(tag for record in (kept, *copies) for tag in record.tags)),
        "pinned": any(record.pinned for record in (kept, *copies)),
        "priority": max(record.priority for record in (kept, *copies)),
    }
    uses = sum(record.uses for record in (kept, *copies))
    if values["text"] != kept.text:
        archive_restated(user, kept, now)
    if any(getattr(kept, name) != value for name, value in values.items()):
        kept = user.change(kept, now, uses=uses, **values)
    else:
        kept, old = replace(kept, uses=uses, updated_at=now), kept
        user.put(kept, old)
    for copy in copies:
        user.move(copy, Move.MERGE, now, superseded_by=kept.id, valid_to=now)
        links.renew(user, copy.id, kept.id, links.MERGED_INTO, now, origin=copy.origin)
        user.happened(copy, "merged", now, into=kept.id)
        user.happened(kept, "took_over", now, other=copy.id)
    return kept


def match_links(user: UserWriter, now: datetime, of: MemoryId | None = None) -> None:
    """Makes links say what records say, after records were brought back; of one memory, or of all."""
    found = links.of(user, of) if of else (links.decode(raw) for _, raw in user.rows("links"))
    for link in list(found):
        if (right := matched(user, link, now)) is not link:
            links.close(user, link, right.valid_to)


def matched(user: UserReader, link: Link, now: datetime) -> Link:
    """The link as the records have it: of a correction or merge, true as long as they say so."""
    if link.type not in links.RESERVED:
        return link
    replaced, by = link.source, link.target
    if link.type == links.SUPERSEDES:
        replaced, by = by, replaced
    record = user.get(replaced)
    assert record is not None
    if (record.superseded_by == by) == (link.valid_to is None):
        return link
    return replace(link, valid_to=now if link.valid_to is None else None)


def join(user: UserWriter, record: MemoryRecord) -> None:
    """Makes the link that a superseded or merged record implies."""
    assert record.superseded_by is not None
    since = record.valid_to or record.updated_at
    if record.state is State.MERGED:
        links.renew(user, record.id, record.superseded_by, links.MERGED_INTO, since)
    else:
        links.renew(user, record.superseded_by, record.id, links.SUPERSEDES, since)


def restated(user: UserReader, record: MemoryRecord) -> list[MemoryRecord]:
    """What a model made of a memory alone, or of it and others; it is true as long as they are."""
    found = (user.get(link.source) for link in links.of(user, record.id, end=tables.TO, type=links.DERIVED_FROM))
    return [derived for derived in found if derived is not None and derived.origin.get("source") == "refiner"]


def archive_restated(user: UserWriter, record: MemoryRecord, now: datetime) -> None:
    """The memory says something else now, or is not to be recalled: nor is what a model made of it."""
    for derived in restated(user, record):
        if derived.is_current and derived.state in IN_RECALL - {State.FROZEN}:
            user.happened(user.move(derived, Move.ARCHIVE, now), "archived", now, by=record.id)


def predecessors(user: UserReader, memory_id: MemoryId) -> list[MemoryId]:
    """What a memory superseded, and what was merged into it."""
    superseded = links.of(user, memory_id, end=tables.FROM, type=links.SUPERSEDES)
    copies = links.of(user, memory_id, end=tables.TO, type=links.MERGED_INTO)
    return [
        *(link.target for link in superseded if link.valid_to is None),
        *(link.source for link in copies if link.valid_to is None),
    ]


def history(user: UserReader, record: MemoryRecord) -> list[MemoryRecord]:
    """What became this memory: what it superseded or took over, oldest first, its earlier versions, itself."""
    told: dict[MemoryId, list[MemoryRecord]] = {}
    waiting = [record.id]
    while waiting:
        memory_id = waiting.pop()
        found = user.get(memory_id)
        if found is not None and memory_id not in told:
            told[memory_id] = [*user.versions(memory_id), found]
            waiting += predecessors(user, memory_id)
    before = sorted(memory_id for memory_id in told if memory_id != record.id)
    return [version for memory_id in (*before, record.id) for version in told[memory_id]]
