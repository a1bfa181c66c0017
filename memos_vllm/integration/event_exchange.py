"""What happens in one API process, told to the others of the server, so that each can predict for all.

A user's requests and hints reach whichever process accepts the connection. Habits, turn order and an
announced use are those of the user, not of the process: each process tells the others every event of its
own over a local socket, one line of JSON per event. What is lost (a process that is away, or far behind)
costs a prediction, no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import get_args

from memos_vllm.core.scenes import Event, SceneKind

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""Between two looks for a process that is not there: it starts, or it has ended."""

MAX_BEHIND_BYTES = 1 << 20
"""Not yet read by another process; what happens while it is further behind is not told to it."""

Heard = Callable[[float, Event, SceneKind], None]
"""Time of the event in seconds since the epoch, the event, and the kind of its scene."""

_EVENTS = {event.__name__: event for event in get_args(Event)}


class EventExchange:
    """Owned by the API process's event loop.

    Args:
        folder: holds one socket per process; nobody else may write there.
        rank: of this process.
        ranks: of all.
    """

    def __init__(self, folder: Path, rank: int, ranks: Sequence[int]) -> None:
        self._folder, self._rank = folder, rank
        self._others = [other for other in ranks if other != rank]
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._folder_fd = -1

    async def open(self, heard: Heard) -> None:
        """Listens, and looks for the others; returns before they are found. With nobody else does nothing."""
        if not self._others:
            return
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._folder_fd = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._server = await asyncio.start_unix_server(partial(self._listen, heard), self._path(self._rank))
        except OSError as error:
            logger.warning("API processes cannot tell each other what happens (%s); each predicts alone", error)
            return
        for other in self._others:
            self._keep(asyncio.create_task(self._stay_connected(other), name=f"memos-exchange-{other}"))

    def tell(self, at: float, event: Event, kind: SceneKind) -> None:
        """To all others that are there; does not wait."""
        if not self._writers:
            return
        line = _encode(at, event, kind)
        for writer in self._writers.values():
            if writer.transport.get_write_buffer_size() <= MAX_BEHIND_BYTES:
                writer.write(line)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1

    async def _stay_connected(self, other: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_unix_connection(self._path(other))
                self._writers[other] = writer
                try:
                    await reader.read()  # nothing comes; it ends with the other process
                finally:
                    del self._writers[other]
                    writer.close()
            await asyncio.sleep(RETRY_S)

    async def _listen(self, heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._keep(asyncio.current_task())
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while line := await reader.readline():
                try:
                    told = _decode(line)
                except (ValueError, KeyError, TypeError) as error:
                    logger.warning("another API process told of something that this one does not understand: %s", error)
                    continue
                heard(*told)

    def _keep(self, task: asyncio.Task[None] | None) -> None:
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _path(self, rank: int) -> str:
        """Through a descriptor of the folder: a socket's name may have 107 bytes only."""
        return f"/proc/self/fd/{self._folder_fd}/api-{rank}"


def _encode(at: float, event: Event, kind: SceneKind) -> bytes:
    return json.dumps([at, type(event).__name__, asdict(event), kind]).encode() + b"\n"


def _decode(line: bytes) -> tuple[float, Event, SceneKind]:
    """Raises ValueError, KeyError or TypeError on what ``_encode`` did not make."""
    at, name, fields, kind = json.loads(line)
    if not math.isfinite(at):
        raise ValueError(f"not a time: {at}")
    return float(at), _EVENTS[name](**fields), SceneKind(kind)
