"""What the memory service answers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from memos_vllm.memory.holdings import Holdings
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.types import MemoryId, Principal


@dataclass(frozen=True, slots=True)
class Hit:
    record: MemoryRecord
    score: float
    why: dict[str, Any]
    """As JSON: the method; each retriever's score and rank; each matched term's part of the lexical score."""

    before: tuple[MemoryRecord, ...] = ()
    """What was said before it in its conversation, where that was asked for."""

    after: tuple[MemoryRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """What an outside source says to a question; no memory, and never made one."""

    source: str
    """The source's name."""

    text: str
    cited: str
    """A file below the source's folder, or an address."""

    title: str | None = None
    section: tuple[str, ...] = ()
    """Headings above it, outermost first."""

    page: int | None = None
    offset: int | None = None
    """Characters from the start of the document's text."""

    score: float | None = None
    """Comparable within one source and question only."""

    why: dict[str, Any] = field(default_factory=dict)

    @property
    def quoted(self) -> str:
        """As it stands in a prompt, with its citation."""
        page = f", page {self.page}" if self.page is not None else ""
        title = f"{self.title}, " if self.title else ""
        return f"[{self.source}: {title}{self.cited}{page}] {self.text}"

    def as_json(self) -> dict[str, Any]:
        names = ("cited", "title", "section", "page", "offset")
        citation = {name: value for name in names if (value := getattr(self, name)) not in (None, ())}
        citation["section"] = list(self.section)
        return {
            "source": self.source, "text": self.text, "citation": citation, "score": self.score, "why": self.why,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recall:
    long_lived: tuple[MemoryRecord, ...]
    late: tuple[Hit, ...]
    sources: tuple[Passage, ...] = ()
    answering: tuple[MemoryId, ...] = ()
    """Of the long-lived ones those that the question would have found."""

    left_out: int | None = None
    """How many more would be long-lived if there were room, or if the session began now; None: not asked for."""

    @property
    def records(self) -> tuple[MemoryRecord, ...]:
        return (*self.long_lived, *(hit.record for hit in self.late))

    @property
    def ids(self) -> list[str]:
        return [record.id for record in self.records]

    @property
    def versions(self) -> frozenset[tuple[str, int]]:
        """Id and version of each memory."""
        return frozenset((record.id, record.version) for record in self.records)

    def without(self, left_out: Collection[tuple[str, int]]) -> Recall:
        """What is left when these memories, by id and version, are known another way or have no room."""
        standing = tuple(record for record in self.long_lived if (record.id, record.version) not in left_out)
        late = tuple(hit for hit in self.late if (hit.record.id, hit.record.version) not in left_out)
        return replace(self, long_lived=standing, late=late)


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    content_type: str
    pieces: int
    created_at: datetime
    updated_at: datetime
    """When a piece was last changed, or found at another place."""

    def as_json(self) -> dict[str, Any]:
        return {
            "object": "document",
            "name": self.name,
            "content_type": self.content_type,
            "pieces": self.pieces,
            "created_at": self.created_at.isoformat(),
            "updated_at": self.updated_at.isoformat(),
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a session that begins now gets as long-lived memory, and of which state of the memories that is so."""

    long_lived: tuple[MemoryRecord, ...]
    seq: int
    kv_epoch: int


@dataclass(frozen=True, slots=True)
class Page:
    records: tuple[MemoryRecord, ...]
    next: MemoryId | None
    """``after`` of the next page; None on the last one."""


@dataclass(frozen=True, slots=True)
class UsersPage:
    """Who has memories, and how much; never what they say."""

    users: tuple[tuple[Principal, Holdings], ...]
    next: str | None
    """``after`` of the next page; None on the last one."""


@dataclass(frozen=True, slots=True)
class DeletionReceipt:
    """What a deletion removed, and from where."""

    tenant: str
    user: str
    """Whose it was."""

    records: tuple[MemoryId, ...]
    versions: int
    """Earlier versions in the history."""

    postings: int
    """Entries that this call took out of the process's search index: none where the user has no index
    now, or a search of the same moment was faster. Every index follows before it answers again."""

    sessions: int
    """Sessions whose frozen long-lived memory held it."""

    links: int
    snapshot_entries: int
    derived: tuple[MemoryId, ...]
    """Memories, such as adapters, that say they were made from it. They are still there."""

    kv_epoch: int
    """The user's new one: KV of earlier epochs cannot be reached any more, in any tier."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "records": list(self.records), "derived": list(self.derived)}
