"""What the HTTP routes of one API process share."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memos_vllm.config import MemosConfig
from memos_vllm.errors import Conflict, NotFound
from memos_vllm.integration import engine_channel, salts
from memos_vllm.integration.adapter_gate import AdapterGate
from memos_vllm.integration.ballast import Ballast
from memos_vllm.integration.builder import SceneBuilder
from memos_vllm.integration.distillation_jobs import DistillationJobs
from memos_vllm.integration.home_engine import HomeEngines
from memos_vllm.integration.idle import IdleTime
from memos_vllm.integration.memory_metrics import MemoryMetrics
from memos_vllm.integration.over_limit import OverLimit
from memos_vllm.integration.planner import ScenePlanner
from memos_vllm.integration.recall_counts import RecallCounts
from memos_vllm.memory import claims
from memos_vllm.memory.assembly import DEFAULT_FORMAT, PromptFormat
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.sources.gathering import Sources
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from memos_vllm.integration.caretaker import Caretaker
    from memos_vllm.integration.refiner import Refiner

READ_YOUR_WRITES_TIMEOUT_S = 2.0
"""How long a request waits for what the same user's last turn is still writing."""

ANNOUNCEMENT_TIMEOUT_S = 30.0

NUM_DOCUMENT_THREADS = 2


@dataclass
class MemosState:
    config: MemosConfig
    service: MemoryService
    engine: EngineClient
    homes: HomeEngines
    secret: bytes
    planner: ScenePlanner
    builder: SceneBuilder
    metrics: MemoryMetrics
    adapters: AdapterGate
    count_tokens: Callable[[str], int]
    """With the served model's tokenizer."""
    prompt_format: PromptFormat = DEFAULT_FORMAT
    sources: Sources = field(default_factory=Sources)
    """What is recalled beside memory."""

    document_threads: Executor = field(
        default_factory=lambda: ThreadPoolExecutor(NUM_DOCUMENT_THREADS, thread_name_prefix="memos-documents")
    )
    """Of their own: reading a document may take a minute, and every recall needs one of the loop's few threads."""

    idle: IdleTime = field(default_factory=IdleTime)
    over_limit: OverLimit = field(default_factory=OverLimit)
    recalls: RecallCounts = field(default_factory=RecallCounts)
    caretaker: Caretaker | None = None
    refiner: Refiner | None = None
    nameless_keys: set[str] = field(default_factory=set)
    """Whose requests were answered without memory, because nobody was named."""

    ballast: Ballast = field(init=False)
    _writes: dict[Principal, set[asyncio.Future[None]]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        self.ballast = Ballast(self.config.data_dir / "ballast")

    def salt(self, who: Principal) -> str:
        return salts.of_user(self.secret, self.config.kv.store_dtype, who, self.service.kv_epoch(who))

    async def forget_kv(self, who: Principal) -> dict[str, int]:
        """Removes the KV of the user's past epochs from every tier; blocks and scenes, over all engines.

        LMDB lists an epoch from the moment it is past until its KV is gone, so what a crash or a failing
        engine leaves is removed later (``caretaker``). Two deletions at once may each forget an epoch twice.
        """
        epochs = await asyncio.to_thread(self.service.past_kv_epochs, who)
        if epochs:
            await self.withdraw_adapters(who)
        removed = Counter(gpu_blocks=0, host_blocks=0, disk_blocks=0, scenes=0)
        for epoch in epochs:
            payload = {"salt": salts.salt_of(self.secret, who, epoch)}
            for report in await engine_channel.call(self.engine, "forget", payload):
                removed.update({name: report.get(name, 0) for name in removed})
        await asyncio.to_thread(self.service.kv_removed, who, epochs)
        return dict(removed)

    async def withdraw_adapters(self, who: Principal) -> list[str]:
        """Removes adapters that were distilled from memories that are gone, out of recall or changed: weights hold
        the text. So do reports of distillations, which are cut.

        Returns:
            ``name@version`` of each adapter.
        """
        await asyncio.to_thread(self.cut_reports, who)
        stale = await asyncio.to_thread(self._stale_sources, who)
        if not stale:
            return []
        removed = await asyncio.to_thread(self.adapters.registry.withdraw, who, stale)
        await self.adapters.remove(removed)
        return list(removed.references)

    def cut_reports(self, who: Principal) -> None:
        DistillationJobs(self.config.data_dir).cut(who, lambda source: self._is_as_distilled(who, source))

    def _stale_sources(self, who: Principal) -> set[str]:
        """Memories that a distilled adapter knows otherwise than they are now."""
        return {
            source["id"] for source in self.adapters.registry.sources(who) if not self._is_as_distilled(who, source)
        }

    def _is_as_distilled(self, who: Principal, source: Mapping[str, Any]) -> bool:
        try:
            record = self.service.distillable(who, source["id"])
        except (NotFound, Conflict):
            return False
        return claims.text_key(record.text).hex() == source["fingerprint"]

    def announce(self, who: Principal) -> asyncio.Future[None]:
        """Says that a write is coming, so that the user's next request does not overtake it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writes[who].add(done)
        # A response that is never finished must not make the user wait for ever.
        asyncio.get_running_loop().call_later(ANNOUNCEMENT_TIMEOUT_S, self.written, who, done)
        return done

    def written(self, who: Principal, done: asyncio.Future[None]) -> None:
        """The announced write has ended, well or not. May be called twice."""
        if not done.done():
            done.set_result(None)
        writes = self._writes.get(who, set())
        writes.discard(done)
        if not writes:
            self._writes.pop(who, None)

    async def wait_for_writes(self, who: Principal) -> None:
        """Returns once the writes that were announced are done, or after a moment."""
        if writes := self._writes.get(who):
            await asyncio.wait(set(writes), timeout=READ_YOUR_WRITES_TIMEOUT_S)


def state_of(raw_request: Any) -> MemosState:
    state: MemosState = raw_request.app.state.memos
    return state
