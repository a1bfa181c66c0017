"""The files of adapters: one immutable folder per content, held by whoever serves it.

    root/objects/<digest>/  adapter_config.json and adapter_model.safetensors, canonical
    root/incoming/          what is being written
    root/lock               held while folders appear or go

Any number of processes may use a root. A holder has a shared lock (``flock``) on the folder, which the
kernel drops with the process, so a crash leaves nothing held.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from memos_vllm.adapters import peft_folder
from memos_vllm.adapters.peft_folder import CheckedAdapter
from memos_vllm.durable import sync
from memos_vllm.errors import AdapterError, AdapterUnavailable

logger = logging.getLogger(__name__)


class AdapterFiles:
    """Creates its folders below ``root``; raises ``OSError`` where it cannot."""

    def __init__(self, root: Path) -> None:
        self._root, self._objects, self._incoming = root, root / "objects", root / "incoming"
        for folder in (root, self._objects, self._incoming):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held: dict[str, tuple[int, int]] = {}  # digest -> descriptor, holders in this process
        self._held_lock = threading.Lock()
        self._verified: dict[str, tuple[int, ...]] = {}

    def folder(self, digest: str) -> Path:
        return self._objects / digest

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all processes, for what follows until the end of the block."""
        with open(self._root / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def add(self, checked: CheckedAdapter) -> tuple[str, bool]:
        """Writes a content, whole or not at all; its digest, and whether it was not there before. Needs ``locked``.

        A damaged folder of the same content is replaced.

        Raises:
            AdapterError: it holds numbers that are none, or there is no space.
        """
        incoming = self._incoming / secrets.token_hex(8)
        try:
            incoming.mkdir(mode=0o700)
            digest = checked.write(incoming).hex()
            target = self.folder(digest)
            is_new = not target.exists()
            if not is_new and not _is_sound(target, digest):
                target.rename(self._incoming / f"damaged-{incoming.name}")
                self._verified.pop(digest, None)
            if not target.exists():
                sync(incoming)
                incoming.rename(target)
                sync(self._objects)
            return digest, is_new
        except OSError as error:
            raise AdapterError(f"the adapter was not stored: {error.strerror}; free some space", 507) from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def remove(self, digest: str) -> None:
        """Needs ``locked``."""
        self._verified.pop(digest, None)
        shutil.rmtree(self.folder(digest))
        sync(self._objects)

    def sweep(self, known: Collection[str]) -> None:
        """Removes what nobody has: of a crash, and of deletions that waited. Needs ``locked``."""
        for folder in [*self._incoming.iterdir(), *self._objects.iterdir()]:
            if folder.name not in known and self._is_free(folder):
                logger.info("removing an adapter's files that nobody has: %s", folder.name[:16])
                shutil.rmtree(folder, ignore_errors=True)

    def size_bytes(self) -> int:
        files = (file for folder in self._objects.iterdir() for file in folder.iterdir())
        return sum(file.stat().st_size for file in files if file.is_file())

    # -- use ------------------------------------------------------------------------------------

    @contextmanager
    def holding(self, digest: str) -> Iterator[None]:
        """The folder stays until the end of the block.

        Raises:
            AdapterUnavailable: there is none.
        """
        with self._held_lock:
            descriptor, holders = self._held.get(digest, (-1, 0))
            if not holders:
                try:
                    descriptor = os.open(self.folder(digest), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError as error:
                    raise AdapterUnavailable(
                        f"the files of adapter {digest[:16]} are gone; register it again"
                    ) from error
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._held[digest] = (descriptor, holders + 1)
        try:
            yield
        finally:
            with self._held_lock:
                descriptor, holders = self._held.pop(digest)
                if holders > 1:
                    self._held[digest] = (descriptor, holders - 1)
                else:
                    os.close(descriptor)

    @property
    def num_held(self) -> int:
        """Contents that this process holds."""
        return len(self._held)

    def is_free(self, digest: str) -> bool:
        """Whether no process holds the folder."""
        return self._is_free(self.folder(digest))

    def verify(self, digest: str) -> None:
        """Reads the files once per process, and again when they changed.

        Raises:
            AdapterUnavailable: they are not what was registered.
        """
        try:
            files = [(self.folder(digest) / name).stat() for name in peft_folder.FILES]
            stamp = tuple(number for file in files for number in (file.st_size, file.st_mtime_ns, file.st_ino))
            if self._verified.get(digest) == stamp:
                return
            if peft_folder.digest_of(self.folder(digest)).hex() != digest:
                raise AdapterUnavailable(f"the files of adapter {digest[:16]} are damaged; register it again")
        except OSError as error:
            raise AdapterUnavailable(
                f"the files of adapter {digest[:16]} cannot be read ({error.strerror}); register it again"
            ) from error
        self._verified[digest] = stamp

    @staticmethod
    def _is_free(folder: Path) -> bool:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)


def _is_sound(folder: Path, digest: str) -> bool:
    try:
        return peft_folder.digest_of(folder).hex() == digest
    except OSError:
        return False
