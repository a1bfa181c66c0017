"""The refiner against an engine that the test plays, and against real vLLM with the recall model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic_core import from_json

from memos_vllm.config import MemoryConfig, RefinerConfig
from memos_vllm.integration import salts
from memos_vllm.integration.idle import IdleTime
from memos_vllm.integration.refiner import REFINE_PARAM, Refiner, is_refining
from memos_vllm.memory.refining import Refinement
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.engine.conftest import Engine

WHO = Principal("shop", "alice")
SALT = "memos:" + "7" * 64
MOVED = "I moved to Lisbon last week, and I love it."
HOME = {"sources": [1], "text": "My home city is Lisbon.", "type": "profile", "keys": [], "valid_from": None}
ANSWER = json.dumps({"statements": [HOME]})


class Counts:
    """In the place of the metrics."""

    def __init__(self) -> None:
        self.outcomes: list[dict[str, int]] = []
        self.calls: list[tuple[int, int, bool]] = []

    def refined(self, outcomes: Any) -> None:
        self.outcomes.append({str(each): number for each, number in outcomes.items()})

    def refiner_called(self, *call: Any) -> None:
        self.calls.append(call)


class ScriptedEngine:
    """An engine client whose model answers one character a token, as far as it is let."""

    def __init__(self, answer: str, policy: str = "priority") -> None:
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(policy=policy))
        self.engine_core = self
        self.errored = False
        self.answer = answer
        self.num_requests = 0
        self.prompts: list[Any] = []
        self.options: list[Any] = []
        self.aborted = 0
        self.happening: Any = None
        self.at: dict[int, Callable[[], Awaitable[None]]] = {}
        """What happens after so many tokens."""

    async def is_sleeping(self) -> bool:
        return False

    async def call_utility_async(self, _: str, op: str, payload: Any) -> dict[str, Any]:
        assert op == "num_requests"
        return {"num_requests": self.num_requests}

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        self.prompts.append(prompt)
        self.options.append((params, options))
        try:
            for number in range(1, len(self.answer) + 1):
                if (happens := self.at.pop(number, None)) is not None:
                    self.happening = asyncio.ensure_future(happens())
                    await asyncio.sleep(0)  # it cancels us
                    await asyncio.sleep(0)
                yield output(self.answer[:number], number)
        except asyncio.CancelledError:
            self.aborted += 1
            raise


def output(text: str, num_tokens: int) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=[0] * num_tokens)])


class Serving:
    """vLLM's chat endpoint, whose tokens are the tokenizer's, or characters."""

    def __init__(self, render: Callable[[list[Any]], list[int]]) -> None:
        self._render = render

    async def render_chat_request(self, request: Any) -> Any:
        return [], [{"prompt_token_ids": self._render(request.messages)}]


class Parts:
    def __init__(self, folder: Path, engine: Any, render: Any = None, **config: Any) -> None:
        self.config = RefinerConfig(enabled=True, **{"prompt_tokens": 1024, "max_tokens": 512, **config})
        memory = MemoryConfig(refiner=self.config)
        self.service = MemoryService(MemoryStore(folder / "memory", 2**24), memory)
        self.engine, self.idle, self.counts = engine, IdleTime(), Counts()
        self.clock = 0.0
        self.is_building = False
        serving = Serving(render or (lambda messages: [1] * 100))
        self.refiner = Refiner(
            engine,
            self.config,
            self.service.refining,
            self.idle,
            self.counts,  # type: ignore[arg-type]
            serving=lambda: serving,
            is_building=lambda: self.is_building,
            salt_of=lambda who: SALT,
            model="recall@1",
            now=lambda: self.clock,
        )

    def tell(self, *sentences: str) -> None:
        for text in sentences:
            self.service.remember(WHO, [{"role": "user", "content": text}], request="r")

    def texts(self) -> list[str]:
        return [record.text for record in self.service.list(WHO).records]


def test_an_answer_is_kept_and_its_request_is_none_of_the_users(tmp_path: Path) -> None:
    parts = Parts(tmp_path, ScriptedEngine(ANSWER))
    parts.tell(MOVED)
    assert asyncio.run(parts.refiner.step()) is True
    assert parts.texts() == [MOVED, "My home city is Lisbon."]
    assert parts.counts.outcomes == [{"accepted": 1}] and parts.counts.calls == [(100, len(ANSWER), True)]
    ((params, options),), (prompt,) = parts.engine.options, parts.engine.prompts
    assert prompt["cache_salt"].startswith(SALT + ":") and options["priority"] == 2**31 - 1
    request = SimpleNamespace(kv_transfer_params=params.extra_args["kv_transfer_params"], **prompt)
    assert is_refining(request) and salts.tag(request.cache_salt) == salts.tag(SALT)
    assert not is_refining(SimpleNamespace(kv_transfer_params={REFINE_PARAM: True}, cache_salt="a client's"))
    assert asyncio.run(parts.refiner.step()) is False, "nothing waits any more"


def test_a_live_request_aborts_the_call_and_the_notes_wait_on(tmp_path: Path) -> None:
    parts = Parts(tmp_path, ScriptedEngine(ANSWER))
    parts.tell(MOVED)
    parts.engine.at[20] = parts.idle.live_started

    async def play() -> None:
        assert await parts.refiner.step() is False
        assert (parts.engine.aborted, parts.texts(), parts.counts.outcomes) == (1, [MOVED], [])
        ((num_prompt, num_tokens, ended),) = parts.counts.calls
        assert (num_prompt, ended) == (100, False) and 0 < num_tokens < len(ANSWER)
        spent = parts.config.tokens_per_hour - parts.refiner.status()["tokens_left"]
        assert spent == num_prompt + num_tokens, "what was computed for nothing counts, too"
        assert await parts.refiner.step() is False and len(parts.engine.prompts) == 1, "a request is still there"
        parts.idle.live_ended()
        assert await parts.refiner.step() is True
        assert parts.texts() == [MOVED, "My home city is Lisbon."]

    asyncio.run(play())


@pytest.mark.parametrize("why", ["a build", "another process's request", "a request", "no chat endpoint"])
def test_it_does_not_begin_while_there_is_something_else(tmp_path: Path, why: str) -> None:
    parts = Parts(tmp_path, ScriptedEngine(ANSWER))
    parts.tell(MOVED)

    async def play() -> None:
        match why:
            case "a build":
                parts.is_building = True
            case "another process's request":
                parts.engine.num_requests = 1
            case "a request":
                await parts.idle.live_started()
            case "no chat endpoint":
                parts.refiner._serving = lambda: None
        assert await parts.refiner.step() is False and parts.engine.prompts == []

    asyncio.run(play())


def test_it_stops_at_the_budget_and_goes_on_an_hour_later(tmp_path: Path) -> None:
    parts = Parts(tmp_path, ScriptedEngine('{"statements": []}'), tokens_per_hour=1600)
    parts.tell(*(f"Ferry {number} leaves at seven, {'and so on, ' * 40} they say." for number in range(30)))
    while asyncio.run(parts.refiner.step()):
        parts.clock += 1
    calls = len(parts.counts.calls)
    assert calls == 1 and parts.refiner.status()["tokens_left"] == 1600 - 100 - 18, "less than a whole call is left"
    parts.clock = 3600.0
    assert asyncio.run(parts.refiner.step()) and len(parts.counts.calls) == calls + 1


class InProcess:
    """An engine client on an ``LLM`` in this process: steps it while somebody waits for an output."""

    def __init__(self, engine: Engine) -> None:
        self._llm = engine.llm.llm_engine
        self.vllm_config = self._llm.vllm_config
        self.engine_core = self
        self._engine = engine
        self.errored = False
        self.at: dict[int, Callable[[], Awaitable[None]]] = {}
        self.happening: list[Any] = []

    async def is_sleeping(self) -> bool:
        return False

    async def call_utility_async(self, _: str, op: str, payload: Any) -> Any:
        return self._engine.side.handle(op, payload, self._engine.core)

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        internal_id = self._llm.add_request(request_id, prompt, params, **options)
        try:
            while self._llm.has_unfinished_requests():
                for each in self._llm.step():
                    if each.request_id == request_id:
                        if (happens := self.at.pop(len(each.outputs[0].token_ids), None)) is not None:
                            self.happening.append(asyncio.ensure_future(happens()))
                        yield each
                await asyncio.sleep(0)
        except (asyncio.CancelledError, GeneratorExit):
            self._llm.abort_request([internal_id or request_id], internal=True)
            raise


@pytest.fixture
def real(engine: Engine, tmp_path: Path) -> Parts:
    tokenizer = engine.llm.get_tokenizer()

    def render(messages: list[Any]) -> list[int]:
        plain = [{"role": each["role"], "content": each["content"]} for each in messages]
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))

    parts = Parts(tmp_path, InProcess(engine), render, max_tokens=1024)
    parts.tell("My job is baker.", MOVED)
    return parts


def test_vllm_enforces_the_schema_on_a_model_that_knows_no_json(engine: Engine, real: Parts) -> None:
    before = engine.side.memory.accounting.status()
    answers: list[str] = []
    refining = real.service.refining

    def finish(batch: Any, answer: str, model: str) -> Any:
        answers.append(answer)
        return refining.finish(batch, answer, model)

    real.refiner._refining = SimpleNamespace(next_batch=refining.next_batch, finish=finish)  # type: ignore[assignment]
    assert asyncio.run(real.refiner.step()) is True
    (answer,) = answers
    ((num_prompt, num_tokens, ended),) = real.counts.calls
    assert ended and num_prompt > 100 and num_tokens > 2
    if num_tokens < 1024:
        Refinement.model_validate_json(answer)
    else:  # cut off: what there is begins such an answer
        assert from_json(answer, allow_partial="trailing-strings").keys() <= {"statements"}
    assert {"My job is baker.", MOVED} <= set(real.texts())
    engine.settle()
    assert engine.side.memory.accounting.status()["counters"] == before["counters"], "it is no user's request"
    assert len(engine.tiers.slots) == 0, "and its KV is not kept off the GPU"
    assert engine.side.handle("forget", {"salt": SALT}).result()["gpu_blocks"] > 0, "a deletion finds it on the GPU"


def test_a_live_request_interrupts_vllm(engine: Engine, real: Parts) -> None:
    real.engine.at[5] = real.idle.live_started
    assert asyncio.run(real.refiner.step()) is False
    ((_, num_tokens, ended),) = real.counts.calls
    assert not ended and 0 < num_tokens < 50
    assert engine.scheduler.get_num_unfinished_requests() == 0
    assert real.service.refining.next_batch() is not None and real.counts.outcomes == []
