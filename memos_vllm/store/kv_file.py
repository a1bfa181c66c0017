"""One chunk of one rank as an immutable safetensors file.

The file holds one uint8 tensor ``blocks`` ``[n, block_bytes]`` and, as metadata, the identity, the
rank, the keys of the blocks and an xxh3-64 checksum of each. Any safetensors reader opens it.

The header is written and read here by hand, for three reasons: rows come from host slots that lie
apart, and the library wants one contiguous tensor, so it would double the memory; it neither syncs
nor cuts its work into pieces that a load can overtake; and a partial read into memory that exists
(``preadv``) needs the offset of the data, which the library hides. A test holds both to each other.

Rows are anything that yields uint8 tensors of ``block_bytes`` in CPU memory: a matrix, or a list. A reader
also takes rows in several parts, and then reads a block straight to where its parts belong.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from xxhash import xxh3_64, xxh3_64_hexdigest

from memos_vllm.durable import sync
from memos_vllm.errors import KVChecksumMismatch, KVFileCorrupt, KVFileMismatch
from memos_vllm.store.identity import KVIdentity
from memos_vllm.types import BlockKey

if TYPE_CHECKING:
    from torch import Tensor

    Rows = Tensor | Sequence[Tensor]

Row = Sequence[np.ndarray]
"""A block's memory: one-dimensional parts of uint8, in the order of the file."""

PIECE_BYTES = 8 * 2**20
"""Work between two points at which a load may overtake a write."""

TEMPORARY_SUFFIX = ".tmp"
_MAX_HEADER_BYTES = 16 * 2**20  # a bit flip in the length must not allocate the whole memory
_DATA_ALIGNMENT = 4096  # so that a reader may use O_DIRECT or GPUDirect Storage
_MAX_BUFFERS = 1024  # IOV_MAX
CACHED_BYTES = 2**20
"""What is read before it is checked: so much is still in the core's own cache then.

On a Xeon with 2 MiB of it, one thread read and checked 64 MiB from the page cache at 5.1 GB/s in such
steps, at 3.9 GB/s in one.
"""
_Item = TypeVar("_Item")
_Buffer = TypeVar("_Buffer", memoryview, np.ndarray)


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, str]
    keys: tuple[BlockKey, ...]
    checksums: tuple[str, ...]
    block_bytes: int
    data_offset: int


def write_chunk_in_pieces(
    path: str | os.PathLike[str], blocks: Rows, keys: Sequence[BlockKey], identity: KVIdentity, rank: int
) -> Generator[int, None, None]:
    """Writes a chunk so that it is visible whole or not at all, and on disk when the iterator ends.

    Yields after every piece the number of its blocks, which are synced then. Closing the iterator early removes the
    temporary file.

    Args:
        blocks: rows, one per key.

    Raises:
        OSError: disk full, say. Nothing is left behind.
    """
    path = Path(path)
    rows = _buffers(blocks)
    assert len(rows) == len(keys) > 0
    header = _encode_header(rows, keys, identity, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write_all(fd, [memoryview(header)])
            for piece in pieces(rows, rows[0].nbytes):
                _write_all(fd, piece)
                # Not once at the end: one sync of a whole chunk is longer than a read should wait.
                os.fdatasync(fd)
                yield len(piece)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:  # GeneratorExit too
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync(path.parent)


class ChunkReader:
    """An open chunk file whose header fits identity and rank. One thread.

    Raises:
        KVFileMismatch: another identity or rank wrote the file, or other keys stand where they are read.
        KVFileCorrupt: truncated, malformed, or a checksum does not match.
        OSError: the file cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str], identity: KVIdentity, rank: int) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.header = _parse_header(self._fd, path)
            check_owner(self.header, path, identity, rank)
        except BaseException:
            self.close()
            raise

    def check(self, positions: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """Raises KVFileMismatch unless the file says that it holds ``keys`` at ``positions``."""
        held = self.header.keys
        for position, key in zip(positions, keys, strict=True):
            if not 0 <= position < len(held) or held[position] != key:
                raise KVFileMismatch(f"{self.path} does not hold block {key.hex()} at position {position}")

    def read(self, positions: Sequence[int], keys: Sequence[BlockKey], rows: Sequence[Row]) -> None:
        """The blocks at ``positions`` into ``rows``; on an error their content is undefined."""
        header = self.header
        assert len(positions) == len(keys) == len(rows)
        self.check(positions, keys)
        for row in rows:
            if (row_bytes := sum([part.nbytes for part in row])) != header.block_bytes:
                raise KVFileMismatch(f"{self.path} has blocks of {header.block_bytes} bytes, not {row_bytes}")
        begin = 0
        while begin < len(rows):
            most = min(items_per_step(header.block_bytes), max(1, _MAX_BUFFERS // len(rows[begin])))
            end = begin + 1
            while end < len(rows) and end - begin < most and positions[end] == positions[end - 1] + 1:
                end += 1
            offset = header.data_offset + positions[begin] * header.block_bytes
            if header.block_bytes > CACHED_BYTES:
                checksums = [self._read_long(rows[begin], offset)]
            else:
                _read_all(self._fd, [part for row in rows[begin:end] for part in row], offset, self.path)
                checksums = map(_checksum, rows[begin:end])
            for position, checksum in zip(positions[begin:end], checksums, strict=True):
                if checksum != header.checksums[position]:
                    raise KVChecksumMismatch(
                        f"{self.path}: the checksum of block {header.keys[position].hex()} at position {position} "
                        "does not match"
                    )
            begin = end

    def _read_long(self, row: Row, offset: int) -> str:
        """Reads a block that is longer than the cache, with every part of it checked there."""
        digest = xxh3_64()
        for parts in _cut(row, CACHED_BYTES):
            _read_all(self._fd, parts, offset, self.path)
            for part in parts:
                digest.update(part)
                offset += part.nbytes
        return digest.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a file of any identity, with the file's size checked against it.

    Raises:
        KVFileCorrupt: truncated or malformed.
        OSError: the file cannot be opened or read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _parse_header(fd, path)
    finally:
        os.close(fd)


def check_owner(header: Header, path: str | os.PathLike[str], identity: KVIdentity, rank: int) -> None:
    """Raises KVFileMismatch, naming what differs, unless ``identity`` and ``rank`` wrote the file."""
    differing = identity.differences(header.metadata)
    if header.metadata.get("rank") != str(rank):
        differing.append("rank")
    if differing:
        raise KVFileMismatch(f"{path} was written with another {', '.join(differing)}")


def pieces(items: Sequence[_Item], item_bytes: int, most: int | None = None) -> Iterator[Sequence[_Item]]:
    """Cuts ``items`` into parts of at most ``PIECE_BYTES``, and at most ``most`` items, but at least one."""
    return parts_of(items, min(items_per_piece(item_bytes), most or len(items) or 1))


def parts_of(items: Sequence[_Item], step: int) -> Iterator[Sequence[_Item]]:
    for begin in range(0, len(items), step):
        yield items[begin : begin + step]


def items_per_piece(item_bytes: int) -> int:
    return max(1, PIECE_BYTES // item_bytes)


def items_per_step(item_bytes: int) -> int:
    """Whose bytes are still in the core's cache after they were read, at least one."""
    return max(1, CACHED_BYTES // item_bytes)


def _encode_header(rows: Sequence[memoryview], keys: Sequence[BlockKey], identity: KVIdentity, rank: int) -> bytes:
    shape = [len(rows), rows[0].nbytes]
    metadata = identity.as_metadata() | {
        "rank": str(rank),
        "keys": " ".join(key.hex() for key in keys),
        "checksums": " ".join(map(xxh3_64_hexdigest, rows)),
    }
    blocks = {"dtype": "U8", "shape": shape, "data_offsets": [0, shape[0] * shape[1]]}
    text = json.dumps({"__metadata__": metadata, "blocks": blocks}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _parse_header(fd: int, path: str | os.PathLike[str]) -> Header:
    file_bytes = os.fstat(fd).st_size
    text_bytes = int.from_bytes(os.pread(fd, 8, 0), "little")
    if file_bytes < 8 or not 2 <= text_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise KVFileCorrupt(f"{path} is truncated or no chunk: a header of {text_bytes} bytes in {file_bytes}")
    try:
        content = json.loads(os.pread(fd, text_bytes, 8).decode())
        metadata, blocks = content["__metadata__"], content["blocks"]
        keys = cast(tuple[BlockKey, ...], tuple(map(bytes.fromhex, metadata["keys"].split(" "))))
        checksums = tuple(metadata["checksums"].split(" "))
        num_blocks, block_bytes = blocks["shape"]
        data_bytes = num_blocks * block_bytes
        valid = (
            type(num_blocks) is int
            and type(block_bytes) is int
            and len(keys) == len(checksums) == num_blocks
            and blocks["dtype"] == "U8"
            and blocks["data_offsets"] == [0, data_bytes]
            and content.keys() == {"__metadata__", "blocks"}
            and all(isinstance(value, str) for value in metadata.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KVFileCorrupt(f"{path} has a malformed header: {error}") from error
    if not valid:
        raise KVFileCorrupt(f"{path} has a header that contradicts itself")
    if file_bytes != 8 + text_bytes + data_bytes:
        raise KVFileCorrupt(f"{path} is truncated: {file_bytes} bytes instead of {8 + text_bytes + data_bytes}")
    return Header(metadata, keys, checksums, block_bytes, 8 + text_bytes)


def _buffers(rows: Iterable[Tensor]) -> list[memoryview]:
    return [memoryview(row.numpy()) for row in rows]


def _write_all(fd: int, buffers: Sequence[memoryview]) -> None:
    for begin in range(0, len(buffers), _MAX_BUFFERS):
        rest = list(buffers[begin : begin + _MAX_BUFFERS])
        while rest:
            rest = _after(rest, os.writev(fd, rest))


def _checksum(row: Row) -> str:
    if len(row) == 1:
        return xxh3_64_hexdigest(row[0])
    digest = xxh3_64()
    for part in row:
        digest.update(part)
    return digest.hexdigest()


def _cut(row: Row, most_bytes: int) -> Iterator[list[np.ndarray]]:
    """A row's parts, cut where ``most_bytes`` or as many buffers as a system call takes are full."""
    parts: list[np.ndarray] = []
    room = most_bytes
    for part in row:
        while part.nbytes:
            parts.append(part[:room])
            part = part[room:]
            room -= parts[-1].nbytes
            if not room or len(parts) == _MAX_BUFFERS:
                yield parts
                parts, room = [], most_bytes
    if parts:
        yield parts


def _read_all(fd: int, buffers: Sequence[np.ndarray], offset: int, path: str | os.PathLike[str]) -> None:
    rest = list(buffers)
    while rest:
        count = os.preadv(fd, rest, offset)
        if count == 0:
            raise KVFileCorrupt(f"{path} ends early, at byte {offset}")
        offset += count
        rest = _after(rest, count)


def _after(buffers: list[_Buffer], count: int) -> list[_Buffer]:
    """What is left of ``buffers`` after their first ``count`` bytes."""
    for index, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[index + 1 :]]
        count -= buffer.nbytes
    return []
