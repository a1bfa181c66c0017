"""Records and files, brought together when a KV directory is opened: the files are the truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from memos_vllm.store import chunk_files
from memos_vllm.store.chunk_records import ChunkRecord
from memos_vllm.store.identity import KVIdentity
from memos_vllm.types import BlockKey


@dataclass(frozen=True, slots=True)
class Reconciled:
    kept: list[ChunkRecord] = field(default_factory=list)
    """Whose files are whole, oldest use first."""
    adopted: list[ChunkRecord] = field(default_factory=list)
    """Made of whole files that had no record; when they were used is not known."""
    lost: list[str] = field(default_factory=list)
    """Chunks of records without files."""


def reconcile(root: Path, records: Iterable[ChunkRecord], identity: KVIdentity, world_size: int) -> Reconciled:
    """Removes files that neither a record nor this server's identity makes anything of, and temporary ones.

    Raises:
        OSError: the directory cannot be read, or a temporary file not be removed.
    """
    out = Reconciled()
    found = chunk_files.scan(root)
    for record in sorted(records, key=lambda record: record.last_use):
        files = found.get(chunk_files.name_of(record))
        if files is None or not files.ranks >= set(range(record.world_size)):
            out.lost.append(record.chunk)
        else:
            del found[chunk_files.name_of(record)]
            out.kept.append(record)
    chunks = {record.chunk for record in out.kept}
    own = chunk_files.identity_name(identity)
    keys: set[BlockKey] = {key for record in out.kept if record.identity == own for key in record.keys}
    for files in found.values():
        adopted = chunk_files.adopt(root, files, identity, world_size)
        if adopted is None or adopted.chunk in chunks or not keys.isdisjoint(adopted.keys):
            chunk_files.unlink(chunk_files.found_paths(root, files))
        else:
            out.adopted.append(adopted)
            chunks.add(adopted.chunk)
            keys.update(adopted.keys)
    return out
