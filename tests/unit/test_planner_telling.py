"""When the engine is told of what happens: soon, and however many hints a client sends, so often and no oftener."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.config import PredictionConfig
from memos_vllm.core.scenes import Typing
from memos_vllm.integration import planner as module
from memos_vllm.integration.planner import HINT_INTERVAL_S, MAX_ANNOUNCED, RENDERING_S, ScenePlanner
from tests.unit.test_planner import Clock, Engine, a_turn, learned_in, user

HINTS = 1000


class FakeTime:
    """The event loop's clock: it stands still, or goes on as the test says."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time()

    def __call__(self) -> float:
        return self.now


def run(tmp_path: Path, body: Callable[[ScenePlanner, Engine, FakeTime], Awaitable[None]]) -> None:
    """With a planner that knows three users, whose own loop runs as in a server."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        time = FakeTime(loop)
        loop.time = time  # type: ignore[method-assign]
        engine = Engine()
        planner = ScenePlanner(engine, PredictionConfig(), learned_in(tmp_path / "predictor.json"), Clock())  # type: ignore[arg-type]
        for number in range(3):
            a_turn(planner, number, "s")
        await settle()
        time.now += 1.0
        await settle()
        engine.told.clear()
        try:
            await body(planner, engine, time)
        finally:
            await settle()  # a task that is about to go on may miss that it is cancelled
            assert planner._task is not None
            planner._task.cancel()

    asyncio.run(main())


async def settle() -> None:
    """All that may run without that time goes on."""
    for _ in range(50):
        await asyncio.sleep(0)


def hint(planner: ScenePlanner, number: int = 0) -> str:
    scene_id = planner.scene_id(user(number), "s")
    planner.observe(Typing(scene_id))
    return scene_id


def expected_by(engine: Engine) -> list[str]:
    return [scene_id for _, scene_id in engine.told[-1]["scenes"]]


def test_many_hints_are_told_together(tmp_path: Path) -> None:
    async def body(planner: ScenePlanner, engine: Engine, time: FakeTime) -> None:
        for number in range(HINTS):
            time.now += 1.0 / HINTS
            hint(planner, number % 3)
            await settle()
        assert 1.0 / HINT_INTERVAL_S - 2 <= len(engine.told) <= 1.0 / HINT_INTERVAL_S + 2

    run(tmp_path, body)


def test_the_first_is_told_at_once_and_the_last_in_the_end(tmp_path: Path) -> None:
    async def body(planner: ScenePlanner, engine: Engine, time: FakeTime) -> None:
        first = hint(planner, 0)
        await settle()
        assert len(engine.told) == 1 and expected_by(engine)[0] == first and not planner.busy
        for _ in range(10):
            last = hint(planner, 1)
            await settle()
        assert len(engine.told) == 1 and planner.busy, "it is still to be told"
        time.now += HINT_INTERVAL_S
        await settle()
        assert len(engine.told) == 2 and last in expected_by(engine)[:2] and not planner.busy
        time.now += HINT_INTERVAL_S
        await settle()
        assert len(engine.told) == 2, "once"

    run(tmp_path, body)


def test_the_start_of_a_turn_is_told_when_its_request_is_rendered(tmp_path: Path) -> None:
    """However many hints there are; telling takes the time of this process."""

    async def body(planner: ScenePlanner, engine: Engine, time: FakeTime) -> None:
        hint(planner)
        await settle()
        hint(planner)
        await settle()
        assert len(engine.told) == 1
        scene_id = planner.turn_started(user(2), "s")
        await settle()
        time.now += 0.9 * RENDERING_S
        await settle()
        assert len(engine.told) == 1 and planner.busy
        time.now += 0.2 * RENDERING_S
        await settle()
        assert len(engine.told) == 2 and engine.told[-1]["busy"] == [scene_id]

    run(tmp_path, body)


def test_the_first_turn_of_a_session_is_told_as_late(tmp_path: Path) -> None:
    async def body(planner: ScenePlanner, engine: Engine, time: FakeTime) -> None:
        planner.turn_started(user(2), "new", starts_session=True)
        await settle()
        assert not engine.told and planner.start_id(user(2)) in planner._predictor
        time.now += 1.1 * RENDERING_S
        await settle()
        assert len(engine.told) == 1

    run(tmp_path, body)


def test_the_end_of_a_turn_is_told_at_once(tmp_path: Path) -> None:
    async def body(planner: ScenePlanner, engine: Engine, time: FakeTime) -> None:
        scene_id = planner.turn_started(user(2), "s")
        await settle()
        hint(planner)
        await settle()
        assert len(engine.told) == 1 and engine.told[-1]["busy"] == [scene_id], "the hint did not wait"
        planner.turn_ended(scene_id)
        await settle()
        assert len(engine.told) == 2 and engine.told[-1]["busy"] == []
        time.now += HINT_INTERVAL_S + RENDERING_S
        await settle()
        assert len(engine.told) == 2, "once"

    run(tmp_path, body)


def test_while_the_engine_does_not_answer_one_call_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, calls = asyncio.Event(), []

    async def call(engine: Any, op: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        calls.append(payload)
        await answers.wait()
        return []

    async def body(planner: ScenePlanner, engine: Engine, time: FakeTime) -> None:
        monkeypatch.setattr(module.engine_channel, "call", call)
        for number in range(HINTS):
            time.now += 1.0 / HINTS
            hint(planner, number % 3)
            await settle()
        assert len(calls) == 1
        answers.set()
        await settle()
        assert len(calls) <= 3

    run(tmp_path, body)


def test_sessions_of_which_only_the_adapter_is_known_are_few_for_each_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ANNOUNCERS", 2)

    async def body(planner: ScenePlanner, engine: Engine, time: FakeTime) -> None:
        def announce(number: int, session: str) -> str:
            scene_id = planner.scene_id(user(number), session)
            planner.know(scene_id, user(number))
            planner.observe(Typing(scene_id))
            return scene_id

        seen = [announce(0, f"then used {number}") for number in range(4)]
        for number in range(4):
            a_turn(planner, 0, f"then used {number}")
        of_another = announce(1, "announced")
        announced = [announce(0, f"tab {number}") for number in range(4 * MAX_ANNOUNCED)]
        kept = [scene_id for scene_id in announced if scene_id in planner._predictor]
        assert kept == announced[-MAX_ANNOUNCED:]
        assert all(scene_id in planner._predictor for scene_id in (*seen, of_another))
        assert announce(0, "tab 0") in planner._predictor, "it comes back when it is announced again"
        for number in range(2, 9):
            announce(number, "s2")
        assert len(planner._announced) == 2

    run(tmp_path, body)
