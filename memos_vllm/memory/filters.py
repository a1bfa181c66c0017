"""Which memories a search may find, beside what it looks for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime

from memos_vllm.memory.records import UNPROMPTED_TYPES, MemoryRecord
from memos_vllm.types import MemoryId

_LABEL = "\0"
"""First character of a label's term in the index; no word has it."""


@dataclass(frozen=True, slots=True)
class Filter:
    """All that is given must hold. The user is no filter: an index holds one user's memories."""

    type: str | None = None
    tags: tuple[str, ...] = ()
    """A memory must have every one."""

    session: str | None = None
    cube: str | None = None
    said_from: datetime | None = None
    said_before: datetime | None = None
    archived: bool = False
    """Whether archived memories are found too."""

    for_prompt: bool = False
    """Whether sensitive memories, and types that do not go into prompts by themselves, are left out."""

    without: Collection[MemoryId] = frozenset()

    def labels(self) -> Iterator[str]:
        """Terms that a memory must have."""
        for name in ("type", "session", "cube"):
            if (value := getattr(self, name)) is not None:
                yield label(name, value)
        yield from (label("tag", tag) for tag in self.tags)

    def unwanted_labels(self) -> Iterator[str]:
        if not self.archived:
            yield label("state", "archived")
        if self.for_prompt:
            yield label("sensitivity", "sensitive")
            yield from (label("type", each) for each in sorted(UNPROMPTED_TYPES))


def label(name: str, value: str) -> str:
    return f"{_LABEL}{name}{_LABEL}{value}"


def labels_of(record: MemoryRecord) -> Iterator[str]:
    yield label("type", record.type)
    yield label("state", record.state)
    yield label("sensitivity", record.sensitivity)
    if record.session is not None:
        yield label("session", record.session)
    if cube := record.origin.get("cube"):
        yield label("cube", str(cube))
    yield from (label("tag", tag) for tag in record.tags)
