"""The index of KV files against the files, without a server: what ``memos doctor`` says of activation memory.

Nothing here is ever lost for good. What the index or a file has wrong is a miss, and is computed
again; so a repair takes out what is not whole, and the next start adopts whole files by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from memos_vllm.errors import KVFileError
from memos_vllm.store import chunk_files
from memos_vllm.store.chunk_records import ChunkRecord, open_records
from memos_vllm.store.kv_file import read_header
from memos_vllm.store.ops import path_for_rank


@dataclass(slots=True)
class KVReport:
    chunks: int = 0
    blocks: int = 0
    problems: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine_kv(kv_dir: Path, repair: bool = False) -> KVReport:
    """Looks at the index and at the header and length of each file; a directory that a server uses is left out."""
    report = KVReport()
    for root in sorted(kv_dir.glob("dp*")):
        with unused(root) as is_unused:
            if is_unused:
                _examine(root, report, repair)
            else:
                report.notes.append(f"{root} is in use by a server and was not examined")
    return report


def _examine(root: Path, report: KVReport, repair: bool) -> None:
    records, damage = _records(root / "index")
    broken: dict[str, str] = {}
    found = {(each.identity, each.chunk, each.tag): each for each in chunk_files.scan(root, clean=repair)}
    for record in records:
        files = found.pop((record.identity, record.chunk, record.tag), None)
        report.chunks += 1
        report.blocks += len(record.keys)
        if problem := _problem(root, record, set() if files is None else files.ranks):
            broken[record.chunk] = problem
    if found:
        report.notes.append(f"{root}: {len(found)} chunks without a record; the next start adopts or removes them")
    lines = [f"kv {root.name}/{chunk[:12]}: {text}" for chunk, text in broken.items()]
    if damage:
        lines.append(f"kv {root.name}: the index is damaged ({damage}); it is built again from the files")
    if not repair:
        report.problems += lines
        return
    report.mended += lines
    if damage or broken:
        index, _ = open_records(root / "index")  # moves a damaged one aside
        index.apply(delete=broken)
        index.sync()
        index.close()
    chunk_files.unlink(
        path_for_rank(chunk_files.path_template(root, record.identity, record.chunk, record.tag), rank)
        for record in records
        if record.chunk in broken
        for rank in range(record.world_size)
    )


def _problem(root: Path, record: ChunkRecord, ranks: set[int]) -> str | None:
    if missing := set(range(record.world_size)) - ranks:
        return f"the file of rank {min(missing)} is not there"
    template = chunk_files.path_template(root, record.identity, record.chunk, record.tag)
    try:
        for rank in range(record.world_size):
            if read_header(path_for_rank(template, rank)).keys != record.keys:
                return f"the file of rank {rank} holds other blocks than the index says"
    except (KVFileError, OSError) as error:
        return str(error)
    return None


def _records(index: Path) -> tuple[list[ChunkRecord], str | None]:
    """The records; or none, and why they cannot be read."""
    data = index / "data.mdb"
    if not data.exists():
        return [], None
    try:
        with lmdb.open(str(index), readonly=True, lock=False) as env:
            if data.stat().st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
                return [], "it is truncated"
            with env.begin() as txn:
                return [ChunkRecord.decode(bytes(name).decode(), bytes(raw)) for name, raw in txn.cursor()], None
    except (lmdb.Error, ValueError, OSError) as error:
        return [], str(error)


@contextlib.contextmanager
def unused(root: Path) -> Iterator[bool]:
    """Whether no server holds the directory; none can take it within the block."""
    try:
        fd = os.open(root / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(fd)
