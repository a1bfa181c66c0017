"""What the memory service answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memos_vllm.memory.records import MemoryRecord
from memos_vllm.types import MemoryId


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
class Recall:
    long_lived: tuple[MemoryRecord, ...]
    late: tuple[Hit, ...]


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
class DeletionReceipt:
    """What a deletion removed, and from where."""

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
