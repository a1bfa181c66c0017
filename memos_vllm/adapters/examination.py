"""The registry of adapters without a server: the index against the files; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from memos_vllm.adapters import names, peft_folder, records
from memos_vllm.adapters.records import Adapter
from memos_vllm.errors import DataDirError

_DATA_FILE = "data.mdb"


@dataclass(slots=True)
class AdapterReport:
    contents: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine_adapters(root: Path) -> AdapterReport:
    """Reads every file of every adapter; a root that is not there has none. May run beside a server."""
    report = AdapterReport()
    try:
        listed = owners_of_contents(root / "index")
    except DataDirError as error:
        report.problems.append(str(error))
        return report
    report.contents = len(listed)
    damaged = {digest: text for digest in listed if (text := _problem(root / "objects" / digest, digest))}
    if damaged:
        listed = owners_of_contents(root / "index")  # again: a deletion may have been under way
    for digest, text in damaged.items():
        report.problems += [f"adapters {who}: {text}; it is to be registered again" for who in listed.get(digest, ())]
    objects = root / "objects"
    unknown = {folder.name for folder in objects.iterdir()} - listed.keys() if objects.is_dir() else set()
    if unknown:
        report.notes.append(f"{objects}: {len(unknown)} contents that no name has; the next start removes them")
    return report


def owners_of_contents(index: Path) -> dict[str, list[str]]:
    """Digests of the registered contents, and who has each: names with version, and their owners.

    Raises:
        DataDirError: the index cannot be read.
    """
    if not (index / _DATA_FILE).is_file():
        return {}
    found: dict[str, list[str]] = {}
    try:
        with open_for_reading(index) as env, env.begin() as txn:
            for adapter in _adapters(env, txn):
                for version in adapter.versions:
                    name = f"{adapter.name}@{version.version} of {adapter.owner}"
                    found.setdefault(version.digest, []).append(name)
    except (lmdb.Error, OSError, ValueError, KeyError, TypeError) as error:
        raise DataDirError(
            f"the index of adapters {index} cannot be read: {error}; restore it from a backup"
        ) from error
    return found


@contextmanager
def open_for_reading(index: Path) -> Iterator[lmdb.Environment]:
    """The index, also beside a server. ``lmdb.Error``, ``OSError`` or ``ValueError`` where it cannot be read."""
    with closing(lmdb.open(str(index), readonly=True, max_dbs=1)) as env:
        # LMDB maps what its header promises; touching pages that a truncation took is a SIGBUS.
        if (index / _DATA_FILE).stat().st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
            raise ValueError("it is truncated")
        yield env


def _adapters(env: lmdb.Environment, txn: lmdb.Transaction) -> Iterator[Adapter]:
    try:
        table = env.open_db(names.TABLE, txn, create=False)
    except lmdb.NotFoundError:
        return
    for _, raw in txn.cursor(table):
        yield records.decode(raw)


def _problem(folder: Path, digest: str) -> str | None:
    try:
        return None if peft_folder.digest_of(folder).hex() == digest else "its files are damaged"
    except FileNotFoundError:
        return "its files are gone"
    except OSError as error:
        return f"its files cannot be read ({error.strerror})"
