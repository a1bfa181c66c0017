"""API processes tell each other what happens: a turn at one of them is known to all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from memos_vllm.config import PredictionConfig
from memos_vllm.core.scenes import Event, SceneKind, TurnEnded, TurnStarted, Typing
from memos_vllm.integration import event_exchange
from memos_vllm.integration.event_exchange import EventExchange
from memos_vllm.integration.planner import ScenePlanner
from tests.unit.test_planner import Clock, Engine, learned_in, user

PATIENCE_S = 30.0
AT = 1_000_000.0


class Process:
    """The part of an API process that hears and tells."""

    def __init__(self, folder: Path, rank: int, ranks: int = 2) -> None:
        self.exchange = EventExchange(folder, rank, range(ranks))
        self.heard: asyncio.Queue[tuple[float, Event, SceneKind]] = asyncio.Queue()

    async def open(self) -> None:
        await self.exchange.open(lambda *told: self.heard.put_nowait(told))

    async def hear(self) -> tuple[float, Event, SceneKind]:
        return await asyncio.wait_for(self.heard.get(), PATIENCE_S)


async def until(condition: Callable[[], Any]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), PATIENCE_S)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(event_exchange, "RETRY_S", 0.001)

    def run(play: Callable[..., Awaitable[None]], ranks: int = 2) -> None:
        async def whole() -> None:
            processes = [Process(tmp_path / "run", rank, ranks) for rank in range(ranks)]
            try:
                await play(*processes)
            finally:
                for process in processes:
                    await process.exchange.close()

        asyncio.run(whole())

    return run


def test_every_kind_of_event_arrives_as_it_was_at_all_others_and_in_order(run: Any) -> None:
    async def play(*processes: Process) -> None:
        for process in processes:
            await process.open()
        await until(lambda: all(len(each.exchange._writers) == 2 for each in processes))
        told: list[tuple[float, Event, SceneKind]] = []
        for number, event in enumerate(get_args(Event)):
            filled = {field.name: 0.5 for field in fields(event) if field.name in ("in_s", "probability", "expected_s")}
            told.append((AT + number, event(f"scene-{number}", **filled), list(SceneKind)[number % len(SceneKind)]))
        for each in told:
            processes[1].exchange.tell(*each)
        for hearer in (processes[0], processes[2]):
            assert [await hearer.hear() for _ in told] == told
        assert processes[1].heard.empty(), "nobody hears himself"

    run(play, ranks=3)


def test_a_process_that_comes_later_or_comes_back_is_found(run: Any, tmp_path: Path) -> None:
    async def play(one: Process, other: Process) -> None:
        await one.open()
        one.exchange.tell(AT, Typing("nobody is there"), SceneKind.CONVERSATION)
        await other.open()
        await until(lambda: one.exchange._writers)
        one.exchange.tell(AT, Typing("first"), SceneKind.CONVERSATION)
        assert (await other.hear())[1] == Typing("first")
        await other.exchange.close()
        await until(lambda: not one.exchange._writers)
        again = Process(tmp_path / "run", 1)
        await again.open()
        await until(lambda: one.exchange._writers)
        one.exchange.tell(AT, Typing("second"), SceneKind.CONVERSATION)
        assert (await again.hear())[1] == Typing("second")
        await again.exchange.close()

    run(play)


def test_what_cannot_be_understood_is_passed_over(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def play(one: Process, other: Process) -> None:
        await one.open()
        await other.open()
        await until(lambda: one.exchange._writers)
        (writer,) = one.exchange._writers.values()
        for junk in (b"{", b"[1]", b'[1, "Nothing", {}, "document"]', b'[1, "Typing", {"a": 1}, "document"]',
                     b'[1, "Typing", {"scene_id": "s"}, "nowhere"]', b'[NaN, "Typing", {"scene_id": "s"}, "document"]',
                     b'["1", "Typing", {"scene_id": "s"}, "document"]', b"\xff"):  # fmt: skip
            writer.write(junk + b"\n")
        one.exchange.tell(AT, Typing("after"), SceneKind.CONVERSATION)
        assert (await other.hear())[1] == Typing("after")
        assert caplog.text.count("does not understand") == 8

    run(play)


def test_a_process_that_does_not_read_costs_a_bounded_buffer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_exchange, "MAX_BEHIND_BYTES", 4096)

    async def play(one: Process, other: Process) -> None:
        await one.open()
        await other.open()
        await until(lambda: one.exchange._writers)
        (writer,) = one.exchange._writers.values()
        for number in range(20_000):  # the loop is not given back, so nobody reads
            one.exchange.tell(AT, Typing(f"scene-{number}"), SceneKind.CONVERSATION)
        assert 4096 < writer.transport.get_write_buffer_size() < 2 * 4096

    run(play)


def test_without_others_there_is_no_socket(run: Any, tmp_path: Path) -> None:
    async def play(one: Process) -> None:
        await one.open()
        one.exchange.tell(AT, Typing("s"), SceneKind.CONVERSATION)
        assert not (tmp_path / "run").exists()

    run(play, ranks=1)


def test_where_no_socket_can_be_made_each_predicts_alone(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("in the way")

    async def play(one: Process, other: Process) -> None:
        await one.open()
        one.exchange.tell(AT, Typing("s"), SceneKind.CONVERSATION)
        assert "each predicts alone" in caplog.text

    run(play)


def test_a_turn_at_one_process_is_expected_by_the_planner_of_the_other(tmp_path: Path) -> None:
    """And only the one where it happened tells the engine at once."""

    async def play() -> None:
        clock, engines = Clock(), [Engine(), Engine()]
        exchanges = [EventExchange(tmp_path / "run", rank, range(2)) for rank in range(2)]
        planners = [
            ScenePlanner(
                engine, PredictionConfig(), learned_in(tmp_path / f"predictor-{rank}.json"), clock,
                on_event=exchanges[rank].tell,
            )
            for rank, engine in enumerate(engines)
        ]  # fmt: skip
        here, there = planners
        for planner, exchange in zip(planners, exchanges, strict=True):
            await exchange.open(planner.hear)
        await until(lambda: all(exchange._writers for exchange in exchanges))
        scene_id = here.turn_started(user(1), "s", starts_session=True)
        here.turn_ended(scene_id)
        await until(lambda: there.explain(scene_id) and here.explain(scene_id) == there.explain(scene_id))
        assert there.explain(there.start_id(user(1))) == here.explain(here.start_id(user(1)))
        await until(lambda: engines[0].told)
        assert not there._changed.is_set(), "an event is told to the engine by one process"
        assert there.hinted_id(user(1), "s") == scene_id, "a session that another process has seen is no new one"

        before = there.explain(scene_id)
        there.observe(Typing(scene_id))
        await until(lambda: here.explain(scene_id) == there.explain(scene_id) != before)
        for planner, exchange in zip(planners, exchanges, strict=True):
            assert planner._task is not None
            planner._task.cancel()
            await exchange.close()

    asyncio.run(play())


def test_what_was_heard_is_not_told_on(tmp_path: Path) -> None:
    async def play() -> None:
        told: list[Any] = []
        planner = ScenePlanner(
            Engine(), PredictionConfig(), learned_in(tmp_path / "predictor.json"), Clock(),
            on_event=lambda *event: told.append(event),
        )  # fmt: skip
        planner.hear(AT, TurnStarted("s", owner="o"), SceneKind.CONVERSATION)
        planner.hear(AT, TurnEnded("s"), SceneKind.CONVERSATION)
        assert planner.explain("s") is not None and not told
        assert planner._task is not None
        planner._task.cancel()

    asyncio.run(play())
