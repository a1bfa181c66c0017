"""Reports and logs of distillations quote memories: they go, or are cut, with these."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.config import MemoryConfig
from memos_vllm.integration import distillations, engine_channel, memories
from memos_vllm.integration.caretaker import Caretaker
from memos_vllm.integration.distillation_jobs import KEPT_S, DistillationJobs
from memos_vllm.integration.identity import resolve
from memos_vllm.integration.state import MemosState
from memos_vllm.memory import claims
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.memory.memory_factories import Clock
from tests.unit.test_memory_routes import Engine, state_with

SECRET = "Dr. Wu"
CUT = {"published": None, "refused": "so", "withdrawn": True}


class World:
    """A server without an engine, and a job that used one of the user's two memories."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.store = MemoryStore(folder / "memory", 2**30)
        self.service = MemoryService(self.store, MemoryConfig(), now=self.clock)
        self.state: MemosState = state_with(self.service, folder)
        app = FastAPI()
        for router in (memories.router, distillations.router):
            app.include_router(router)
        app.state.memos = self.state
        headers = {"authorization": "Bearer alice"}
        self.client = TestClient(app, headers=headers, raise_server_exceptions=False)
        self.who = resolve(headers, self.state.config.identity).principal
        self.used = self.service.add(self.who, f"{SECRET}'s patient number is 4711.", ttl_s=1000)
        self.other = self.service.add(self.who, "I like tea.")
        self.jobs = DistillationJobs(folder)
        self.job = self.jobs.begin(self.who)

    def end(self, *, by_itself: bool = True) -> None:
        question = {"question": f"What is {SECRET}'s patient number?", "memory": self.used.id}
        source = {"id": self.used.id, "version": 1, "fingerprint": claims.text_key(self.used.text).hex()}
        report = {"published": None, "refused": "so", "memories": [source], "questions": [question]}
        self.jobs.log_path(self.job).write_text(json.dumps(report))
        if by_itself:
            self.jobs.report_path(self.job).write_text(json.dumps(report))
        self.jobs.end(self.job)

    def report(self) -> Any:
        return self.client.get(f"/v1/adapters/distill/{self.job}").json()

    @property
    def on_disk(self) -> str:
        return "".join(path.read_text() for path in self.jobs.folder.iterdir())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(engine_channel, "call", Engine().call)
    world = World(tmp_path)
    yield world
    world.store.close()
    world.state.adapters.registry.close()


def test_a_report_stays_while_its_memories_say_the_same(world: World) -> None:
    world.end()
    world.client.delete(f"/v1/memories/{world.other.id}")
    asyncio.run(Caretaker(world.state).look_after())
    assert SECRET in json.dumps(world.report()) and world.report()["state"] == "ended"


def test_a_report_says_only_how_it_ended_once_its_memory_is_deleted(world: World) -> None:
    world.end()
    world.client.delete(f"/v1/memories/{world.used.id}")
    assert SECRET not in world.on_disk
    assert world.report() == {"id": world.job, "state": "ended", **CUT}


def test_all_go_with_all_memories(world: World) -> None:
    world.end()
    bobs = world.jobs.begin(Principal("shop", "bob"))
    world.client.delete("/v1/memories")
    assert world.report()["error"]["code"] == 404
    assert {path.name.partition(".")[0] for path in world.jobs.folder.iterdir()} == {bobs}


def test_a_log_without_a_report_goes_with_all_memories(world: World) -> None:
    world.end(by_itself=False)
    assert world.report() == {"id": world.job, "state": "interrupted"}
    world.client.delete("/v1/memories")
    assert list(world.jobs.folder.iterdir()) == []


def test_a_job_that_runs_while_its_memory_goes_is_cut(world: World) -> None:
    world.client.delete("/v1/memories")
    assert world.report()["state"] == "running"
    world.end()
    assert world.report() == {"id": world.job, "state": "ended", **CUT}
    assert SECRET not in world.on_disk


def test_time_cuts_it_too(world: World) -> None:
    world.end()
    world.clock.forward(2000)
    asyncio.run(Caretaker(world.state).look_after())
    assert SECRET not in world.on_disk


def test_old_ones_go(world: World) -> None:
    world.end()
    last_s = max(path.stat().st_mtime for path in world.jobs.folder.iterdir())
    world.jobs.remove_old(last_s + KEPT_S)
    assert world.jobs.users() == {world.who}
    world.jobs.remove_old(last_s + KEPT_S + 1)
    assert list(world.jobs.folder.iterdir()) == []
