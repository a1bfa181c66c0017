"""Records of chunks, kept in LMDB: the part of the disk index that is not in the files.

    chunk id -> owner (identity, tag), size, keys, last use

LMDB runs without its own lock and without a sync per commit: the index's lock keeps other processes
out, and whatever a crash of the machine loses is found again from the files (``disk_index``). A
record carries a checksum. Anything that cannot be read is moved aside, never repaired.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import lmdb
from xxhash import xxh3_64_digest

from memos_vllm.errors import DataDirError
from memos_vllm.types import BlockKey

logger = logging.getLogger(__name__)

_KEY_BYTES = 32
_MIN_MAP_BYTES = 16 * 2**20
_LAYOUT = struct.Struct("<8sHQQHI")  # identity, world size, size, last use, bytes of the tag, number of keys


@dataclass(slots=True)
class ChunkRecord:
    chunk: str
    identity: str
    """First 16 hex digits of the identity's digest."""
    world_size: int
    """Number of files, one per rank."""
    size_bytes: int
    """KV bytes over all ranks; the headers of the files, a few KiB each, are not counted."""
    tag: bytes
    keys: tuple[BlockKey, ...]
    last_use: int
    """Ticks of the index's clock, not a time."""

    def encode(self) -> bytes:
        assert all(len(key) == _KEY_BYTES for key in self.keys)
        head = _LAYOUT.pack(
            bytes.fromhex(self.identity), self.world_size, self.size_bytes, self.last_use, len(self.tag), len(self.keys)
        )
        content = b"".join((head, self.tag, *self.keys))
        return content + xxh3_64_digest(content)

    @classmethod
    def decode(cls, chunk: str, data: bytes) -> ChunkRecord:
        """Raises ValueError if ``data`` is not what ``encode`` gave."""
        content, checksum = data[:-8], data[-8:]
        if len(content) < _LAYOUT.size or xxh3_64_digest(content) != checksum:
            raise ValueError(f"the record of chunk {chunk} does not match its checksum")
        identity, world_size, size_bytes, last_use, tag_bytes, num_keys = _LAYOUT.unpack_from(content)
        begin = _LAYOUT.size + tag_bytes
        keys = tuple(BlockKey(content[begin + i * _KEY_BYTES : begin + (i + 1) * _KEY_BYTES]) for i in range(num_keys))
        return cls(chunk, identity.hex(), world_size, size_bytes, content[_LAYOUT.size : begin], keys, last_use)


class ChunkRecords:
    """An open LMDB environment. One thread."""

    def __init__(self, path: Path) -> None:
        """Opens or creates. Raises lmdb.Error or ValueError if there is something that is no sound index."""
        path.mkdir(parents=True, exist_ok=True)
        data = path / "data.mdb"
        file_bytes = _size_bytes(data)
        self._environment = lmdb.open(
            str(path), map_size=max(_MIN_MAP_BYTES, 2 * file_bytes), lock=False, sync=False, readahead=False
        )
        if file_bytes:
            # LMDB maps what its header promises; touching pages that a truncation took is a SIGBUS.
            promised = (self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"]
            if file_bytes < promised:
                self._environment.close()
                raise ValueError(f"the index has {file_bytes} bytes instead of {promised}")

    def load(self) -> list[ChunkRecord]:
        """All records. Raises lmdb.Error or ValueError if one is unsound."""
        with self._environment.begin() as transaction:
            return [ChunkRecord.decode(bytes(name).decode(), bytes(data)) for name, data in transaction.cursor()]

    def apply(self, put: Iterable[ChunkRecord] = (), delete: Iterable[str] = ()) -> None:
        """One transaction, deletions first: all or nothing. Raises lmdb.Error if the disk is full."""
        changes = [(record.chunk.encode(), record.encode()) for record in put]
        removals = [chunk.encode() for chunk in delete]
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for name in removals:
                        transaction.delete(name)
                    for name, data in changes:
                        transaction.put(name, data)
                return
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])

    def sync(self) -> None:
        self._environment.sync(True)

    def close(self) -> None:
        self._environment.close()


def open_records(path: Path) -> tuple[ChunkRecords, list[ChunkRecord]]:
    """Opens the records, or, if they are damaged, moves them aside and starts with none.

    Raises:
        DataDirError: neither is possible.
        OSError: the directory cannot be written.
    """
    opening = path.with_name(f"{path.name}.opening")
    crashed = opening.exists()
    opening.touch()
    try:
        if crashed:  # LMDB may end the process on a damaged page; this file is the only trace then
            raise ValueError("the process ended while it read the index")
        records = ChunkRecords(path)
        try:
            return records, records.load()
        except BaseException:
            records.close()
            raise
    except (lmdb.Error, ValueError, OSError) as error:
        if not _size_bytes(path / "data.mdb"):  # nothing to be damaged: no room, or no permission
            raise DataDirError(f"cannot create the KV index {path}: {error}") from error
        aside = _move_aside(path, error)
        logger.warning("the KV index %s is damaged (%s); moved to %s, rebuilt from the files", path, error, aside.name)
    finally:
        opening.unlink(missing_ok=True)
    try:
        return ChunkRecords(path), []
    except (lmdb.Error, OSError) as error:
        raise DataDirError(f"cannot create the KV index {path}: {error}") from error


def _size_bytes(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _move_aside(path: Path, reason: Exception) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    try:
        os.rename(path, aside)
    except OSError as error:
        raise DataDirError(f"cannot read the KV index {path} ({reason}) nor move it aside ({error})") from error
    return aside
