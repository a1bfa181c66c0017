"""Names of chunk files, and what is found in a directory of them.

    root/<identity>/<ch>/<chunk id>.<tag>.r<rank>.safetensors

``<identity>``: the first 16 hex digits of its digest; ``<ch>``: the first two of the chunk id;
``<tag>``: the owner's tag in hex, ``-`` for none. The tag is in the name so that a chunk whose record
was lost can still be forgotten with its owner.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memos_vllm.durable import sync
from memos_vllm.errors import KVFileCorrupt, KVFileError
from memos_vllm.store.chunk_records import ChunkRecord
from memos_vllm.store.identity import KVIdentity, chunk_id
from memos_vllm.store.kv_file import TEMPORARY_SUFFIX, check_owner, read_header
from memos_vllm.store.ops import path_for_rank

logger = logging.getLogger(__name__)

MAX_TAG_BYTES = 64

_DIRECTORY = re.compile(r"[0-9a-f]{16}")
_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"(?P<chunk>[0-9a-f]{40})\.(?P<tag>-|(?:[0-9a-f]{2})+)\.r(?P<rank>\d+)\.safetensors")
PATHS = rf"{_DIRECTORY.pattern}(?:/{_FAN_OUT.pattern}(?:/(?:{_FILE.pattern}|\..*{re.escape(TEMPORARY_SUFFIX)}))?)?"
"""Pattern of what is written here, below a root."""

Name = tuple[str, str, bytes]
"""Identity, chunk and tag."""


@dataclass(slots=True)
class FoundChunk:
    """Files that belong together."""

    identity: str
    chunk: str
    tag: bytes
    ranks: set[int] = field(default_factory=set)


def identity_name(identity: KVIdentity) -> str:
    return identity.digest().hex()[:16]


def name_of(chunk: ChunkRecord | FoundChunk) -> Name:
    """By which files and records belong together."""
    return chunk.identity, chunk.chunk, chunk.tag


def path_of(root: Path, chunk: ChunkRecord | FoundChunk) -> str:
    """The path of a chunk, with ``{rank}`` in the place of the rank."""
    directory = root / chunk.identity / chunk.chunk[:2]
    return str(directory / f"{chunk.chunk}.{chunk.tag.hex() or '-'}.r{{rank}}.safetensors")


def rank_paths(root: Path, record: ChunkRecord) -> list[str]:
    """The paths of its files, one per rank."""
    return [path_for_rank(path_of(root, record), rank) for rank in range(record.world_size)]


def found_paths(root: Path, found: FoundChunk) -> list[str]:
    """The paths of the files that are there."""
    return [path_for_rank(path_of(root, found), rank) for rank in found.ranks]


def scan(root: Path, clean: bool = True) -> dict[Name, FoundChunk]:
    """All chunks under ``root``, whole or not. Removes temporary files if it may ``clean``; leaves files that are
    not ours."""
    found: dict[Name, FoundChunk] = {}
    for directory in _subdirectories(root, _DIRECTORY):
        for fan_out in _subdirectories(directory, _FAN_OUT):
            for entry in list(os.scandir(fan_out)):
                if entry.name.startswith(".") and entry.name.endswith(TEMPORARY_SUFFIX):
                    if clean:
                        os.unlink(entry.path)
                elif match := _FILE.fullmatch(entry.name):
                    tag = b"" if match["tag"] == "-" else bytes.fromhex(match["tag"])
                    name = (directory.name, match["chunk"], tag)
                    found.setdefault(name, FoundChunk(*name)).ranks.add(int(match["rank"]))
    return found


def adopt(root: Path, found: FoundChunk, identity: KVIdentity, world_size: int) -> ChunkRecord | None:
    """A record made from the files' headers, or None if they are incomplete, damaged or another identity's."""
    if found.identity != identity_name(identity) or found.ranks != set(range(world_size)):
        return None
    template = path_of(root, found)
    size_bytes = 0
    keys = None
    for rank in range(world_size):
        path = path_for_rank(template, rank)
        try:
            header = read_header(path)
            check_owner(header, path, identity, rank)
            if chunk_id(header.keys) != found.chunk:
                raise KVFileCorrupt(f"{path} holds other keys than its name says")
        except (KVFileError, OSError) as error:
            logger.warning("a KV file is removed: %s", error)
            return None
        size_bytes += len(header.keys) * header.block_bytes
        keys = header.keys
    return ChunkRecord(found.chunk, found.identity, world_size, size_bytes, found.tag, keys, last_use=0)


def unlink(paths: Iterable[str], durably: bool = False) -> list[str]:
    """Removes files; a file that is not there is fine. Returns those that could not be removed, logged."""
    left = []
    directories = set()
    for path in paths:
        directories.add(os.path.dirname(path))
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("cannot remove a KV file: %s", error)
            left.append(path)
    for directory in directories if durably else ():
        try:
            sync(directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("cannot sync a KV directory: %s", error)
            left.append(directory)
    return left


def _subdirectories(path: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    for entry in list(os.scandir(path)):
        if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)
