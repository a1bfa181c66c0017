"""The refiner: at idle, and within a budget, the served model restates what was remembered (``memory.refining``).

    idle       no request in this process or in the engine, and nothing left to be built
    afford     the hour's budget holds a whole call
    batch      notes of one user
    ask        an ordinary vLLM request: JSON enforced by schema, the user's salt, lowest priority
    give way   a live request comes: the call is aborted, its tokens are spent, its notes wait on
    keep       what holds of the answer

Off by default. One refiner lives in each API process, with a budget of its own; what one has kept, the
others find done.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memos_vllm.config import RefinerConfig
from memos_vllm.integration import engine_channel, salts
from memos_vllm.integration.idle import IdleTime, lowest_priority
from memos_vllm.integration.memory_metrics import MemoryMetrics
from memos_vllm.memory.refining import SCHEMA, Batch, Refining
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger(__name__)

REFINE_PARAM = "memos_refine"
"""Key in ``kv_transfer_params`` of a request that is the refiner's: not a user's, and not worth keeping."""

CHECK_INTERVAL_S = 1.0
CALL_PATIENCE_S = 120.0
RETRY_AFTER_S = 60.0
"""After an error of the engine or the store."""

_BLANKS = [" " * 32, "\n" * 4]
"""JSON allows blanks without end between any two words, and a weak model may write them; that ends the answer."""

_HOUR_S = 3600.0


@dataclass(slots=True)
class TokenBudget:
    """Tokens of the last hour."""

    per_hour: int
    now: Callable[[], float]
    _spent: deque[tuple[float, int]] = field(default_factory=deque)

    def spend(self, num_tokens: int) -> None:
        self._spent.append((self.now(), num_tokens))

    @property
    def left(self) -> int:
        while self._spent and self._spent[0][0] <= self.now() - _HOUR_S:
            self._spent.popleft()
        return self.per_hour - sum(num_tokens for _, num_tokens in self._spent)


class Refiner:
    """Owned by the API process's event loop.

    Args:
        serving: gives vLLM's chat endpoint, once it is there.
        is_building: whether the builder has work, which goes before ours.
        salt_of: a user's salt as of now.
        model: identity of the served model, for provenance.
    """

    def __init__(
        self,
        engine: EngineClient,
        config: RefinerConfig,
        refining: Refining,
        idle: IdleTime,
        metrics: MemoryMetrics,
        *,
        serving: Callable[[], Any | None],
        is_building: Callable[[], bool],
        salt_of: Callable[[Principal], str],
        model: str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = config.enabled
        self._engine = engine
        self._config = config
        self._refining = refining
        self._idle = idle
        self._metrics = metrics
        self._serving = serving
        self._is_building = is_building
        self._salt_of = salt_of
        self._model = model
        self._budget = TokenBudget(config.tokens_per_hour, now)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self.enabled:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="memos-refiner")

    def status(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "tokens_left": self._budget.left}

    async def _run(self) -> None:
        while not self._engine.errored:
            await self._idle.wait()
            try:
                worked = await self.step()
            except Exception:
                # The notes wait in the store; a chat does not depend on them.
                logger.exception("refining failed; it is tried again in %.0f s", RETRY_AFTER_S)
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            if not worked:
                await asyncio.sleep(CHECK_INTERVAL_S)

    async def step(self) -> bool:
        """Refines one batch; False where there was none, or not the time for it."""
        if self._budget.left < self._config.prompt_tokens + self._config.max_tokens or not await self._is_quiet():
            return False
        batch = await asyncio.to_thread(self._refining.next_batch)
        if batch is None:
            return False
        answer = await self._ask(batch) if batch.notes else ""
        if answer is None:
            return False
        outcomes = await asyncio.to_thread(self._refining.finish, batch, answer, self._model)
        self._metrics.refined(outcomes)
        return True

    async def _is_quiet(self) -> bool:
        """Also by the engine's word, which knows of other processes' requests."""
        if self._is_building() or self._serving() is None or await self._engine.is_sleeping():
            return False
        replies = await engine_channel.call(self._engine, "num_requests")
        return self._idle.is_now and not any(reply["num_requests"] for reply in replies)

    async def _ask(self, batch: Batch) -> str | None:
        """The model's answer; None if a live request came."""
        salt = await asyncio.to_thread(self._salt_of, batch.who)
        token_ids = await self._render(batch)
        call = _Call()
        ended = await self._idle.run(lambda: self._generate(token_ids, salt, call), CALL_PATIENCE_S)
        if call.is_begun:
            self._budget.spend(len(token_ids) + call.num_tokens)
            self._metrics.refiner_called(len(token_ids), call.num_tokens, ended)
        return call.text if ended else None

    async def _render(self, batch: Batch) -> list[int]:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        # Models that can think first are asked not to: the schema leaves no room for it.
        request = ChatCompletionRequest(messages=batch.messages(), chat_template_kwargs={"enable_thinking": False})
        serving = self._serving()
        assert serving is not None
        result = await serving.render_chat_request(request)
        if not isinstance(result, tuple):
            raise RuntimeError(f"vLLM does not render the refiner's prompt: {result}")
        return list(result[1][0]["prompt_token_ids"])

    async def _generate(self, token_ids: list[int], salt: str, call: _Call) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        params = SamplingParams(
            max_tokens=self._config.max_tokens,
            temperature=0,
            structured_outputs=StructuredOutputsParams(json=SCHEMA),
            stop=_BLANKS,
            extra_args={"kv_transfer_params": {REFINE_PARAM: True}},
        )
        call.is_begun = True
        async for output in self._engine.generate(
            {"prompt_token_ids": token_ids, "cache_salt": salts.combine(salt, REFINE_PARAM)},
            params,
            f"memos-refine-{uuid.uuid4().hex}",
            priority=lowest_priority(self._engine.vllm_config),
        ):
            call.text, call.num_tokens = output.outputs[0].text, len(output.outputs[0].token_ids)


@dataclass(slots=True)
class _Call:
    """One request to the engine, as far as it came."""

    is_begun: bool = False
    text: str = ""
    num_tokens: int = 0


def is_refining(request: Any) -> bool:
    """Of a request in the engine. A client may send the parameter, but not with a salt of ours."""
    return bool((request.kv_transfer_params or {}).get(REFINE_PARAM)) and salts.is_memory_salt(request.cache_salt)
