"""Which file holds which block: the scheduler side's index of the disk tier.

    root/index/                          LMDB, see chunk_records
    root/<identity>/<ch>/<chunk>...      one file per chunk and rank, see chunk_files
    root/lock                            held while an index is open

All look-ups are answered from memory. The files are the truth: opening drops records without files
and adopts whole files without a record. So neither a lost index nor a crash between two steps needs
a repair. Files of evicted and deleted chunks go in a thread (``chunk_removal``). Recency is written with the
next commits or removals, some of it at a time, and at ``close``; a crash forgets only the order of what was
touched since.

One thread (the scheduler's) owns an index. A root is for one server, whose ranks see the same files.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from memos_vllm.errors import DataDirError
from memos_vllm.store import chunk_files, tags
from memos_vllm.store.chunk_records import ChunkRecord, open_records
from memos_vllm.store.chunk_removal import ChunkRemoval
from memos_vllm.store.disk_room import DiskRoom, Space
from memos_vllm.store.identity import KVIdentity, chunk_id
from memos_vllm.store.reconciliation import reconcile
from memos_vllm.store.root_lock import RootLock
from memos_vllm.store.use_clock import UseClock
from memos_vllm.types import BlockKey

logger = logging.getLogger(__name__)

TOUCHES_PER_COMMIT = 32
"""Records of used chunks that are written together with a new one: 13 us each on a Xeon core of 2 GHz, in the
engine's step."""

MAX_LEAVING_BYTES = 2**30
"""Of evicted chunks whose files are still there: by so much the disk may hold more than the budget for a while."""


@dataclass(frozen=True, slots=True)
class Location:
    chunk: str
    position: int


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    chunk: str
    path: str
    """Contains ``{rank}``."""


@dataclass(frozen=True, slots=True)
class DropReport:
    chunks: int
    blocks: int
    bytes: int
    removal: Future[list[str]] = field(compare=False)
    """Of the files: done when they are gone for good; files that the file system refuses to remove."""


class DiskIndex:
    """Block key to place on disk, under a budget, least recently used chunks first to go.

    Args:
        root: directory; created if it is missing.
        identity: of this server. Chunks of other identities are kept (a server may switch between
            models) and evicted like any other, but never found.
        budget_bytes: KV bytes over all ranks and identities.
        world_size: number of ranks, each with one file per chunk.
        reserve_bytes: to be left free on the file system, for which the budget is lowered; see ``DiskRoom``.

    Raises:
        DataDirError: ``root`` cannot be used.
        DataDirInUse: another index has it open.
    """

    def __init__(
        self,
        root: Path,
        identity: KVIdentity,
        budget_bytes: int,
        world_size: int,
        reserve_bytes: int | None = 0,
        statvfs: Callable[[Path], Space] = os.statvfs,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = Path(root).absolute()
        self.clock = UseClock()
        self._room = DiskRoom(self.root, budget_bytes, reserve_bytes, statvfs, now)
        self._identity, self._world_size = identity, world_size
        self._identity_name = chunk_files.identity_name(identity)
        self._ready: OrderedDict[str, ChunkRecord] = OrderedDict()  # oldest use first
        self._writing: dict[str, ChunkRecord] = {}
        self._doomed: set[str] = set()  # being written, not wanted any more
        self._before_full: set[str] = set()  # being written when the disk was last found full
        self._locations: dict[BlockKey, Location] = {}
        self._keys_in_writing: set[BlockKey] = set()
        self._pins: Counter[str] = Counter()
        self._unread: set[str] = set()  # the last read of it failed
        self._touched: dict[str, None] = {}  # recency not yet in LMDB
        self._usage_bytes = 0
        self._lock = RootLock(self.root)
        self._removal = ChunkRemoval(self.root)
        try:
            self._records, records = open_records(self.root / "index")
            self._recover(records)
        except OSError as error:
            self._lock.release()
            raise DataDirError(f"cannot use the KV directory {self.root}: {error}") from error
        except BaseException:
            self._lock.release()
            raise

    def __len__(self) -> int:
        """Blocks that ``lookup`` finds."""
        return len(self._locations)

    def __contains__(self, key: BlockKey) -> bool:
        """On disk or being written: not to be planned again."""
        return key in self._locations or key in self._keys_in_writing

    @property
    def budget_bytes(self) -> int:
        """KV bytes that may be held now."""
        return self._room.budget_bytes

    @property
    def usage_bytes(self) -> int:
        """KV bytes on disk and being written. What was evicted does not count, though its files may still be there."""
        return self._usage_bytes

    def lookup(self, key: BlockKey) -> Location | None:
        """Where a block is. Does not count as a use, see ``touch``."""
        return self._locations.get(key)

    def path_of(self, chunk: str) -> str:
        """The file of a chunk on disk or being written; contains ``{rank}``."""
        return chunk_files.path_of(self.root, self._ready.get(chunk) or self._writing[chunk])

    def tag_of(self, chunk: str) -> bytes:
        """The tag of a chunk on disk or being written."""
        return (self._ready.get(chunk) or self._writing[chunk]).tag

    def plan_write(
        self, keys: Sequence[BlockKey], size_bytes: int, tag: bytes, last_use: int | None = None
    ) -> PlannedChunk | None:
        """Makes room for a chunk of ``keys``; None if it cannot fit, and nothing was evicted.

        Also if the same chunk was evicted just now: its file is not to be written while a thread removes it.

        Args:
            keys: in the order of the file; none may be in the index.
            size_bytes: KV bytes over all ranks.
            tag: whom ``drop_tag`` names to forget it; at most 64 bytes.
            last_use: of the keys, by the clock: nothing that was used later is evicted. None: just now.

        End it by ``commit`` or ``abort``.
        """
        assert keys and len(set(keys)) == len(keys) and not any(key in self for key in keys)
        assert len(tag) <= chunk_files.MAX_TAG_BYTES
        self.keep_reserve(size_bytes)
        chunk = chunk_id(keys)
        leaving_bytes = self._leaving_bytes()
        victims = self._victims(size_bytes)
        if victims is None or chunk in self._removal or (victims and leaving_bytes > MAX_LEAVING_BYTES):
            return None
        if last_use is not None and any(each.last_use > last_use for each in victims):
            return None
        self._evict(victims)
        record = ChunkRecord(chunk, self._identity_name, self._world_size, size_bytes, tag, tuple(keys), 0)
        self._writing[record.chunk] = record
        self._keys_in_writing.update(keys)
        self._usage_bytes += size_bytes
        return PlannedChunk(record.chunk, chunk_files.path_of(self.root, record))

    def commit(self, chunk: str, last_use: int | None = None) -> bool:
        """Every rank has written its file: the blocks can be found. False if it was dropped meanwhile.

        Args:
            last_use: of its keys, by the clock. None: just now.
        """
        record = self._end_write(chunk)
        self._before_full.discard(chunk)
        if chunk in self._doomed:
            self._discard(record)
            return False
        record.last_use = self.clock.tick() if last_use is None else last_use
        self._publish(record)
        self._persist(put=[record])
        return True

    def abort(self, chunk: str, *, no_space: bool = False) -> None:
        """A rank failed, and no rank writes any more. Removes what there is.

        Args:
            no_space: it failed since the disk is full; the budget is lowered, and the oldest chunks go.
        """
        self._discard(self._end_write(chunk))
        is_news = chunk not in self._before_full
        self._before_full.discard(chunk)
        if no_space and is_news:
            self._before_full = set(self._writing)
            self._room.ran_full(self._held_bytes)
            self._evict(self._oldest(self._usage_bytes - self.budget_bytes))

    def keep_reserve(self, planned_bytes: int = 0) -> None:
        """Looks, if it is time, how much the disk has room for, and evicts what is beyond that.

        Called when nothing that was looked up is about to be pinned.
        """
        self._room.look(self._held_bytes, planned_bytes)
        self._evict(self._oldest(self._usage_bytes - self.budget_bytes))

    def pin(self, chunk: str) -> None:
        """It is going to be read: not evicted until ``unpin``. Counted."""
        assert chunk in self._ready
        self._pins[chunk] += 1

    def unpin(self, chunk: str) -> None:
        """A read ended; fine for a chunk that was dropped meanwhile."""
        assert self._pins[chunk] > 0, "unpin without pin"
        self._pins[chunk] -= 1
        if not self._pins[chunk]:
            del self._pins[chunk]

    def read_failed(self, chunk: str) -> None:
        """The file system refused to read a chunk. The second time in a row it is dropped, for as long as it is found
        its blocks are not saved anew, and each request for them pays a load that fails."""
        if chunk in self._unread:
            self.drop(chunk)
        elif chunk in self._ready:
            self._unread.add(chunk)

    def read_succeeded(self, chunk: str) -> None:
        """Earlier failures do not count any more."""
        self._unread.discard(chunk)

    def touch(self, chunk: str) -> None:
        """Counts as a use."""
        if record := self._ready.get(chunk):
            record.last_use = self.clock.tick()
            self._ready.move_to_end(chunk)
            self._touched[chunk] = None

    def drop(self, chunk: str) -> None:
        """Forgets a chunk (a read found it damaged, say), also one that is being read or written.

        Its files go at once, or when the write ends; a read of a file that is gone fails, and vLLM recomputes.
        """
        if chunk in self._writing:
            self._doomed.add(chunk)
        elif chunk in self._ready:
            self._remove([self._ready[chunk]])

    def drop_tag(self, tag: bytes) -> DropReport:
        """Forgets all chunks with ``tag``, of every identity. Their files go in a thread.

        A part of a chunk's tag counts (``store.tags``), and no chunk may be written with it any more. Chunks
        that are being written are counted and go when their write ends.
        """
        leaving = self._removal.leaving()
        gone = tags.with_part((each.tag for each in (*self._ready.values(), *self._writing.values(), *leaving)), tag)
        written = [record for record in self._ready.values() if record.tag in gone]
        writing = [
            record for record in self._writing.values() if record.tag in gone and record.chunk not in self._doomed
        ]
        self._forget(written)
        evicted = [record for record in leaving if record.tag in gone]  # for good, now
        removal = self._removal.delete([*written, *evicted])
        self._doomed.update(record.chunk for record in writing)
        dropped = written + writing
        num_blocks = sum(len(record.keys) for record in dropped)
        size_bytes = sum(record.size_bytes for record in dropped)
        return DropReport(len(dropped), num_blocks, size_bytes, removal)

    def close(self) -> None:
        """Writes recency and releases the directory. May be called twice."""
        if not self._lock.is_held:
            return
        self._removal.close()
        self._persist(max_touched=len(self._touched))
        self._sync()
        self._records.close()
        self._lock.release()

    def check_integrity(self) -> None:
        """Asserts that the look-ups, the chunks, the sizes and the pins agree."""
        records = [*self._ready.values(), *self._writing.values()]
        uses = [record.last_use for record in self._ready.values()]
        assert uses == sorted(uses)
        assert self._usage_bytes == sum(record.size_bytes for record in records)
        own = [record for record in self._ready.values() if record.identity == self._identity_name]
        expected = {key: Location(record.chunk, i) for record in own for i, key in enumerate(record.keys)}
        assert self._locations == expected
        assert self._keys_in_writing == {key for record in self._writing.values() for key in record.keys}
        assert self._doomed <= self._writing.keys() and not self._ready.keys() & self._writing.keys()

    def _recover(self, records: Iterable[ChunkRecord]) -> None:
        found = reconcile(self.root, records, self._identity, self._world_size)
        for record in found.kept:
            self._publish(record)
            self.clock.now = max(self.clock.now, record.last_use)
        for record in found.adopted:
            record.last_use = self.clock.tick()
            self._publish(record)
        self._persist(put=found.adopted, delete=found.lost)
        if found.lost or found.adopted:
            logger.info(
                "KV directory %s: %d chunks without files dropped, %d adopted",
                self.root, len(found.lost), len(found.adopted),
            )  # fmt: skip
        self._room.look(self._held_bytes, 0)
        self._remove(self._oldest(self._usage_bytes - self.budget_bytes))

    def _victims(self, size_bytes: int) -> list[ChunkRecord] | None:
        """The least recently used chunks whose removal makes room for ``size_bytes``; None if there are not enough."""
        excess = self._usage_bytes + size_bytes - self.budget_bytes
        victims = self._oldest(excess)
        return victims if sum(record.size_bytes for record in victims) >= excess else None

    def _oldest(self, size_bytes: int) -> list[ChunkRecord]:
        """The least recently used chunks that nobody reads, up to ``size_bytes`` or all of them."""
        oldest = []
        for record in self._ready.values():
            if size_bytes <= 0:
                break
            if not self._pins[record.chunk]:
                oldest.append(record)
                size_bytes -= record.size_bytes
        return oldest

    @property
    def _held_bytes(self) -> int:
        """On disk, as far as is known: of what is being written nobody knows; what was evicted may be there still."""
        return self._usage_bytes - sum(record.size_bytes for record in self._writing.values()) + self._leaving_bytes()

    def _publish(self, record: ChunkRecord) -> None:
        self._file_by_use(record)
        if record.identity == self._identity_name:
            self._locations.update((key, Location(record.chunk, i)) for i, key in enumerate(record.keys))
        self._usage_bytes += record.size_bytes

    def _file_by_use(self, record: ChunkRecord) -> None:
        """A chunk may be ready only after others that were used later."""
        later = list(itertools.takewhile(lambda each: each.last_use > record.last_use, reversed(self._ready.values())))
        self._ready[record.chunk] = record
        for each in reversed(later):
            self._ready.move_to_end(each.chunk)

    def _end_write(self, chunk: str) -> ChunkRecord:
        record = self._writing.pop(chunk)
        self._keys_in_writing.difference_update(record.keys)
        self._usage_bytes -= record.size_bytes
        return record

    def _discard(self, record: ChunkRecord) -> None:
        """Removes the files of a chunk that was never published."""
        doomed = record.chunk in self._doomed
        self._doomed.discard(record.chunk)
        chunk_files.unlink(chunk_files.rank_paths(self.root, record), durably=doomed)

    def _evict(self, records: Sequence[ChunkRecord]) -> None:
        """Forgets published chunks; their files go in a thread."""
        self._forget(records)
        self._removal.evict(records)

    def _leaving_bytes(self) -> int:
        """Of evicted chunks whose files may still be there."""
        return sum(record.size_bytes for record in self._removal.leaving())

    def _remove(self, records: Sequence[ChunkRecord]) -> None:
        """Forgets published chunks and removes their files."""
        self._forget(records)
        chunk_files.unlink(path for record in records for path in chunk_files.rank_paths(self.root, record))
        if records:
            self._persist(delete=[record.chunk for record in records])

    def _forget(self, records: Sequence[ChunkRecord]) -> None:
        """They are found no more."""
        for record in records:
            del self._ready[record.chunk]
            self._touched.pop(record.chunk, None)
            self._unread.discard(record.chunk)
            self._usage_bytes -= record.size_bytes
            for key in record.keys:
                self._locations.pop(key, None)

    def _persist(
        self, put: Sequence[ChunkRecord] = (), delete: Sequence[str] = (), max_touched: int = TOUCHES_PER_COMMIT
    ) -> None:
        """Brings LMDB up to date. A failure (disk full) costs recency, no look-up: the files are the truth."""
        touched = [self._ready[chunk] for chunk in itertools.islice(self._touched, max_touched)]
        removed = self._removal.take_removed()
        try:
            self._records.apply([*touched, *put], [*delete, *removed])
            for record in touched:
                del self._touched[record.chunk]
        except lmdb.Error as error:
            logger.warning(
                "the KV index %s was not written (%s); the next start rebuilds it from the files", self.root, error
            )

    def _sync(self) -> None:
        try:
            self._records.sync()
        except lmdb.Error as error:
            logger.warning("the KV index %s was not synced (%s)", self.root, error)
