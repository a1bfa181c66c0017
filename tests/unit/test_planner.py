"""The planner keeps what was learned over restarts, and never holds the event loop for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.config import PredictionConfig
from memos_vllm.core import snapshot
from memos_vllm.core.predictor import Predictor
from memos_vllm.core.scenes import TurnEnded, Typing, WillUse
from memos_vllm.integration.latest_only import LatestOnly
from memos_vllm.integration.lengths import Lengths
from memos_vllm.integration.planner import FIRST_TOKEN_S, ScenePlanner
from memos_vllm.integration.predictor_file import ForgottenOwners, PredictorFile
from memos_vllm.types import Principal

USERS = 300
MAX_LINE_BYTES = 64_000


class Engine:
    """Takes what it is told."""

    engine_core: Any

    def __init__(self) -> None:
        self.engine_core = self
        self.told: list[dict[str, Any]] = []

    async def call_utility_async(self, method: str, op: str, payload: dict[str, Any]) -> dict[str, Any]:
        self.told.append(payload)
        return {"blocks": {}}


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def learned_in(path: Path) -> PredictorFile:
    return PredictorFile(path, ForgottenOwners(path.with_name("forgotten_owners"), b"secret"))


def user(number: int) -> Principal:
    return Principal("shop", f"user-{number}")


def named(number: int) -> str:
    """How the file names a user."""
    return f'"{user(number)}"'


def a_turn(planner: ScenePlanner, number: int, session: str | None = None) -> None:
    scene_id = planner.turn_started(user(number), session)
    planner.turn_ended(scene_id)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[ScenePlanner], Awaitable[None]]], ScenePlanner]:
    """Runs a test's coroutine with a planner that has learned from many users, and whose own loop stands still."""

    monkeypatch.setattr(asyncio, "to_thread", at_once)

    def run(body: Callable[[ScenePlanner], Awaitable[None]]) -> ScenePlanner:
        planner = ScenePlanner(Engine(), PredictionConfig(), learned_in(tmp_path / "predictor.json"), clock)  # type: ignore[arg-type]

        async def main() -> None:
            for round_ in range(3):
                for number in range(USERS):
                    clock.now += 1.0
                    a_turn(planner, number, f"session {round_ % 2}")
            assert planner._task is not None
            planner._task.cancel()
            await body(planner)

        asyncio.run(main())
        return planner

    return run


async def at_once(function: Callable[..., None], *args: Any) -> None:
    function(*args)


async def saving(planner: ScenePlanner, meanwhile: Callable[[int], None] = lambda turn: None) -> int:
    """Saves; calls ``meanwhile`` in every turn that the event loop gets; how many there were.

    The file is written at once, so that only the turns count that it gets while it is not.
    """
    save = asyncio.ensure_future(planner.save_in_slices())
    turn = 0
    while not save.done():
        await asyncio.sleep(0)
        meanwhile(turn)
        turn += 1
    await save
    return turn


def test_the_event_loop_gets_its_turn_after_every_part(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, in_turn = [], Counter()
    parts = snapshot.parts

    def counted(state: Any, path: tuple[str, ...] = ()) -> Iterator[snapshot.Part]:
        for part in parts(state, path):
            if not path:  # each part once, however deep it lies
                copied.append(len(part[2]) if part[1] else 1)
            yield part

    monkeypatch.setattr(snapshot, "parts", counted)

    async def body(planner: ScenePlanner) -> None:
        turns = await saving(planner, lambda turn: in_turn.update({turn: sum(copied) - in_turn.total()}))
        assert in_turn.total() > 5 * USERS and max(in_turn.values()) <= 512, "records copied in one turn"
        lines = (tmp_path / "predictor.json").read_bytes().splitlines()
        num_parts = len(lines) - 1
        assert num_parts > 5 * USERS / snapshot.PART_RECORDS
        assert turns >= num_parts, "each part is encoded in a turn of its own"
        assert max(map(len, lines)) < MAX_LINE_BYTES, "a table must be an iterator, or it is one large part"

    run(body)


def test_what_is_saved_is_of_one_moment_and_nothing_is_missed(run: Any, tmp_path: Path, clock: Clock) -> None:
    async def body(planner: ScenePlanner) -> None:
        planner._predictor.advance(clock.now)
        before = planner._predictor.to_bytes()
        undisturbed = Predictor.from_bytes(before)
        happened = []

        def meanwhile(turn: int) -> None:
            clock.now += 0.5
            number = turn % USERS
            scene_id = planner.scene_id(user(number), "session 1")
            assert planner.explain(scene_id) is not None
            for event in (Typing(scene_id), TurnEnded(scene_id)):
                happened.append((clock.now, event))
                planner.observe(event)
            a_turn(planner, USERS + turn)  # a new user every time: tables grow while they are copied

        assert await saving(planner, meanwhile) > 20
        saved = (tmp_path / "predictor.json").read_bytes()
        assert saved == before
        assert Predictor.from_bytes(saved).to_bytes() == undisturbed.to_bytes()
        assert len(planner._predictor) > len(undisturbed) + 20, "what happened meanwhile was learned after that"
        assert not planner._events and planner._copied_at is None

    run(body)


@pytest.mark.parametrize("fails", [False, True])
def test_no_collection_holds_a_save_and_collection_goes_on_after_it(
    run: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    encode, enabled = snapshot.encode, []

    def seen(part: snapshot.Part) -> bytes:
        enabled.append(gc.isenabled())
        if fails:
            raise ValueError
        return encode(part)

    async def body(planner: ScenePlanner) -> None:
        monkeypatch.setattr(snapshot, "encode", seen)
        with pytest.raises(ValueError) if fails else contextlib.nullcontext():
            await planner.save_in_slices()

    run(body)
    assert enabled and not any(enabled) and gc.isenabled()


def test_a_save_teaches_and_unteaches_nothing(run: Any, clock: Clock) -> None:
    """The same events with a save between them and without one end in the same state."""

    async def body(planner: ScenePlanner) -> None:
        planner._predictor.advance(clock.now)
        other = Predictor.from_bytes(planner._predictor.to_bytes())
        events = [(clock.now + turn, Typing(planner.scene_id(user(turn % USERS), "session 1"))) for turn in range(40)]

        def meanwhile(turn: int) -> None:
            if turn < len(events):
                clock.now = events[turn][0]
                planner.observe(events[turn][1])

        await saving(planner, meanwhile)
        for now, event in events:
            other.observe(event, now)
        assert planner._predictor.to_bytes() == other.to_bytes()

    run(body)


@pytest.mark.parametrize("at", [0, 1, 3, 10, 40])
def test_who_is_forgotten_while_it_saves_is_not_in_the_file(run: Any, tmp_path: Path, at: int) -> None:
    path = tmp_path / "predictor.json"

    async def body(planner: ScenePlanner) -> None:
        await saving(planner)
        assert named(7) in path.read_text()
        await saving(planner, lambda turn: planner.forget(user(7)) if turn == at else None)
        if planner._saved_at < 0:  # it was copied already; the planner saves again at once
            await planner.save_in_slices()
        assert named(7) not in path.read_text()
        assert named(8) in path.read_text()
        assert {each.name for each in tmp_path.iterdir()} == {"predictor.json", "forgotten_owners"}
        assert "user-7" not in (tmp_path / "forgotten_owners").read_text(), "the log does not say who it is"

    run(body)


def test_a_deletion_is_written_down_without_being_asked(run: Any, tmp_path: Path) -> None:
    async def body(planner: ScenePlanner) -> None:
        await saving(planner)
        planner._task = None
        planner.forget(user(7))
        while named(7) in (tmp_path / "predictor.json").read_text():
            await asyncio.sleep(0)

    run(lambda planner: asyncio.wait_for(body(planner), 60))


def test_a_deletion_in_one_api_process_reaches_the_others_and_what_they_wrote(
    run: Any, tmp_path: Path, clock: Clock
) -> None:
    """Each has a file of its own, and one that was away reads the log at its start."""
    (tmp_path / "other").mkdir()

    async def body(planner: ScenePlanner) -> None:
        await saving(planner)
        files = [tmp_path / name for name in ("predictor-1.json", "predictor-2.json")]
        for path in files:
            shutil.copy2(tmp_path / "predictor.json", path)
        beside = ScenePlanner(Engine(), PredictionConfig(), learned_in(files[0]), clock)  # type: ignore[arg-type]
        (tmp_path / "forgotten_owners").write_text("1764000000.5 torn\n1764.1764.000000 00\nnothing\n")
        planner.forget(user(7))
        assert str(user(7)) in beside._predictor.owners()
        beside._start()  # its loop, which looks every second
        while str(user(7)) in beside._predictor.owners() or named(7) in files[0].read_text():
            await asyncio.sleep(0)
        away = ScenePlanner(Engine(), PredictionConfig(), learned_in(files[1]), clock)  # type: ignore[arg-type]
        assert str(user(7)) not in away._predictor.owners() and str(user(8)) in away._predictor.owners()
        a_turn(planner, 7)
        await planner.save_in_slices()
        again = ScenePlanner(Engine(), PredictionConfig(), learned_in(tmp_path / "predictor.json"), clock)  # type: ignore[arg-type]
        assert str(user(7)) in again._predictor.owners(), "he came back after that"

    run(lambda planner: asyncio.wait_for(body(planner), 60))


def test_with_prediction_off_a_deletion_is_written_down_too(tmp_path: Path, clock: Clock, run: Any) -> None:
    async def body(planner: ScenePlanner) -> None:
        planner.save()

    run(body)
    engine = Engine()

    async def off() -> None:
        config = PredictionConfig(enabled=False)
        planner = ScenePlanner(engine, config, learned_in(tmp_path / "predictor.json"), clock)  # type: ignore[arg-type]
        planner.forget(user(7))
        while named(7) in (tmp_path / "predictor.json").read_text():
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(off(), 60))
    assert not engine.told


def test_a_save_that_fails_leaves_the_last_one(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(planner: ScenePlanner) -> None:
        await saving(planner)
        before = (tmp_path / "predictor.json").read_bytes()
        a_turn(planner, 0)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            await planner.save_in_slices()
            planner.save()
        assert (tmp_path / "predictor.json").read_bytes() == before

    run(body)


def test_a_torn_file_is_a_new_start(run: Any, tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "predictor.json"

    async def body(planner: ScenePlanner) -> None:
        await planner.save_in_slices()

    run(body)
    whole = path.read_bytes()
    for end in (0, len(whole) // 2, whole.rindex(b"\n", 0, -1) + 1):
        path.write_bytes(whole[:end])
        planner = ScenePlanner(Engine(), PredictionConfig(), learned_in(path), clock)  # type: ignore[arg-type]
        assert len(planner._predictor) == 0
    path.write_bytes(whole)
    assert len(ScenePlanner(Engine(), PredictionConfig(), learned_in(path), clock)._predictor) == 2 * USERS  # type: ignore[arg-type]


def told(planner: ScenePlanner) -> dict[str, Any]:
    last: dict[str, Any] = planner._engine.told[-1]  # type: ignore[attr-defined]
    return last


@pytest.mark.parametrize("end", ["time", "turn", "hint"])
def test_nothing_new_is_expected_until_a_turns_first_token(run: Any, clock: Clock, end: str) -> None:
    async def body(planner: ScenePlanner) -> None:
        await planner._replan(True)
        before = planner.told
        scene_id = planner.turn_started(user(0), "session 1")
        await planner._replan(True)
        assert planner.told == before and told(planner)["busy"] == [scene_id]
        match end:
            case "time":
                clock.now += FIRST_TOKEN_S
            case "turn":
                planner.turn_ended(scene_id)
            case "hint":
                planner.observe(Typing(planner.scene_id(user(7), "session 1")))
        await planner._replan(True)
        assert planner.told != before

    run(body)


def test_lengths_of_turns_are_learned_from(run: Any, clock: Clock) -> None:
    async def body(planner: ScenePlanner) -> None:
        scene_id = planner.turn_started(user(0), "session 1")
        planner.turn_ended(scene_id, Lengths(2000, 30))
        context = planner._predictor._waits[scene_id].context
        assert context is not None and {"length", "answer"} <= set(context.names)

    run(body)


def test_turns_that_start_all_the_time_do_not_put_it_off_for_ever(run: Any, clock: Clock) -> None:
    async def body(planner: ScenePlanner) -> None:
        await planner._replan(True)
        before = planner.told
        for number in range(10):
            planner.turn_started(user(number), "session 1")
            clock.now += FIRST_TOKEN_S / 3
            await planner._replan(True)
        assert planner.told != before

    run(body)


def brought_by(planner: ScenePlanner) -> list[list[str]]:
    """For which scenes adapters are brought, each time."""
    brought: list[list[str]] = []

    async def bring(scene_ids: list[str]) -> None:
        brought.append(list(scene_ids))

    planner._bringing = LatestOnly(bring, "bring")
    return brought


async def after_bringing(planner: ScenePlanner) -> None:
    while planner._bringing is not None and planner._bringing.busy:
        await asyncio.sleep(0)


def test_adapters_are_brought_for_likely_scenes_and_not_for_all_that_are_expected(run: Any, clock: Clock) -> None:
    async def body(planner: ScenePlanner) -> None:
        brought = brought_by(planner)
        clock.now += 30 * 86400.0  # nobody has been here for long
        hinted = planner.scene_id(user(7), "session 1")
        planner.observe(Typing(hinted))
        await planner._replan(True)
        await after_bringing(planner)
        assert brought == [[hinted]] and len(planner.told) > 1

    run(body)


def test_an_adapter_is_brought_when_its_scene_becomes_likely_with_time_alone(run: Any, clock: Clock) -> None:
    async def body(planner: ScenePlanner) -> None:
        brought = brought_by(planner)
        planner._max_scenes = 1
        clock.now += 30 * 86400.0
        announced = planner.scene_id(user(7), "session 1")
        planner.observe(WillUse(announced, in_s=60.0))
        await planner._replan(True)
        await after_bringing(planner)
        before = planner.told
        clock.now += 55.0
        await planner._replan(False)
        await after_bringing(planner)
        assert planner.told == before == [announced], "the order is as it was"
        assert brought == [[], [announced]] and planner.likely == [announced]
        await planner._replan(False)
        await after_bringing(planner)
        assert len(brought) == 2, "once"

    run(body)


def test_one_user_does_not_fill_what_the_engine_is_told_to_expect(run: Any, clock: Clock) -> None:
    async def body(planner: ScenePlanner) -> None:
        sessions = [f"tab {number}" for number in range(planner._max_scenes)]
        for session in sessions:
            a_turn(planner, 7, session)
        for _ in range(3):
            clock.now += 1.0
            for session in sessions:
                planner.observe(Typing(planner.scene_id(user(7), session)))
        await planner._replan(True)
        told_of_one = set(planner.told) & {planner.scene_id(user(7), session) for session in sessions}
        assert len(planner.told) == planner._max_scenes and 0 < len(told_of_one) <= planner._max_scenes // 4

    run(body)


def test_a_hint_reaches_the_engine_while_adapters_are_being_brought(run: Any, clock: Clock) -> None:
    """However long that takes; what came meanwhile is one more call, and nothing is settled before its end."""
    begun, may_end = [], asyncio.Event()

    async def bring(scene_ids: list[str]) -> None:
        begun.append(list(scene_ids))
        await may_end.wait()

    async def body(planner: ScenePlanner) -> None:
        planner._bringing = LatestOnly(bring, "bring")
        planner._task = None  # its own loop runs, as in a server
        clock.now += 30 * 86400.0
        hinted = [planner.scene_id(user(number), "session 1") for number in (7, 8, 9)]
        for scene_id in hinted:
            planner.observe(Typing(scene_id))
            while scene_id not in planner.likely:
                await asyncio.sleep(0)
            assert scene_id in [each for _, each in told(planner)["scenes"]]
        assert begun == [hinted[:1]]
        while planner._changed.is_set() or planner._telling:
            await asyncio.sleep(0)
        assert planner.busy
        may_end.set()
        while planner.busy:
            await asyncio.sleep(0)
        assert len(begun) == 2 and set(begun[1]) == set(hinted)
        planner._task.cancel()  # type: ignore[attr-defined]

    run(lambda planner: asyncio.wait_for(body(planner), 60))


def test_what_is_asked_for_after_a_failure_is_done() -> None:
    done = []

    async def work(what: int) -> None:
        done.append(what)
        if what == 1:
            raise OSError("not now")

    async def body() -> None:
        latest = LatestOnly(work, "work")
        for what in (1, 2):
            latest.ask(what)
            assert latest.busy
            while latest.busy:
                await asyncio.sleep(0)

    asyncio.run(body())
    assert done == [1, 2]
