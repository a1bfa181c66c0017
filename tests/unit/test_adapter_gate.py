"""Between a request and the engine: what is loaded when, what fails how, and that nothing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from memos_vllm.adapters.records import Scope
from memos_vllm.config import AdaptersConfig
from memos_vllm.errors import AdapterError, AdapterUnavailable, NotFound
from memos_vllm.integration import adapter_gate, engine_channel, expected_adapters
from memos_vllm.integration.adapter_gate import AdapterGate, Choice
from memos_vllm.integration.memory_metrics import MemoryMetrics
from tests.adapters.adapter_factories import ALICE, BOB, adapter_folder, open_registry

SLOTS = 3


class FakeEngine:
    """Remembers what it was asked to load; refuses ids in ``broken``."""

    def __init__(self, lora: bool = True) -> None:
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_loras=SLOTS) if lora else None)
        self.loaded: list[int] = []
        self.broken: set[int] = set()
        self.in_use: set[int] = set()

    async def add_lora(self, request: Any) -> bool:
        await asyncio.sleep(0)
        if request.lora_int_id in self.broken:
            raise Exception("Call to add_lora method failed:\r\nno such módule")
        self.loaded.append(request.lora_int_id)
        return True

    async def list_loras(self) -> set[int]:
        return set(self.loaded)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()

    async def call(client: FakeEngine, op: str, payload: Any = None) -> list[dict[str, Any]]:
        assert client is engine and op == "adapters"
        return [{"in_use": sorted(engine.in_use)}]

    monkeypatch.setattr(engine_channel, "call", call)
    return engine


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Any]:
    registry = open_registry(tmp_path / "registry")
    for seed in range(6):
        registry.register(ALICE, f"a{seed}", adapter_folder(tmp_path / f"a{seed}", seed))
    yield registry
    registry.close()


class Serving:
    """The two methods of vLLM's serving object that matter here."""

    def __init__(self) -> None:
        self.models = SimpleNamespace(
            lora_requests={"listed": "vLLM's own"}, model_name=lambda lora=None: lora or "base"
        )

    def _maybe_get_adapters(self, request: Any, supports_default_mm_loras: bool = False) -> Any:
        return self.models.lora_requests.get(request.model)


def number(registry: Any, name: str) -> int:
    return registry.find(ALICE, name)[1].lora_int_id


def counted(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"memos:adapter_{name}_total", labels)


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(body())  # type: ignore[arg-type]


def gate_of(engine: FakeEngine, registry: Any, on_error: str = "fail") -> AdapterGate:
    return AdapterGate(engine, registry, AdaptersConfig(on_error=on_error), MemoryMetrics())  # type: ignore[arg-type]


def test_concurrent_requests_have_each_their_own(engine: FakeEngine, registry: Any) -> None:
    gate, serving = gate_of(engine, registry), Serving()

    async def request(name: str | None) -> tuple[Any, str]:
        choice = await gate.use(ALICE, name, serving, "base") or Choice()
        with choice.active():
            await asyncio.sleep(0)
            found = serving._maybe_get_adapters(SimpleNamespace(model="base"), supports_default_mm_loras=True)
            shown = serving.models.model_name(found)
        choice.close()
        assert serving._maybe_get_adapters(SimpleNamespace(model="base")) is None, "not beyond the call"
        return getattr(found, "lora_int_id", None), shown

    async def body() -> list[Any]:
        return await asyncio.gather(*(request(name) for name in ("a0", None, "a1", "a0", None, "a2")))

    ids = {name: number(registry, name) for name in ("a0", "a1", "a2")}
    expected = [ids["a0"], None, ids["a1"], ids["a0"], None, ids["a2"]]
    assert run(body) == [(each, "base") for each in expected]
    assert sorted(engine.loaded) == sorted(ids.values()), "each is loaded once, however many ask at a time"


def test_vllms_own_adapters_stay_as_they_were(engine: FakeEngine, registry: Any) -> None:
    gate, serving = gate_of(engine, registry), Serving()
    registry.set_profile(ALICE, "a0")

    async def body() -> None:
        assert await gate.use(ALICE, None, serving, "listed") is None, "the default gives way to the model"
        with pytest.raises(AdapterError, match="name the base model"):
            await gate.use(ALICE, "a0", serving, "listed")
        choice = await gate.use(ALICE, "a0", serving, "base")
        choice.close()
        assert serving._maybe_get_adapters(SimpleNamespace(model="listed")) == "vLLM's own"
        assert serving.models.model_name("vLLM's own") == "vLLM's own"

    run(body)


@pytest.mark.parametrize("on_error", ["base", "fail"])
def test_a_load_that_fails_does_as_configured_and_holds_no_files(
    engine: FakeEngine, registry: Any, on_error: str
) -> None:
    gate = gate_of(engine, registry, on_error)
    engine.broken.add(number(registry, "a0"))

    async def body() -> None:
        if on_error == "fail":
            with pytest.raises(AdapterUnavailable, match="cannot be loaded by vLLM"):
                await gate.use(ALICE, "a0", Serving(), "base")
        else:
            choice = await gate.use(ALICE, "a0", Serving(), "base")
            assert choice.request is None and choice.header.startswith("base; adapter 'a0@1' cannot be loaded")
            assert choice.header.isascii() and choice.header.isprintable(), "it goes into a header"

    run(body)
    assert gate.totals.failures == 1 and registry.files.num_held == 0
    assert counted("requests", outcome="base" if on_error == "base" else "refused") == 1
    assert counted("requests", outcome="served") == counted("loads", reason="request") == 0


@pytest.mark.parametrize("on_error", ["base", "fail"])
def test_what_a_request_names_must_exist(engine: FakeEngine, registry: Any, on_error: str) -> None:
    gate = gate_of(engine, registry, on_error)

    async def body() -> None:
        for who, name in ((ALICE, "nothing"), (BOB, "a0"), (ALICE, "a0@7")):
            with pytest.raises(NotFound):
                await gate.use(who, name, Serving(), "base")

    run(body)


@pytest.mark.parametrize("setting", ["keep", "leave_out"])
def test_a_distilled_adapter_stands_for_its_memories_where_the_operator_wants_it(
    engine: FakeEngine, registry: Any, tmp_path: Path, setting: str
) -> None:
    origin = {"distilled": {"tenant": "shop", "user": "alice", "memories": [{"id": "m1", "version": 2}]}}
    registry.register(ALICE, "knows", adapter_folder(tmp_path / "knows", 9), Scope.TENANT, origin)
    gate = AdapterGate(engine, registry, AdaptersConfig(distilled_text=setting), MemoryMetrics())  # type: ignore[arg-type]

    async def body() -> list[Any]:
        choices = [await gate.use(who, "knows", Serving(), "base") for who in (ALICE, BOB)]
        for choice in choices:
            choice.close()
        return [choice.instead_of for choice in choices]

    assert run(body) == [{("m1", 2)} if setting == "leave_out" else set(), set()], "the memories are Alice's"


def test_a_server_without_lora_refuses_what_is_named_and_nothing_else(registry: Any) -> None:
    gate = gate_of(FakeEngine(lora=False), registry)
    registry.set_profile(ALICE, "a0")

    async def body() -> None:
        with pytest.raises(AdapterError, match="--enable-lora"):
            await gate.use(ALICE, "a0", Serving(), "base")
        assert (await gate.use(ALICE, None, Serving(), "base")).request is None
        assert await gate.use(BOB, None, Serving(), "base") is None
        await gate.expected.prefetch(["scene"])

    run(body)


def test_a_request_that_is_cancelled_while_it_loads_holds_no_files(engine: FakeEngine, registry: Any) -> None:
    gate = gate_of(engine, registry)

    async def never(request: Any) -> bool:
        await asyncio.Event().wait()
        return True

    engine.add_lora = never  # type: ignore[method-assign]

    async def body() -> None:
        task = asyncio.create_task(gate.use(ALICE, "a0", Serving(), "base"))
        while not registry.files.num_held:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(body)
    assert registry.files.num_held == 0


def test_prefetch_takes_the_free_slots_loads_the_best_first_and_uses_it_last(engine: FakeEngine, registry: Any) -> None:
    """The best is needed first; vLLM evicts what was used least recently."""
    gate = gate_of(engine, registry)
    for index in range(5):
        gate.expected.expect(f"scene-{index}", ALICE, f"a{index}")
    gate.expected.expect("again", ALICE, "a0")
    engine.in_use = {number(registry, "a1")}
    scenes = ["none", "scene-0", "again", "scene-1", "scene-2", "scene-3"]
    run(lambda: gate.expected.prefetch(scenes))
    a0, a2 = number(registry, "a0"), number(registry, "a2")
    assert engine.loaded == [a0, a2, a0], "one of three slots is in use"
    assert gate.totals.prefetches == 2 and registry.files.num_held == 0
    run(lambda: gate.expected.prefetch(scenes))
    assert engine.loaded[3:] == [], "nothing was used since that would be evicted later than they"
    a5 = number(registry, "a5")
    engine.loaded.append(a5)
    run(lambda: gate.expected.prefetch(scenes))
    assert engine.loaded[4:] == [a0, a2, a0], "they are used again, and stay"
    assert gate.totals.prefetches == 2, "what is there is not brought"
    engine.loaded = [a0, a2]
    run(lambda: gate.expected.prefetch(["scene-2", "scene-0"]))
    assert engine.loaded[2:] == [a2, a0, a2], "another order, so another one is to leave first"
    engine.loaded = [a0]
    run(lambda: gate.expected.prefetch(["scene-2", "scene-0"]))
    assert gate.totals.prefetches == 3, "vLLM has evicted one"


def test_what_the_next_request_will_have_is_known_and_whether_it_is_loaded(engine: FakeEngine, registry: Any) -> None:
    gate = gate_of(engine, registry)
    gate.expected.expect("scene", ALICE, "a1")

    async def body() -> None:
        assert await gate.expected.next_adapter("scene", ALICE) == {"name": "a1@1", "loaded": False}
        await gate.expected.prefetch(["scene"])
        assert await gate.expected.next_adapter("scene", ALICE) == {"name": "a1@1", "loaded": True}
        assert await gate.expected.next_adapter("new", ALICE) is None
        registry.set_profile(ALICE, "a2")
        assert await gate.expected.next_adapter("new", ALICE) == {"name": "a2@1", "loaded": False}
        registry.delete(ALICE, "a1")
        assert await gate.expected.next_adapter("scene", ALICE) is None

    run(body)
    without = gate_of(FakeEngine(lora=False), registry)
    assert run(lambda: without.expected.next_adapter("new", ALICE)) is None


def test_an_adapter_that_is_refused_when_it_is_used_once_more_stops_nothing(engine: FakeEngine, registry: Any) -> None:
    gate = gate_of(engine, registry)
    for index in range(3):
        gate.expected.expect(f"scene-{index}", ALICE, f"a{index}")
    load = engine.add_lora

    async def full(request: Any) -> bool:
        if len(engine.loaded) == 3:
            engine.broken.add(number(registry, "a1"))
        return await load(request)

    engine.add_lora = full  # type: ignore[method-assign]
    run(lambda: gate.expected.prefetch(["scene-0", "scene-1", "scene-2"]))
    assert engine.loaded[3:] == [number(registry, "a0")], "the most valuable one is still used last"


def test_prefetch_never_touches_the_engine_without_an_adapter(engine: FakeEngine, registry: Any) -> None:
    gate = gate_of(engine, registry)
    gate.expected.expect("scene", ALICE, "a0")
    gate.expected.expect("scene", ALICE, None)
    engine.in_use = None  # type: ignore[assignment]
    run(lambda: gate.expected.prefetch(["scene", "other"]))
    assert engine.loaded == []


def test_a_scene_whose_adapter_is_gone_or_broken_stops_nothing(engine: FakeEngine, registry: Any) -> None:
    gate = gate_of(engine, registry)
    for index in range(3):
        gate.expected.expect(f"scene-{index}", ALICE, f"a{index}")
    registry.delete(ALICE, "a0")
    engine.broken.add(number(registry, "a1"))
    run(lambda: gate.expected.prefetch(["scene-0", "scene-1", "scene-2"]))
    assert engine.loaded == [number(registry, "a2")]


def test_a_prefetched_adapter_counts_when_it_is_used(engine: FakeEngine, registry: Any) -> None:
    gate = gate_of(engine, registry)

    async def body() -> None:
        assert await gate.expected.hint("scene", ALICE, "a0")
        with pytest.raises(NotFound):
            await gate.expected.hint("scene", BOB, "a0")
        await gate.expected.prefetch(["scene"])
        for _ in range(2):
            (await gate.use(ALICE, "a0", Serving(), "base")).close()

    run(body)
    assert gate.totals.prefetch_used == 1 and gate.totals.loads == 0 and engine.loaded == [number(registry, "a0")]
    assert counted("prefetch_used") == counted("loads", reason="prefetch") == 1
    assert counted("requests", outcome="served") == 2


def test_the_number_of_remembered_scenes_is_bounded(
    engine: FakeEngine, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected_adapters, "MAX_SCENES", 2)
    gate = gate_of(engine, registry)
    for index in range(4):
        gate.expected.expect(f"scene-{index}", ALICE, "a0")
    assert list(gate.expected._scenes) == ["scene-2", "scene-3"]


def test_a_user_with_many_scenes_pushes_out_his_own_and_nobody_elses(
    engine: FakeEngine, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected_adapters, "MAX_SCENES", 4)
    monkeypatch.setattr(expected_adapters, "MAX_SCENES_PER_USER", 2)
    expected = gate_of(engine, registry).expected
    expected.expect("bob-0", BOB, "b0")
    for index in (0, 1, 2, 1, 3):  # said again, a scene is the latest
        expected.expect(f"scene-{index}", ALICE, "a0")
    assert list(expected._scenes) == ["bob-0", "scene-1", "scene-3"]
    expected.expect("scene-1", ALICE, None)
    expected.expect("scene-4", ALICE, "a0")
    assert list(expected._scenes) == ["bob-0", "scene-3", "scene-4"], "what is not expected any more takes no share"
    expected.expect("scene-3", BOB, "b0")
    expected.expect("scene-5", ALICE, "a0")
    assert list(expected._scenes) == ["bob-0", "scene-4", "scene-3", "scene-5"], "a share goes with the scene"


def test_the_shares_of_users_are_forgotten_with_their_scenes(
    engine: FakeEngine, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected_adapters, "MAX_SCENES", 1)
    expected = gate_of(engine, registry).expected
    expected.expect("bob", BOB, "b0")
    expected.expect("alice", ALICE, "gone")
    assert list(expected._of_user) == [ALICE], "what had the room before"
    run(lambda: expected.prefetch(["alice"]))
    assert not expected._of_user and not expected._scenes, "there is no such adapter"


def knows(registry: Any, tmp_path: Path, name: str, *memories: str) -> None:
    sources = [{"id": each, "version": 1, "fingerprint": "f"} for each in memories]
    origin = {"distilled": {"tenant": "shop", "user": "alice", "memories": sources}}
    registry.register(ALICE, name, adapter_folder(tmp_path / name, len(name)), Scope.TENANT, origin)


@pytest.mark.parametrize("choose", ["request", "assembler"])
def test_the_assembler_chooses_what_knows_most_where_nobody_else_does(
    engine: FakeEngine, registry: Any, tmp_path: Path, choose: str
) -> None:
    knows(registry, tmp_path, "one", "m1")
    knows(registry, tmp_path, "several", "m1", "m2")
    gate = AdapterGate(engine, registry, AdaptersConfig(choose=choose), MemoryMetrics())  # type: ignore[arg-type]
    memories = [SimpleNamespace(id=each, version=1) for each in ("m1", "m2", "m3")]

    async def chosen(named: str | None = None, who: Any = ALICE, these: Any = memories) -> str | None:
        choice = await gate.use(who, named, Serving(), "base", these)
        coming = gate.coming(who, named, Serving(), "base", these)
        if choice is None:
            assert coming == adapter_gate.Coming()
            return None
        assert (coming.lora, coming.reference) == (choice.request, choice.reference), "what is built is what is used"
        choice.close()
        return choice.reference

    async def body() -> list[str | None]:
        unnamed = [await chosen(), await chosen(these=memories[2:]), await chosen(who=BOB), await chosen("one")]
        registry.set_profile(ALICE, "a0")
        return [*unnamed, await chosen()]

    best = "several" if choose == "assembler" else None
    assert run(body) == [best, None, None, "one", "a0"], "others' memories, the request and the default go first"


def test_what_comes_is_the_base_model_where_the_adapter_could_not_be_served(engine: FakeEngine, registry: Any) -> None:
    gate, serving = gate_of(engine, registry), Serving()
    serving.models.lora_requests = {"listed": "vLLM's own"}
    assert gate.coming(ALICE, None, serving, "listed", ()).lora == "vLLM's own"
    assert gate.coming(ALICE, "a0", serving, "base", ()).lora.lora_int_id == number(registry, "a0")
    assert gate.coming(BOB, "a0", serving, "base", ()).lora is None
    (registry.files.folder(registry.find(ALICE, "a0")[1].digest) / "adapter_model.safetensors").unlink()
    assert gate.coming(ALICE, "a0", serving, "base", ()).lora is None


def test_a_build_holds_its_adapters_files_and_has_it_loaded(engine: FakeEngine, registry: Any) -> None:
    gate = gate_of(engine, registry)
    lora = gate.coming(ALICE, "a0", Serving(), "base", ()).lora

    async def body() -> None:
        async with gate.building(lora):
            assert registry.files.num_held == 1 and engine.loaded == [number(registry, "a0")]
        async with gate.building(None):
            assert registry.files.num_held == 0

    run(body)


async def build(gate: AdapterGate, lora: Any) -> None:
    async with gate.building(lora):
        pass


@pytest.fixture
def told(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the engine was told of which adapter."""
    told: list[tuple[str, str]] = []

    async def call(client: FakeEngine, op: str, payload: Any = None) -> list[dict[str, Any]]:
        told.append((op, payload["lora_name"]))
        return [{}]

    monkeypatch.setattr(engine_channel, "call", call)
    return told


@pytest.mark.parametrize("end", ["deleted", "broken", "damaged"])
def test_a_build_with_an_adapter_that_does_not_load_never_reaches_the_engine(
    engine: FakeEngine, registry: Any, told: list[tuple[str, str]], end: str
) -> None:
    """Only what is gone is forgotten: the name is forgotten for ever, with all that was computed under it."""
    gate = gate_of(engine, registry)
    lora = gate.coming(ALICE, "a0", Serving(), "base", ()).lora
    if end == "deleted":
        registry.delete(ALICE, "a0")
    elif end == "broken":
        engine.broken.add(number(registry, "a0"))
    else:
        (registry.files.folder(registry.find(ALICE, "a0")[1].digest) / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterUnavailable):
        run(lambda: build(gate, lora))
    assert engine.loaded == [] and registry.files.num_held == 0
    op = "forget_adapter" if end == "deleted" else "give_up_builds"
    assert told == [(op, lora.lora_name)], "or it would be claimed again and again"


def test_a_build_goes_on_when_its_adapter_loads_again(
    engine: FakeEngine, registry: Any, told: list[tuple[str, str]]
) -> None:
    gate = gate_of(engine, registry)
    lora = gate.coming(ALICE, "a0", Serving(), "base", ()).lora
    engine.broken.add(lora.lora_int_id)
    with pytest.raises(AdapterUnavailable, match="cannot be loaded by vLLM"):
        run(lambda: build(gate, lora))
    engine.broken.clear()
    run(lambda: build(gate, lora))
    assert engine.loaded == [lora.lora_int_id] and counted("loads", reason="build") == 1
    assert told == [("give_up_builds", lora.lora_name)]


@pytest.mark.parametrize("end", ["stands", "unloaded", "loaded anew", "files gone", "no endpoint"])
def test_a_build_with_vllms_own_adapter_has_it_loaded_while_it_stands(
    engine: FakeEngine, registry: Any, told: list[tuple[str, str]], end: str
) -> None:
    """The operator may have unloaded it since, and removed its folder; vLLM's engine would not survive the load."""
    from vllm.lora.request import LoRARequest

    serving, lora = Serving(), LoRARequest("listed", 1, "/adapters/listed")
    serving.models.lora_requests = {"listed": LoRARequest("listed", 2 if end == "loaded anew" else 1, lora.lora_path)}
    config = AdaptersConfig()
    gate = AdapterGate(engine, registry, config, MemoryMetrics(), lambda: None if end == "no endpoint" else serving)  # type: ignore[arg-type]
    if end == "unloaded":
        serving.models.lora_requests.clear()
    elif end == "files gone":
        engine.broken.add(1)
    if end == "stands":
        run(lambda: build(gate, lora))
        assert engine.loaded == [1] and told == []
        return
    with pytest.raises(AdapterUnavailable):
        run(lambda: build(gate, lora))
    assert engine.loaded == [] and told == [("give_up_builds", "listed")]
