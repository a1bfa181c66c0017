"""A deletion runs in the engine's loop: it finds what goes by an index, not by a look at every scene."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from memos_vllm.integration import salts
from memos_vllm.integration.tag_index import TagIndex
from tests.engine.test_scene_machine import BLOCK_SIZE, SceneMachine, block_hasher

NUM_USERS = 40
NUM_SCENES = 3


@pytest.fixture
def machine() -> Iterator[SceneMachine]:
    machine = SceneMachine()
    yield machine
    machine.teardown()


def declare(machine: SceneMachine, user: int, scene: int) -> None:
    token_ids = [user * 100 + scene] * (2 * BLOCK_SIZE)
    payload = {"scene": f"{user} {scene}", "token_ids": token_ids, "salt": f"memos:user{user}", "lora": None}
    engine = SimpleNamespace(request_block_hasher=block_hasher())
    assert machine.side.handle("declare", payload, engine)["blocks"] == 2


def test_a_deletion_derives_the_tag_of_no_scene(machine: SceneMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    for user, scene in itertools.product(range(NUM_USERS), range(NUM_SCENES)):
        declare(machine, user, scene)
    declare(machine, 7, 0)  # shown anew
    derived: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(salts, name)
        return lambda *args: derived.update([name]) or original(*args)

    for name in ("tag", "tag_of"):
        monkeypatch.setattr(salts, name, counted(name))
    receipt = machine.side.handle("forget", {"salt": "memos:user7"}).result()
    machine.side.handle("give_up_builds", {"lora_name": "style"})
    assert receipt["scenes"] == NUM_SCENES
    assert derived == {"tag": 1}, "what is deleted, and nothing else"
    memory = machine.side.memory
    left = {f"{user} {scene}" for user in range(NUM_USERS) for scene in range(NUM_SCENES) if user != 7}
    assert {scene.scene_id for scene in memory.scenes.known} == set(memory.builds._contents) == left
    assert machine.side.handle("forget", {"salt": "memos:user7"}).result()["scenes"] == 0


def test_an_index_finds_what_goes_with_an_owner_or_an_adapter_and_keeps_nothing_else() -> None:
    ada, bob, style = (salts.tag("memos:ada"), salts.tag("memos:bob"), salts.adapter_tag("style"))
    index = TagIndex()
    filed = {"plain": ada, "styled": ada + style, "bob's": bob + style}
    for name, tag in filed.items():
        index.add(name, tag)
    assert index.find(ada) == ["plain", "styled"]
    assert index.find(style) == ["styled", "bob's"]
    assert index.find(bob) == ["bob's"] and index.find(salts.tag("memos:nobody")) == []
    for name, tag in filed.items():
        index.remove(name, tag)
    assert len(index) == 0
