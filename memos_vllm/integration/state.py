"""What the HTTP routes of one API process share."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memos_vllm.config import MemosConfig
from memos_vllm.integration import engine_channel, salts
from memos_vllm.memory.service import MemoryService
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

READ_YOUR_WRITES_TIMEOUT_S = 2.0
"""How long a request waits for what the same user's last turn is still writing."""


@dataclass
class MemosState:
    config: MemosConfig
    service: MemoryService
    engine: EngineClient
    secret: bytes
    _writes: dict[Principal, set[asyncio.Future[None]]] = field(default_factory=lambda: defaultdict(set))

    def salt(self, who: Principal) -> str:
        return salts.salt_of(self.secret, who, self.service.kv_epoch(who))

    async def forget_kv(self, who: Principal, epoch: int) -> dict[str, int]:
        """Removes the KV of a past epoch from host and disk; blocks removed, over all engines."""
        salt = salts.salt_of(self.secret, who, epoch)
        reports = await engine_channel.call(self.engine, "forget", {"salt": salt})
        return {name: sum(report.get(name, 0) for report in reports) for name in ("host_blocks", "disk_blocks")}

    def announce(self, who: Principal) -> asyncio.Future[None]:
        """Says that a write is coming, so that the user's next request does not overtake it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writes[who].add(done)
        return done

    def written(self, who: Principal, done: asyncio.Future[None]) -> None:
        if not done.done():
            done.set_result(None)
        self._writes[who].discard(done)
        if not self._writes[who]:
            del self._writes[who]

    async def wait_for_writes(self, who: Principal) -> None:
        """Returns once the writes that were announced are done, or after a moment."""
        if writes := self._writes.get(who):
            await asyncio.wait(set(writes), timeout=READ_YOUR_WRITES_TIMEOUT_S)


def state_of(raw_request: Any) -> MemosState:
    state: MemosState = raw_request.app.state.memos
    return state
