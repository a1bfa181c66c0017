"""An adapter holds the text of the memories it was distilled from: it goes with them, however they go or change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memos_vllm.config import MemoryConfig
from memos_vllm.integration import chat, engine_channel
from memos_vllm.integration.caretaker import Caretaker
from memos_vllm.integration.state import MemosState
from memos_vllm.memory import claims
from memos_vllm.memory.results import Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.adapters.adapter_factories import ALICE, BOB, adapter_folder
from tests.memory.memory_factories import Clock
from tests.unit.test_memory_routes import state_with

JOB, CITY = "My job is baker.", "My home city is Turin."


class World:
    """A server without an engine, and an adapter that knows two memories of Alice."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.store = MemoryStore(folder / "memory", 2**30)
        self.service = MemoryService(self.store, MemoryConfig(), now=self.clock)
        self.state: MemosState = state_with(self.service, folder)
        self.state.planner = SimpleNamespace(turn_ended=lambda *_: None)  # type: ignore[assignment]
        self.service.life.take_snapshot(ALICE, "before")
        (self.job,) = self.service.remember(ALICE, [{"role": "user", "content": JOB}])
        self.city = self.service.add(ALICE, CITY, ttl_s=1000)
        memories = [
            {"id": each.id, "version": each.version, "fingerprint": claims.text_key(each.text).hex()}
            for each in (self.job, self.city)
        ]
        origin = {"distilled": {"tenant": "shop", "user": "alice", "memories": memories}}
        self.registry = self.state.adapters.registry
        self.registry.register(ALICE, "knows", adapter_folder(folder / "knows"), origin=origin)

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.registry.list(ALICE)]

    def say(self, text: str) -> None:
        """A turn, from the moment its answer is out."""
        turn = chat.Turn(ALICE, chat.MemosField(), [{"role": "user", "content": text}], [], "request")
        asyncio.run(chat.end_turn(turn, Recall((), ()), "scene", self.state, []))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    async def call(*_: Any) -> list[dict[str, Any]]:
        return [{"host_blocks": 0, "disk_blocks": 0, "scenes": 0}]

    monkeypatch.setattr(engine_channel, "call", call)
    world = World(tmp_path)
    yield world
    world.store.close()
    world.registry.close()


def merge(world: World) -> None:
    other = world.service.add(ALICE, "My job starts at four.")
    world.service.life.merge(ALICE, world.job.id, [other.id], "My job is baker, and starts at four.")


@pytest.mark.parametrize(
    "change",
    [
        lambda world: world.service.delete(ALICE, world.city.id),
        lambda world: world.service.delete_all(ALICE),
        lambda world: world.service.update(ALICE, world.job.id, text="My job is pilot."),
        merge,
    ],
    ids=["delete", "delete all", "update", "merge"],
)
def test_it_goes_with_the_kv_of_a_memory_that_is_gone_or_changed(world: World, change: Callable[[World], Any]) -> None:
    change(world)
    asyncio.run(world.state.forget_kv(ALICE))
    assert world.names == []


@pytest.mark.parametrize(
    "change",
    [
        lambda world: world.clock.forward(2000),
        lambda world: world.service.life.set_state(ALICE, world.job.id, "archived"),
        lambda world: world.service.update(ALICE, world.job.id, sensitivity="sensitive"),
        lambda world: world.service.update(ALICE, world.job.id, type="trajectory"),
        lambda world: world.service.life.roll_back(ALICE, world.service.life.snapshots(ALICE)[0].id),
    ],
    ids=["expire", "archive", "keep secret", "make it a trajectory", "roll back"],
)
def test_it_goes_with_a_memory_that_no_prompt_may_hold_any_more(world: World, change: Callable[[World], Any]) -> None:
    change(world)
    asyncio.run(Caretaker(world.state).look_after())
    assert world.names == []


def test_it_goes_with_a_memory_that_a_turn_contradicts(world: World) -> None:
    world.say("My job is pilot.")
    assert world.names == []


@pytest.mark.parametrize(
    "change",
    [
        lambda world: world.say("My favourite drink is oolong tea."),
        lambda world: world.say(JOB),
        lambda world: world.service.update(ALICE, world.job.id, tags=["work"]),
        lambda world: world.service.delete(ALICE, world.service.add(ALICE, "Has a cat.").id),
        lambda world: world.service.delete_all(Principal("shop", "bob")),
    ],
    ids=["another fact", "the same again", "tags", "another memory", "another user"],
)
def test_it_stays_while_its_memories_say_the_same(world: World, change: Callable[[World], Any]) -> None:
    change(world)
    for who in (ALICE, BOB):
        asyncio.run(world.state.forget_kv(who))
        asyncio.run(world.state.withdraw_adapters(who))
    assert world.names == ["knows"]


def test_a_crash_before_it_went_is_made_up_for(world: World) -> None:
    """The deletion is written, and the process is gone before anything else happened."""
    world.service.delete(ALICE, world.city.id)
    assert world.names == ["knows"]
    asyncio.run(Caretaker(world.state).look_after())
    assert world.names == []
