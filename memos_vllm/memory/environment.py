"""The LMDB environment of the store: opened with checks, so that a bad file is an error and not a crash."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from memos_vllm.errors import DataDirError
from memos_vllm.memory import tables

DATA_FILE = "data.mdb"
_MAX_READERS = 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MAGIC_AT = slice(16, 20)
_MAGIC = (0xBEEFC0DE).to_bytes(4, sys.byteorder)


def open_for_writing(path: Path, map_bytes: int) -> lmdb.Environment:
    """
    Raises:
        DataDirError: see ``store.MemoryStore``.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            env = _open(path, map_bytes)
        except lmdb.InvalidError:
            with _alone(path):
                if not _was_never_begun(path / DATA_FILE):
                    raise
                os.truncate(path / DATA_FILE, 0)
                env = _open(path, map_bytes)
    except (lmdb.Error, OSError) as error:
        raise unusable(path, error) from error
    try:
        _check_length(env, path / DATA_FILE)
    except DataDirError:
        env.close()
        raise
    return env


def _open(path: Path, map_bytes: int) -> lmdb.Environment:
    return lmdb.open(
        str(path),
        map_size=whole_pages(map_bytes),
        max_dbs=len(tables.NAMES),
        max_readers=_MAX_READERS,
        mode=0o600,
    )


def _was_never_begun(file: Path) -> bool:
    """Whether this is what a full disk or a crash leaves of a new file: a part of LMDB's first two pages.

    They are written at once, before anything else, so nothing was ever stored.
    """
    head = file.read_bytes()[: _MAGIC_AT.stop] if file.stat().st_size < 2 * _PAGE_BYTES else b""
    return head[_MAGIC_AT] == _MAGIC and len(head) == _MAGIC_AT.stop


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process at a time begins a file anew."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def check_is_store(path: Path) -> None:
    """
    Raises:
        DataDirError: there is no store, not even a damaged one.
    """
    if not (path / DATA_FILE).is_file():
        raise DataDirError(
            f"there is no memory store in {path}; name a data_dir that a server has used, "
            "and its configuration by --config if memories are in a database"
        )


def open_for_reading(path: Path) -> lmdb.Environment:
    """Changes nothing, also beside a running server.

    Raises:
        DataDirError: there is no such store, or it cannot be read.
    """
    check_is_store(path)
    try:
        env = lmdb.open(str(path), readonly=True, max_dbs=len(tables.NAMES), max_readers=_MAX_READERS)
    except (lmdb.Error, OSError) as error:
        raise unusable(path, error) from error
    if missing_bytes := _missing_bytes(env, path / DATA_FILE):
        env.close()
        raise DataDirError(
            f"{path / DATA_FILE} ends {missing_bytes} bytes too early; "
            "a start of the server, or 'memos doctor --repair', says whether anything is lost"
        )
    return env


def tables_of(env: lmdb.Environment, txn: lmdb.Transaction, path: Path) -> dict[str, Any]:
    """The handles of the named databases of a store with this version's schema.

    Raises:
        DataDirError: it has another one.
    """
    try:
        meta = env.open_db(b"meta", txn, create=False)
        schema = int(txn.get(b"schema_version", b"0", db=meta))
        if schema == tables.SCHEMA_VERSION:
            return {
                name: env.open_db(name.encode(), txn, create=False, dupsort=name in tables.SEVERAL_VALUES)
                for name in tables.NAMES
            }
    except (lmdb.NotFoundError, lmdb.ReadonlyError) as error:
        raise DataDirError(f"{path / DATA_FILE} is no memory store; name a data_dir that a server has used") from error
    raise DataDirError(
        f"{path} has schema {schema}, this Memos {tables.SCHEMA_VERSION}; "
        + ("upgrade Memos" if schema > tables.SCHEMA_VERSION else "start the server once, or repair: both migrate it")
    )


def _missing_bytes(env: lmdb.Environment, file: Path) -> int:
    return max((env.info()["last_pgno"] + 1) * env.stat()["psize"] - file.stat().st_size, 0)


def _check_length(env: lmdb.Environment, file: Path) -> None:
    """Reading a page beyond the end of a truncated file would kill the process (SIGBUS).

    A sound file may be short too, by pages that its last transaction took and gave back. So the end
    is filled with zeros, and every table must still be readable.
    """
    missing_bytes = _missing_bytes(env, file)
    if not missing_bytes:
        return
    have_bytes = file.stat().st_size
    os.truncate(file, have_bytes + missing_bytes)
    try:
        with env.begin() as txn:
            for name in [key for key, _ in txn.cursor()]:
                for _, value in txn.cursor(db=env.open_db(name, txn, create=False)):
                    if name in (b"records", b"versions", b"sessions"):
                        json.loads(value)
    except (lmdb.Error, ValueError) as error:
        os.truncate(file, have_bytes)
        raise DataDirError(f"{file} is damaged: {missing_bytes} bytes are missing; restore it from a backup") from error


def unusable(path: Path, error: Exception) -> DataDirError:
    if isinstance(error, (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PanicError)):
        return DataDirError(f"{path / DATA_FILE} is damaged or no LMDB file ({error}); restore it from a backup")
    if "already open" in str(error):
        return DataDirError(f"this process has the memory store {path} open already; use the one MemoryStore it has")
    if isinstance(error, lmdb.DiskError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    ):
        return DataDirError(f"no space left for the memory store {path}; free some or set data_dir elsewhere")
    return DataDirError(f"cannot use {path} as the memory store: {error}; check data_dir and its permissions")


def whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // 4096) * 4096
