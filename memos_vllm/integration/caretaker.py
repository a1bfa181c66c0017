"""What nobody waits for: time moves memories, what a deletion left behind is removed, room for deletions is
kept, and the store is measured."""

from __future__ import annotations

import asyncio
import logging
import shutil
from typing import TYPE_CHECKING

from memos_vllm.integration.distillation_jobs import DistillationJobs
from memos_vllm.memory.life import TEND_BATCH

if TYPE_CHECKING:
    from memos_vllm.integration.state import MemosState

logger = logging.getLogger(__name__)

INTERVAL_S = 60.0


class Caretaker:
    """One per API process. Several do no harm: what one has done, the others do not find.

    It begins at once, so that deletions that a crash interrupted are finished at the start.
    """

    def __init__(self, state: MemosState) -> None:
        self._state = state
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="memos-caretaker")

    async def _run(self) -> None:
        while True:
            try:
                await self.look_after()
            except Exception:
                # Nothing of it is lost: the store lists what is due and what is to be removed until it is done.
                logger.exception("looking after the memories failed; it is tried again in %.0f s", INTERVAL_S)
            await asyncio.sleep(INTERVAL_S)

    async def look_after(self) -> None:
        await asyncio.to_thread(self._state.ballast.keep)
        await asyncio.to_thread(self._measure)
        while (await asyncio.to_thread(self._state.service.life.tend)).seen >= TEND_BATCH:
            pass
        for who in await asyncio.to_thread(self._state.service.users_with_past_kv):
            removed = await self._state.forget_kv(who)
            if any(removed.values()):
                logger.info("KV of past epochs of %s was removed: %s", who, removed)
        jobs = DistillationJobs(self._state.config.data_dir)
        await asyncio.to_thread(jobs.remove_old)
        distilled = await asyncio.to_thread(self._state.adapters.registry.distilled_users)
        for who in distilled | await asyncio.to_thread(jobs.users):
            if withdrawn := await self._state.withdraw_adapters(who):
                logger.info("adapters of %s were withdrawn with their memories: %s", who, withdrawn)

    def _measure(self) -> None:
        metrics, service = self._state.metrics, self._state.service
        metrics.data_dir_measured(shutil.disk_usage(self._state.config.data_dir).free)
        metrics.embedder_failed(service.embedder_failures)
        metrics.store_measured(service.store_size())
