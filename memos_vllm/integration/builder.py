"""The builder: computes expected scenes that no tier holds, while the engine has nothing else to do.

    idle       no request in this process, and by the engine's word none of another
    declare    starts of next sessions that changed with their user's memory (``session_start``)
    claim      the engine names the next piece of the most valuable scene that is absent (``scene_builds``)
    build      an ordinary vLLM request computes it: one token of output, the user's salt, lowest priority
    give way   a live request comes: the piece is aborted before the request is even read

One builder lives in each API process; the engine lets one of them build at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from memos_vllm.config import BuildConfig
from memos_vllm.errors import AdapterUnavailable, StoreUnavailable
from memos_vllm.integration import engine_channel
from memos_vllm.integration.adapter_gate import AdapterGate
from memos_vllm.integration.idle import IdleTime, lowest_priority
from memos_vllm.integration.planner import ScenePlanner
from memos_vllm.integration.scene_builds import BUILD_PARAM
from memos_vllm.integration.session_start import SessionStart, SessionStarts
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
"""How soon a change of memory by another process, or the end of another process's requests, is noticed."""

PIECE_PATIENCE_S = 10.0
"""A piece that takes longer waits behind other processes' requests, or for a paused engine; it is given up."""


class SceneBuilder:
    """Owned by the API process's event loop.

    Args:
        planner: knows what is expected; it wakes the builder whenever it has told the engine.
    """

    def __init__(
        self,
        engine: EngineClient,
        config: BuildConfig,
        planner: ScenePlanner,
        starts: SessionStarts,
        idle: IdleTime,
        adapters: AdapterGate,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        vllm_config = engine.vllm_config
        self.enabled = config.enabled and planner.enabled
        self._engine = engine
        self._config = config
        self._planner = planner
        self._starts = starts
        self._adapters = adapters
        self._now = now
        self._priority = lowest_priority(vllm_config)
        self._idle = idle
        self._woken = asyncio.Event()
        self._stamp: tuple[int, int] | None = None
        self._working = False
        self._task: asyncio.Task[None] | None = None
        if self.enabled:
            planner.on_told = self.wake

    # -- what happens ---------------------------------------------------------------------------

    def turn_seen(self, start: SessionStart) -> None:
        """A turn came, and shows how the user's next session starts."""
        self._starts.seen(start)
        self.wake()

    def forget(self, who: Principal) -> None:
        self._starts.forget(self._planner.start_id(who))

    def wake(self) -> None:
        """What is expected, or what is absent, may have changed."""
        if not self.enabled:
            return
        self._woken.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="memos-builder")

    @property
    def is_pending(self) -> bool:
        """Something is being built, or may have to be, as far as was looked."""
        return self._task is not None and (self._planner.busy or self._working or self._woken.is_set())

    async def status(self) -> dict[str, bool]:
        """``pending``: as ``is_pending``, after a look at what was written since; True while nobody can look."""
        try:
            pending = self.is_pending or (self._task is not None and self._stamp != await self._look())
        except StoreUnavailable:
            pending = True
        return {"enabled": self.enabled, "pending": pending}

    async def _look(self) -> tuple[int, int]:
        """Off the loop: the store may be held by a resize, or be a database that does not answer."""
        return await asyncio.to_thread(self._starts.stamp)

    # -- what follows ---------------------------------------------------------------------------

    async def _run(self) -> None:
        is_away = False
        while not self._engine.errored:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), CHECK_INTERVAL_S)
            await self._idle.wait()
            again = True
            try:
                stamp = await self._look()
                is_away = False
                if stamp == self._stamp and not self._woken.is_set():
                    continue
                self._working, self._stamp = True, stamp
                self._woken.clear()
                again = await self._work()
            except StoreUnavailable as error:
                if not is_away:
                    logger.warning("nothing is built until memory can be read: %s", error)
                is_away = True
            except Exception:
                # Building only makes requests cheap; they must not depend on it.
                logger.exception("a scene could not be built")
            if again:
                self._woken.set()
                if self._idle.is_now:
                    await asyncio.sleep(CHECK_INTERVAL_S)
            self._working = False

    async def _work(self) -> bool:
        """Declares what has changed and builds what is absent, while the engine is idle; whether something is left."""
        if declared := await self._starts.declare_changed(self._planner.told):
            self._planner.starts_declared(declared)
        took_slots = False
        while self._idle.is_now:
            if await self._engine.is_sleeping():
                return True
            claimed, again = await self._claim()
            if claimed is None:
                if took_slots:  # perhaps those of adapters that are expected sooner
                    await self._adapters.expected.prefetch(self._planner.likely)
                return again
            engine, piece = claimed
            await self._build(engine, piece)
            took_slots = took_slots or piece["lora"] is not None
        return True  # it gave way

    async def _claim(self) -> tuple[tuple[int, dict[str, Any]] | None, bool]:
        """The next piece and the data-parallel engine that it is for, or whether to ask again soon.

        None while any engine has a request: they may share the machine, or wait for each other's steps.
        """
        told, payload = self._planner.told, {"planner": self._planner.name, "piece_tokens": self._config.piece_tokens}
        engines = range(engine_channel.num_engines(self._engine))
        replies = await asyncio.gather(
            *(
                engine_channel.call_one(
                    self._engine, engine, "build", {**payload, "declared": self._starts.declared(told, engine)}
                )
                for engine in engines
            )
        )
        unknown = [scene_id for reply in replies for scene_id in reply.get("unknown", ())]
        self._starts.lost(unknown)
        if any(reply.get("busy") for reply in replies):
            return None, True
        pieces = [(engine, piece) for engine in engines if (piece := replies[engine].get("piece")) is not None]
        return (pieces[0] if pieces else None), bool(unknown)

    async def _build(self, engine: int, piece: dict[str, Any]) -> None:
        """Runs one piece, unless a live request comes; then leaves the engine alone for its share of the time."""
        if not self._idle.is_now:
            return
        started = self._now()
        try:
            await self._idle.run(partial(self._generate, engine, piece), PIECE_PATIENCE_S)
        except AdapterUnavailable as error:
            logger.info("a scene is not built: %s", error)
        share = self._config.busy_share
        await asyncio.sleep((self._now() - started) * (1 - share) / share)

    async def _generate(self, engine: int, piece: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            extra_args={"kv_transfer_params": {BUILD_PARAM: piece["build"]}},
        )
        lora = LoRARequest(**piece["lora"]) if piece["lora"] else None
        async with self._adapters.building(lora):
            async for _ in self._engine.generate(
                {"prompt_token_ids": piece["token_ids"], "cache_salt": piece["salt"]},
                params,
                f"memos-build-{piece['build']}",
                lora_request=lora,
                priority=self._priority,
                data_parallel_rank=engine,
            ):
                pass
