"""Files of forgotten chunks, on their way out: a thread removes them, since an unlink may wait for the file system.

A chunk leaves in this order: its block keys leave memory (``disk_index``), its files go, its record goes. A file that
outlived its record would come back at the next start; a record without files is dropped there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from memos_vllm.store import chunk_files
from memos_vllm.store.chunk_records import ChunkRecord


@dataclass(frozen=True, slots=True)
class _Leaving:
    """An evicted chunk, until its files are gone."""

    record: ChunkRecord
    removal: Future[list[str]]


class ChunkRemoval:
    """Called from the index's thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._thread = ThreadPoolExecutor(1, "memos-kv-removal")
        self._leaving: dict[str, _Leaving] = {}
        self._removed: deque[str] = deque()
        """Chunks whose files are gone and whose records are not; LMDB is used from the index's thread only."""

    def __contains__(self, chunk: str) -> bool:
        """Whether files of an evicted chunk may still be there."""
        return (leaving := self._leaving.get(chunk)) is not None and not leaving.removal.done()

    def evict(self, records: Sequence[ChunkRecord]) -> None:
        """Removes their files; durably some time."""
        if records:
            removal = self._thread.submit(self._remove, records, durably=False)
            self._leaving.update((record.chunk, _Leaving(record, removal)) for record in records)

    def delete(self, records: Sequence[ChunkRecord]) -> Future[list[str]]:
        """Removes their files for good; those that the file system refuses to remove."""
        return self._thread.submit(self._remove, records, durably=True)

    def leaving(self) -> list[ChunkRecord]:
        """Evicted chunks whose files may still be there."""
        self._leaving = {chunk: each for chunk, each in self._leaving.items() if not each.removal.done()}
        return [each.record for each in self._leaving.values()]

    def take_removed(self) -> list[str]:
        """Chunks whose records may go now."""
        return [self._removed.popleft() for _ in range(len(self._removed))]

    def close(self) -> None:
        """Returns when all files are gone."""
        self._thread.shutdown()

    def _remove(self, records: Sequence[ChunkRecord], durably: bool) -> list[str]:
        """In the thread."""
        paths = (path for record in records for path in chunk_files.rank_paths(self._root, record))
        undeleted = chunk_files.unlink(paths, durably=durably)
        self._removed.extend(record.chunk for record in records)
        return undeleted
