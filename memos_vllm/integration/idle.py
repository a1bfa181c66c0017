"""Idle time of one API process: work that gives way to requests, one piece at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

LOWEST_PRIORITY = 2**31 - 1
"""vLLM schedules small numbers first."""

_READING = ("GET", "HEAD", "OPTIONS")
_HINTS = "/v1/scenes"


def lowest_priority(vllm_config: Any) -> int:
    """For requests that nobody waits for; vLLM refuses a priority where it does not schedule by it."""
    return LOWEST_PRIORITY if vllm_config.scheduler_config.policy == "priority" else 0


class IdleTime:
    """Owned by the API process's event loop."""

    def __init__(self) -> None:
        self._num_live = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._turn = asyncio.Lock()
        self._piece: asyncio.Task[None] | None = None

    @property
    def is_now(self) -> bool:
        return self._idle.is_set()

    async def wait(self) -> None:
        """Until no request is in this process."""
        await self._idle.wait()

    async def live_started(self) -> None:
        """A request came. Returns when the abort of the current piece is on its way to the engine, ahead of it."""
        self._num_live += 1
        self._idle.clear()
        if (piece := self._piece) is not None:
            piece.cancel()
            await asyncio.wait({piece})

    def live_ended(self) -> None:
        self._num_live -= 1
        if not self._num_live:
            self._idle.set()

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]], patience_s: float) -> bool:
        """Runs a piece of work until a live request comes; whether it ended by itself.

        Args:
            patience_s: after which it is given up. It waits for another piece's end before.
        """
        async with self._turn:
            if not self.is_now:
                return False
            self._piece = piece = asyncio.create_task(work())
            try:
                done, _ = await asyncio.wait({piece}, timeout=patience_s)
                if not done:
                    piece.cancel()
                    await asyncio.wait({piece})
                if piece.cancelled():
                    return False
                piece.result()
                return True
            finally:
                self._piece = None


class LiveRequests:
    """ASGI middleware: ends idle time with every request that may need the engine, or change memory.

    Reading and hints do neither, and an open WebSocket is no running request.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        state = getattr(scope["app"].state, "memos", None) if scope["type"] == "http" else None
        if state is None or scope["method"] in _READING or scope["path"].startswith(_HINTS):
            await self._app(scope, receive, send)
            return
        try:
            await state.idle.live_started()
            await self._app(scope, receive, send)
        finally:
            state.idle.live_ended()
