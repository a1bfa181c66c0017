"""The data directory: who may use it, and where everything in it is.

data_dir/
  lock            held (flock) by the one server that uses the directory
  secret          32 random bytes; tenant salts derive from it
  predictor.json  what next-scene prediction has learned; predictor-<number>.json of further API processes
  run/            sockets over which several API processes tell each other what happens
  ballast         room that is given back when a deletion finds the disk full
  forgotten_owners  whose habits were deleted, as digests
  memory/         LMDB: plaintext memory, the single source of truth
  sources/        LMDB: what stands in the configured folders; it can be removed, and is then read again
  adapters/       LoRA adapters: files, and LMDB of their names
  kv/dp<index>/   LMDB index and safetensors files of activation memory, per data-parallel engine
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from memos_vllm.errors import DataDirError, DataDirInUse

HOLDER_ENV = "MEMOS_DATA_DIR_HOLDER"
_SECRET_BYTES = 32
_held: BinaryIO | None = None
_held_dir: Path | None = None


def memory_dir(data_dir: Path) -> Path:
    return data_dir / "memory"


def sources_dir(data_dir: Path) -> Path:
    return data_dir / "sources"


def run_dir(data_dir: Path) -> Path:
    return data_dir / "run"


def adapters_dir(data_dir: Path) -> Path:
    return data_dir / "adapters"


def kv_dir(data_dir: Path, dp_rank: int) -> Path:
    return data_dir / "kv" / f"dp{dp_rank}"


def was_used(data_dir: Path) -> bool:
    """Whether a server has run with it."""
    return (data_dir / "secret").is_file()


def small_files(data_dir: Path) -> list[Path]:
    """What a backup takes of the files at the top: the secret, what was learned, and then who is to be forgotten of
    that."""
    found = [data_dir / "secret", *sorted(data_dir.glob("predictor*.json")), data_dir / "forgotten_owners"]
    return [file for file in found if file.is_file()]


def acquire(data_dir: Path) -> None:
    """Creates and locks the directory for this server: this process and its descendants.

    The lock lasts as long as the process. A descendant finds the holder in its environment and
    does nothing.

    Raises:
        DataDirError: the directory cannot be created or written, or the disk is full.
        DataDirInUse: another server holds it.
    """
    global _held, _held_dir
    if _held is not None or HOLDER_ENV in os.environ:
        return
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(data_dir, error) from error
    lock = _lock(data_dir)
    try:
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        _probe(data_dir)
        secret(data_dir)
    except OSError as error:
        lock.close()
        raise _unusable(data_dir, error) from error
    _held, _held_dir = lock, data_dir.resolve()
    os.environ[HOLDER_ENV] = str(os.getpid())


def is_holder(data_dir: Path) -> bool:
    """Whether it is this process that holds the directory, and not one that it descends from."""
    return _held is not None and _held_dir == data_dir.resolve()


@contextlib.contextmanager
def exclusive(data_dir: Path) -> Iterator[None]:
    """Holds an existing directory as a server would, for as long as the block runs.

    Raises:
        DataDirError, DataDirInUse: as ``acquire``.
    """
    lock = _lock(data_dir)
    try:
        yield
    finally:
        lock.close()


def secret(data_dir: Path) -> bytes:
    """The secret that tenant salts derive from; created on first use, readable by the owner only."""
    path = data_dir / "secret"
    with contextlib.suppress(FileNotFoundError):
        value = path.read_bytes()
        if len(value) != _SECRET_BYTES:
            raise DataDirError(
                f"{path} must hold {_SECRET_BYTES} bytes but holds {len(value)}; restore it from a backup"
            )
        return value
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # an engine without a server is the first to come
    temporary = path.with_name(f"secret.{os.getpid()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(secrets.token_bytes(_SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # atomic, and the first of several processes wins
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return secret(data_dir)


def _lock(data_dir: Path) -> BinaryIO:
    try:
        lock = open(data_dir / "lock", "a+b")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise _unusable(data_dir, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read(32).decode("ascii", "replace").strip() or "unknown"
        lock.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise _unusable(data_dir, error) from error
        raise DataDirInUse(
            f"the data directory {data_dir} is in use by another server (process {holder}); "
            "stop that server or give this one its own data_dir"
        ) from error
    return lock


def _probe(data_dir: Path) -> None:
    """A full disk is found now rather than at the first memory."""
    path = data_dir / "probe.tmp"
    try:
        with open(path, "wb") as file:
            file.write(bytes(65536))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def _unusable(data_dir: Path, error: OSError) -> DataDirError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataDirError(f"no space left for the data directory {data_dir}; free some or set data_dir elsewhere")
    return DataDirError(f"cannot use the data directory {data_dir}: {error.strerror or error}; check data_dir")
