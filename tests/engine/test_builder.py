"""The builder's order of events, against an engine that is played by the test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memos_vllm.config import BuildConfig, MemoryConfig, PredictionConfig
from memos_vllm.errors import AdapterUnavailable, StoreUnavailable
from memos_vllm.integration import builder as builder_module
from memos_vllm.integration import engine_operations
from memos_vllm.integration.adapter_gate import Coming
from memos_vllm.integration.builder import SceneBuilder
from memos_vllm.integration.home_engine import HomeEngines, home_of
from memos_vllm.integration.idle import LOWEST_PRIORITY, IdleTime, LiveRequests
from memos_vllm.integration.planner import ScenePlanner
from memos_vllm.integration.predictor_file import ForgottenOwners, PredictorFile
from memos_vllm.integration.session_start import SessionStart, SessionStarts, start_of
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal

WHO = Principal("shop", "alice")
PIECE = {"build": "b", "scene": "s", "token_ids": [1, 2], "salt": "memos:x", "lora": None}


class Engine:
    """An engine client: hands out pieces, and runs them until it is told otherwise."""

    def __init__(self, policy: str = "fcfs", engines: int = 1) -> None:
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(policy=policy),
        )
        self.errored = False
        self.engine_core = self
        self.core_engines = [f"engine-{rank}" for rank in range(engines)]
        self.pieces: list[dict[str, Any]] = []
        self.replies: dict[int, dict[str, Any]] = {}
        """Of single engines to a claim, where there are several."""
        self.events: list[str] = []
        self.declared: list[dict[str, Any]] = []
        self.ranks: list[int] = []
        self.priorities: list[int] = []
        self.happened = asyncio.Condition()
        self.finish = asyncio.Event()

    async def is_sleeping(self) -> bool:
        return False

    async def call_utility_async(self, _: str, op: str, payload: dict[str, Any]) -> dict[str, Any]:
        if op == "declare":
            self.declared.append(payload)
            return {"enabled": True, "blocks": len(payload["token_ids"])}
        if op == "build":
            await self.note("claim")
            return {"busy": False, "unknown": [], "piece": self.pieces.pop(0) if self.pieces else None}
        return {"enabled": True, "blocks": {}}

    async def _call_utility_async(self, method: str, op: str, payload: dict[str, Any], engine: str) -> dict[str, Any]:
        reply = await self.call_utility_async(method, op, {**payload, "engine": self.core_engines.index(engine)})
        return {**reply, **self.replies.get(self.core_engines.index(engine), {})} if op == "build" else reply

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[None]:
        self.priorities.append(options["priority"])
        self.ranks.append(options["data_parallel_rank"])
        await self.note("piece")
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            await self.note("aborted")
            raise
        await self.note("built")
        yield None

    async def note(self, event: str) -> None:
        async with self.happened:
            self.events.append(event)
            self.happened.notify_all()

    async def until(self, *events: str) -> None:
        async with self.happened:
            await asyncio.wait_for(self.happened.wait_for(lambda: self.events == list(events)), 30)


class Serving:
    """vLLM's chat endpoint, whose tokens are characters."""

    async def render_chat_request(self, request: Any) -> Any:
        text = "".join(f"<{message['role']}>{message['content']}" for message in request.messages)
        return [], [{"prompt_token_ids": [ord(each) for each in text]}]


class Adapters:
    """The gate: what a request that names an adapter, or none, would get."""

    def __init__(self) -> None:
        self.registry = SimpleNamespace(stamp=lambda: self.num_changes)
        self.num_changes = 0
        self.num_prefetches = 0
        self.choices: dict[str | None, Coming] = {}
        self.expected = SimpleNamespace(expect=self.expect, prefetch=self.prefetch)
        self.references: dict[str, str | None] = {}
        self.gone = False

    def set(self, named: str | None, coming: Coming) -> None:
        self.choices[named] = coming
        self.num_changes += 1

    def coming(self, who: Any, named: str | None, *_: Any) -> Coming:
        return self.choices.get(named, Coming())

    def expect(self, scene_id: str, who: Principal, reference: str | None) -> None:
        self.references[scene_id] = reference

    async def prefetch(self, scene_ids: list[str]) -> None:
        self.num_prefetches += 1

    @asynccontextmanager
    async def building(self, lora: Any) -> AsyncIterator[None]:
        if self.gone and lora is not None:
            raise AdapterUnavailable("the adapter was deleted meanwhile")
        yield


class Parts:
    """A builder and what it works with."""

    def __init__(self, folder: Path, engine: Engine, config: BuildConfig | None = None) -> None:
        self.engine = engine
        self.service = MemoryService(MemoryStore(folder / "memory", 2**24), MemoryConfig())
        learned = PredictorFile(folder / "predictor.json", ForgottenOwners(folder / "forgotten_owners", b"secret"))
        self.planner = ScenePlanner(engine, PredictionConfig(), learned)
        self.adapters = Adapters()
        self.starts = SessionStarts(engine, self.service, self.salt, self.adapters, HomeEngines(engine))
        self.idle = IdleTime()
        config = config or BuildConfig(busy_share=1.0)
        self.builder = SceneBuilder(engine, config, self.planner, self.starts, self.idle, self.adapters)

    def salt(self, who: Principal, kv_epoch: int) -> str:
        return f"memos:{kv_epoch}"

    def turn(self, system: str = "Be brief.", adapter: str | None = None) -> SessionStart:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello!"}]
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(model="m", messages=messages)
        start = start_of(WHO, request, messages, Serving(), self.planner.start_id(WHO), adapter)
        self.starts.seen(start)
        return start

    async def declare(self) -> list[str]:
        """Texts of the starts that are declared now."""
        known = len(self.engine.declared)
        await self.starts.declare_changed([self.planner.start_id(WHO)])
        return ["".join(map(chr, each["token_ids"])) for each in self.engine.declared[known:]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    def run(play: Callable[[Parts], Awaitable[None]], config: BuildConfig | None = None, **options: Any) -> None:
        async def whole() -> None:
            parts = Parts(tmp_path, Engine(**options), config)
            try:
                await play(parts)
            finally:
                if parts.builder._task is not None:
                    parts.builder._task.cancel()

        asyncio.run(whole())

    return run


def test_a_live_request_goes_on_when_the_piece_is_aborted(run: Any) -> None:
    async def play(parts: Parts) -> None:
        engine, idle = parts.engine, parts.idle
        engine.pieces += [PIECE, PIECE]
        parts.builder.wake()
        await engine.until("claim", "piece")
        await idle.live_started()
        await engine.note("live")
        assert engine.events == ["claim", "piece", "aborted", "live"]
        engine.finish.set()
        idle.live_ended()
        await engine.until("claim", "piece", "aborted", "live", "claim", "piece", "built", "claim")

    run(play)


def test_building_goes_on_after_the_database_was_away_and_the_loop_does_not_ask_it(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(parts: Parts) -> None:
        monkeypatch.setattr("memos_vllm.integration.builder.CHECK_INTERVAL_S", 0.001)
        loop_thread, stamp = threading.get_ident(), parts.starts.stamp
        asked = 0

        def away() -> Any:
            nonlocal asked
            assert threading.get_ident() != loop_thread
            asked += 1
            if asked <= 3:
                raise StoreUnavailable("the database cannot be reached")
            return stamp()

        monkeypatch.setattr(parts.starts, "stamp", away)
        parts.builder.wake()
        await parts.engine.until("claim")
        assert asked > 3 and caplog.text.count("cannot be reached") == 1
        asked = 0
        assert (await parts.builder.status())["pending"], "who cannot look does not say that nothing is left"

    run(play)


def test_nothing_is_claimed_while_a_request_is_there(run: Any) -> None:
    async def play(parts: Parts) -> None:
        await parts.idle.live_started()
        await parts.idle.live_started()
        parts.builder.wake()
        parts.idle.live_ended()
        for _ in range(20):
            await asyncio.sleep(0)
        assert parts.engine.events == [] and (await parts.builder.status())["pending"]
        parts.idle.live_ended()
        await parts.engine.until("claim")

    run(play)


def test_a_claim_that_a_request_overtook_is_not_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(parts: Parts) -> None:
        engine, builder = parts.engine, parts.builder
        engine.pieces.append(PIECE)
        original = builder._claim

        async def claim() -> Any:
            reply = await original()
            await parts.idle.live_started()
            return reply

        monkeypatch.setattr(builder, "_claim", claim)
        assert await builder._work() is True
        assert engine.events == ["claim"]

    run(play)


def test_a_piece_has_the_lowest_priority_where_vllm_knows_priorities(run: Any) -> None:
    async def play(parts: Parts) -> None:
        parts.engine.finish.set()
        parts.engine.pieces.append(PIECE)
        parts.builder.wake()
        await parts.engine.until("claim", "piece", "built", "claim")
        assert parts.engine.priorities == [LOWEST_PRIORITY]

    run(play, policy="priority")


def test_a_piece_that_does_not_come_back_is_given_up(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is paused, or busy for another process."""
    monkeypatch.setattr(builder_module, "PIECE_PATIENCE_S", 0.0)

    async def play(parts: Parts) -> None:
        parts.engine.pieces.append(PIECE)
        parts.builder.wake()
        await parts.engine.until("claim", "piece", "aborted", "claim")

    run(play)


def test_nothing_starts_where_building_is_off(run: Any) -> None:
    async def play(parts: Parts) -> None:
        parts.builder.wake()
        parts.planner.on_told()
        assert parts.builder._task is None
        assert await parts.builder.status() == {"enabled": False, "pending": False}

    run(play, BuildConfig(enabled=False))


def test_a_users_start_is_declared_and_built_on_his_engine(run: Any) -> None:
    async def play(parts: Parts) -> None:
        engine, home = parts.engine, home_of(WHO, 3)
        parts.turn()
        await parts.declare()
        assert [each["engine"] for each in engine.declared] == [home]
        start_id = parts.planner.start_id(WHO)
        assert [parts.starts.declared([start_id], rank) for rank in range(3)] == [
            [start_id] if rank == home else [] for rank in range(3)
        ]
        engine.finish.set()
        engine.replies[home] = {"piece": PIECE}
        claimed, _ = await parts.builder._claim()
        assert claimed == (home, PIECE)
        await parts.builder._build(*claimed)
        assert engine.ranks == [home]

    run(play, engines=3)


@pytest.mark.parametrize("busy", [0, 1])
def test_no_piece_is_run_while_any_engine_has_a_request(run: Any, busy: int) -> None:
    async def play(parts: Parts) -> None:
        parts.engine.replies = {rank: {"piece": PIECE} for rank in range(2)}
        parts.engine.replies[busy] = {"busy": True, "piece": None}
        assert await parts.builder._claim() == (None, True)

    run(play, engines=2)


def test_requests_count_but_reading_and_hints_do_not(run: Any) -> None:
    async def play(parts: Parts) -> None:
        app = SimpleNamespace(state=SimpleNamespace(memos=SimpleNamespace(idle=parts.idle)))
        seen: list[bool] = []

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            seen.append(not parts.idle.is_now)
            if scope.get("fails"):
                raise RuntimeError

        requests = LiveRequests(inner)
        for method, path in [
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("DELETE", "/v1/memories"),
            ("GET", "/v1/memories"),
            ("POST", "/v1/scenes"),
        ]:
            await requests({"type": "http", "method": method, "path": path, "app": app}, None, None)
        assert seen == [True, True, True, False, False]
        with pytest.raises(RuntimeError):
            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "app": app, "fails": True}
            await requests(scope, None, None)
        assert parts.idle.is_now

    run(play)


def test_a_start_is_declared_when_it_changed_and_only_then(run: Any) -> None:
    async def play(parts: Parts) -> None:
        parts.turn()
        assert await parts.declare() == ["<system>Be brief.<user>"]
        parts.turn()
        assert await parts.declare() == []
        parts.service.add(WHO, "Likes tea.")
        assert await parts.declare() == ["<system>Be brief.\n\nWhat you remember about this user:\n- Likes tea.<user>"]
        parts.turn("Be kind.")
        (text,) = await parts.declare()
        assert text.startswith("<system>Be kind.")
        parts.starts.lost([parts.planner.start_id(WHO)])
        assert len(await parts.declare()) == 1

    run(play)


def test_a_start_has_the_salt_of_the_memory_in_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion while the start is rendered must not put the old text under the new salt, nor lose the start."""

    async def play(parts: Parts) -> None:
        record = parts.service.add(WHO, "Likes tea.")
        parts.turn()
        original = parts.service.prepare

        def deleted_meanwhile(who: Principal) -> Any:
            parts.service.delete(who, record.id)
            return original(who)

        monkeypatch.setattr(parts.service, "prepare", deleted_meanwhile)
        assert await parts.declare() == []
        monkeypatch.setattr(parts.service, "prepare", original)
        assert await parts.declare() == ["<system>Be brief.<user>"]
        assert [each["salt"] for each in parts.engine.declared] == ["memos:1"]

    run(play)


def test_a_start_has_the_adapter_of_the_coming_request(run: Any) -> None:
    """The one that requests name, or the user's default as it is now; not the one of the last request."""
    from vllm.lora.request import LoRARequest

    def style(name: str) -> Coming:
        return Coming(name, LoRARequest(name, 7, "/adapters"))

    async def play(parts: Parts) -> None:
        start_id = parts.planner.start_id(WHO)

        async def declared() -> list[str | None]:
            number = len(parts.engine.declared)
            await parts.declare()
            return [(each["lora"] or {}).get("lora_name") for each in parts.engine.declared[number:]]

        parts.turn()
        assert await declared() == [None] and parts.adapters.references == {start_id: None}
        parts.adapters.set(None, style("default"))
        assert parts.builder._stamp != await parts.builder._look() and await declared() == ["default"]
        assert parts.adapters.references == {start_id: "default"}, "it is loaded with the start's KV"
        parts.adapters.set("other", style("other"))
        assert await declared() == [], "another one has changed"
        parts.turn(adapter="other")
        assert await declared() == ["other"]
        parts.turn()
        assert await declared() == ["default"]
        parts.adapters.set(None, Coming())
        assert await declared() == [None]

    run(play)


def test_a_start_leaves_out_what_its_adapter_stands_for(run: Any) -> None:
    async def play(parts: Parts) -> None:
        known, other = (parts.service.add(WHO, text) for text in ("Likes tea.", "Has a cat."))
        parts.adapters.set(None, Coming("knows", None, frozenset({(known.id, known.version)})))
        parts.turn()
        (text,) = await parts.declare()
        assert other.text in text and known.text not in text

    run(play)


def test_after_builds_with_adapters_those_that_are_expected_get_their_slots_back(run: Any) -> None:
    lora = {"lora_name": "style", "lora_int_id": 7, "lora_path": "/adapters"}

    async def play(parts: Parts) -> None:
        engine = parts.engine
        engine.pieces += [{**PIECE, "lora": lora}, PIECE]
        engine.finish.set()
        assert not await parts.builder._work() and parts.adapters.num_prefetches == 1
        engine.pieces.append(PIECE)
        assert not await parts.builder._work() and parts.adapters.num_prefetches == 1, "no slot was taken"

    run(play)


def test_a_piece_whose_adapter_is_gone_is_not_run_and_stops_nothing(run: Any) -> None:
    async def play(parts: Parts) -> None:
        engine = parts.engine
        parts.adapters.gone = True
        lora = {"lora_name": "memos-x", "lora_int_id": 7, "lora_path": "/gone"}
        engine.pieces += [{**PIECE, "lora": lora}, PIECE]
        engine.finish.set()
        parts.builder.wake()
        await engine.until("claim", "claim", "piece", "built", "claim")

    run(play)


def test_a_forgotten_user_has_no_start(run: Any) -> None:
    async def play(parts: Parts) -> None:
        parts.turn()
        parts.builder.forget(WHO)
        assert await parts.declare() == []

    run(play)


def test_an_adapter_travels_with_its_scene() -> None:
    from vllm.lora.request import LoRARequest

    from memos_vllm.integration.scene_builds import SceneBuilds

    scene = SimpleNamespace(scene_id="s", num_blocks=2)
    table = SimpleNamespace(
        expected=[scene],
        is_resident=lambda *_: False,
        is_absent=lambda *_: True,
        has_room=lambda *_: True,
    )
    builds = SceneBuilds(table, block_size=2, max_step_tokens=64, max_scene_tokens=64)
    adapter = LoRARequest("style", 7, "/adapters/style")
    request = SimpleNamespace(
        mm_features=[], prompt_embeds=None, prompt_token_ids=[1, 2, 3, 4], all_token_ids=[1, 2, 3, 4, 5],
        cache_salt="memos:x", lora_request=adapter,
    )  # fmt: skip
    builds.show("s", request, 2)
    piece = builds.claim("p", 64)["piece"]
    assert piece["token_ids"] == [1, 2, 3, 4] and LoRARequest(**piece["lora"]) == adapter

    memory: Any = SimpleNamespace(
        builds=builds,
        building=lambda work, otherwise: work(builds),
        accounting=SimpleNamespace(changed=lambda: None),
    )
    for name, expected in (("other", True), ("style", False)):
        engine_operations.serve(memory, "give_up_builds", {"lora_name": name})
        assert (builds.claim("p", 64)["piece"] is not None) == expected
    assert builds.unknown(["s"]) == [], "a start is not declared anew for it"
    builds.used("s")
    assert builds.claim("p", 64)["piece"] is not None, "it is tried again after a request could have it"

    builds.show("s", SimpleNamespace(**{**vars(request), "mm_features": ["image"]}), 2)
    assert builds.claim("p", 64)["piece"] is None, "tokens alone would compute something else"
