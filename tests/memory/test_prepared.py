"""Long-lived memory chosen ahead is used as long as nothing changed, and not a moment longer."""

from __future__ import annotations

from typing import Any

import pytest

from memos_vllm.memory import service as service_module
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, BOB

QUESTION = [{"role": "user", "content": "What do I drink?"}]


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Users for whom long-lived memory was chosen."""
    made: list[str] = []
    original = service_module.long_lived

    def long_lived(user: Any, *args: Any) -> Any:
        made.append(user.who.user)
        return original(user, *args)

    monkeypatch.setattr(service_module, "long_lived", long_lived)
    return made


def texts(service: MemoryService, session: str | None = None) -> list[str]:
    return [record.text for record in service.recall(ALICE, QUESTION, session=session).long_lived]


@pytest.mark.parametrize("session", [None, "new"])
def test_the_first_recall_of_a_session_finds_its_choice_made(
    service: MemoryService, choices: list[str], session: str | None
) -> None:
    service.add(ALICE, "Drinks tea.")
    prepared = service.prepare(ALICE)
    assert [record.text for record in prepared.long_lived] == ["Drinks tea."] and choices == ["alice"]
    assert texts(service, session) == ["Drinks tea."]
    assert choices == ["alice"], "nothing is chosen again"


def test_any_change_makes_it_void(service: MemoryService, choices: list[str]) -> None:
    record = service.add(ALICE, "Drinks tea.")
    service.prepare(ALICE)
    service.update(ALICE, record.id, text="Drinks coffee.")
    assert texts(service) == ["Drinks coffee."]
    service.prepare(ALICE)
    service.delete(ALICE, record.id)
    assert texts(service) == []
    service.prepare(ALICE)
    service.remember(ALICE, [{"role": "user", "content": "My job is baker."}])
    assert texts(service) == ["My job is baker."]


def test_the_version_tells_of_a_change_of_this_user_only(service: MemoryService) -> None:
    service.add(ALICE, "Drinks tea.")
    prepared = service.prepare(ALICE)
    version, stamp = service.memory_version(ALICE), service.stamp()
    assert version == (prepared.seq, prepared.kv_epoch)
    service.add(BOB, "Drinks coffee.")
    assert service.memory_version(ALICE) == version and service.stamp() != stamp
    service.delete_all(ALICE)
    assert service.memory_version(ALICE) != version
