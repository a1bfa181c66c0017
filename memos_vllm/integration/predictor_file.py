"""What an API process's predictor learned, over restarts; and who was forgotten, for all API processes.

Each process writes a file of its own, so that none loses what another learned. A deletion reaches one of them,
and must end in all: it leaves a line in a log that the others read, and that counts for every state of before.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from memos_vllm.core.predictor import Predictor
from memos_vllm.errors import StoreError, StoreFull

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 16
_LINE = re.compile(r"^(\d+\.\d{6}) ([0-9a-f]{32})$", re.MULTILINE)
"""What a crash tore, or another hand wrote, is passed over."""


class ForgottenOwners:
    """An append-only log of whom nothing may be known that is older; it does not say who they are.

    Args:
        secret: the server's, without which the log's digests name nobody.
    """

    def __init__(self, path: Path, secret: bytes) -> None:
        self._path, self._secret = path, secret
        self._read_bytes = 0

    def add(self, owner: str) -> None:
        """On disk when this returns.

        Raises:
            StoreFull: the disk has no room for it.
            StoreError: it cannot be written.
        """
        # A line that a full disk or a crash tore ends before it.
        line = f"\n{time.time():.6f} {self._digest(owner)}\n".encode()
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if os.write(handle, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(
                    f"the disk of {self._path.parent} is full and nothing was deleted; free some space and ask again"
                ) from error
            raise StoreError(
                f"{self._path} cannot be written and nothing was deleted: {error.strerror}; check its owner and mode"
            ) from error

    def has_news(self) -> bool:
        """Whether the log names more than at the last ``take_news``."""
        try:
            return self._path.stat().st_size > self._read_bytes
        except FileNotFoundError:
            return False

    def take_news(self, predictor: Predictor, since: float = 0.0) -> None:
        """Has the predictor forget whom the log names since the last call.

        Args:
            since: seconds since the epoch; what the predictor knows is not older.
        """
        if not self.has_news():
            return
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            text = file.read()
        whole, _, _ = text.rpartition(b"\n")
        self._read_bytes += len(whole) + 1 if whole else 0
        lines = _LINE.findall(whole.decode("ascii", "replace"))
        gone = {digest for at, digest in lines if float(at) >= since}
        for owner in [each for each in predictor.owners() if self._digest(each) in gone]:
            predictor.forget_owner(owner)

    def _digest(self, owner: str) -> str:
        return hashlib.blake2b(owner.encode(), key=self._secret[:64], digest_size=_DIGEST_BYTES).hexdigest()


class PredictorFile:
    """
    Args:
        path: of this API process.
        forgotten: of all.
    """

    def __init__(self, path: Path, forgotten: ForgottenOwners) -> None:
        self.path, self.forgotten = path, forgotten

    def restore(self, now: float) -> Predictor:
        """What an earlier process learned; a file that cannot be read costs only that."""
        predictor, as_of = Predictor(), time.time()
        try:
            predictor = Predictor.from_bytes(self.path.read_bytes(), now=now)
            as_of = self.path.stat().st_mtime
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("what the predictor learned cannot be read from %s (%s); it starts anew", self.path, error)
        self.forgotten.take_news(predictor, as_of)
        return predictor

    def write(self, lines: Iterable[bytes], as_of: float, name: str) -> None:
        """On disk, whole or not at all, when this returns; a failure is logged.

        Args:
            as_of: when the state was as written, in seconds since the epoch; becomes the file's time.
            name: of the writer, among those of this process that may write at once.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.{name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.writelines(lines)
                file.flush()
                os.utime(file.fileno(), (as_of, as_of))
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            logger.warning("what the predictor learned was not saved to %s: %s", self.path, error)
