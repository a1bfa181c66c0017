"""Which memories may go into weights: those that may stand in any prompt, when it begins and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memos_vllm import distill
from memos_vllm.config import MemoryConfig
from memos_vllm.errors import Conflict, NotFound
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from tests.adapters.adapter_factories import ALICE, BOB

LEFT_OUT: dict[str, Callable[[MemoryService], MemoryRecord]] = {
    "sensitive": lambda service: service.add(ALICE, "My blood type is AB.", sensitivity="sensitive"),
    "archived": lambda service: service.life.set_state(
        ALICE, service.add(ALICE, "My old car is a Fiat.").id, "archived"
    ),
    "working": lambda service: service.add(ALICE, "My mood is bad.", type="working", session="s1"),
    "tool": lambda service: service.add(ALICE, "My last call is get_weather.", type="trajectory"),
    "document": lambda service: (
        service.documents.put(ALICE, "x.txt", b"The capital of France is Paris."),
        service.list(ALICE, type="document").records[0],
    )[1],
}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[MemoryService]:
    store = MemoryStore(tmp_path, 2**24)
    yield MemoryService(store, MemoryConfig())
    store.close()


def test_what_may_not_stand_in_every_prompt_is_not_taken(service: MemoryService) -> None:
    taken = [service.add(ALICE, f"My job is {type}.", type=type) for type in ("fact", "preference", "profile")]
    for add in LEFT_OUT.values():
        add(service)
    assert len(service.list(ALICE).records) == len(taken) + len(LEFT_OUT)
    selected = distill._select(service, ALICE, [], None)
    assert selected == taken and distill._changed(service, ALICE, selected) is None
    assert distill._select(service, ALICE, [taken[1].id], None) == [taken[1]]


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_naming_it_does_not_change_that(service: MemoryService, kind: str) -> None:
    memory = LEFT_OUT[kind](service)
    with pytest.raises(Conflict, match=f"{memory.id} cannot be distilled"):
        distill._select(service, ALICE, [memory.id], None)
    with pytest.raises(NotFound):
        distill._select(service, BOB, [memory.id], None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda service, memory: service.update(ALICE, memory.id, sensitivity="sensitive"), "cannot be distilled"),
        (lambda service, memory: service.life.set_state(ALICE, memory.id, "archived"), "cannot be distilled"),
        (lambda service, memory: service.update(ALICE, memory.id, text="My job is pilot."), "was changed meanwhile"),
        (lambda service, memory: service.delete(ALICE, memory.id), "was deleted meanwhile"),
    ],
    ids=["keep secret", "archive", "change", "delete"],
)
def test_what_changed_while_it_was_learned_is_not_published(
    service: MemoryService, change: Callable[..., object], words: str
) -> None:
    memory = service.add(ALICE, "My job is baker.")
    change(service, memory)
    assert words in (distill._changed(service, ALICE, [memory]) or "")
