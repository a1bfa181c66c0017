"""Refining with a scripted model: what is kept of an answer, what is refused, and what goes with its notes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.memory import maintenance
from memos_vllm.memory.refining import MAX_STATEMENTS, Batch, Outcome
from memos_vllm.memory.service import MemoryService
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB, Clock, make_service, says, texts

ON = {"enabled": True, "prompt_tokens": 256, "max_tokens": 64}
MOVED = "I moved to Lisbon last week, and I love it."
Model = Callable[[Sequence[dict[str, Any]]], str]


@pytest.fixture
def service(tmp_path: Path, clock: Clock) -> MemoryService:
    return make_service(tmp_path / "memory", clock=clock, refiner=ON)


def told(service: MemoryService, *sentences: str, who: Principal = ALICE, session: str = "s") -> None:
    for number, text in enumerate(sentences):
        service.remember(who, says(text), session=session, request=f"r{number}")


def statement(text: str, *sources: int, **more: Any) -> dict[str, Any]:
    return {"sources": sources or [1], "text": text, "type": "fact", "keys": [], "valid_from": None, **more}


def answer(*statements: dict[str, Any]) -> str:
    return json.dumps({"statements": statements})


def refine(service: MemoryService, reply: str) -> dict[str, int]:
    batch = service.refining.next_batch()
    assert batch is not None
    return {str(each): count for each, count in service.refining.finish(batch, reply, "model@1").items()}


def listed(service: MemoryService, who: Principal = ALICE) -> list[str]:
    return texts(service.list(who).records)


def test_an_accepted_statement_stands_beside_its_note_and_tells_where_it_is_from(service: MemoryService) -> None:
    told(service, MOVED)
    home = statement(
        "My home city is Lisbon.", type="profile", keys=["Lisbon residence", "divorce"], valid_from="2025-12-26"
    )
    assert refine(service, answer(home)) == {"accepted": 1}
    note, made = service.list(ALICE).records
    assert (note.text, made.text, made.type, made.session) == (MOVED, "My home city is Lisbon.", "profile", "s")
    assert made.valid_from is not None and made.valid_from.date().isoformat() == "2025-12-26"
    assert (made.origin["source"], made.origin["model"], made.origin["notes"]) == ("refiner", "model@1", [note.id])
    assert made.origin["messages"] == [{name: note.origin[name] for name in
                                        ("session", "request", "role", "message", "digest")}]  # fmt: skip
    assert [link.target for link in service.life.links(ALICE, made.id, type="derived_from")] == [note.id]
    assert made.id in [hit.record.id for hit in service.search(ALICE, "residence")]
    assert not service.search(ALICE, "divorce")  # of which nobody spoke
    assert service.refining.next_batch() is None


def test_what_is_made_of_remarks_alone_stands_in_no_prompt(service: MemoryService) -> None:
    told(service, "The ferry to Porto leaves at seven.", "My cat is called Tom.")
    made = (
        statement("The Porto ferry leaves at seven."),
        statement("The cat is Tom.", 2),
        statement("Tom, ferry.", 1, 2),
    )
    assert refine(service, answer(*made)) == {"accepted": 3}
    assert [record.type for record in service.list(ALICE).records] == ["remark", "fact", "remark", "fact", "fact"]


def test_the_prompt_has_the_notes_with_their_days(service: MemoryService) -> None:
    told(service, MOVED, "My cat is called Tom.")
    batch = service.refining.next_batch()
    assert batch is not None
    system, user = batch.messages()
    assert system["role"] == "system"
    assert user["content"] == f"1. (2026-01-02) {MOVED}\n2. (2026-01-02) My cat is called Tom.\n"


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("", "invalid"),
        ("I think that you moved.", "invalid"),
        (answer(statement("My home city is Lisbon."))[:-2], "invalid"),
        (json.dumps({"statements": [{"text": "My home city is Lisbon."}]}), "invalid"),
        (answer(statement("My home city is Lisbon.", type="poem")), "invalid"),
        (answer(statement("My home city is Lisbon.", valid_from="soon")), "invalid"),
        (answer(*[statement("My home city is Lisbon.")] * (MAX_STATEMENTS + 1)), "invalid"),
        (answer(statement("My home city is Lisbon.", 2)), "no_source"),
        (answer(statement("My home city is Lisbon.", 1, 2)), "no_source"),
        (answer(statement("My dog likes the beach.")), "ungrounded"),
        (answer(statement("My home city is Porto.", keys=["Lisbon"])), "ungrounded"),
        (answer(statement("I moved to Lisbon in 1999.")), "ungrounded"),
        (answer(statement(MOVED)), "known"),
        (answer(statement("I moved to Lisbon last week and I really love it")), "merged"),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_counted_and_the_note_stays(service: MemoryService, reply: str, outcome: str) -> None:
    told(service, MOVED)
    (note,) = service.list(ALICE).records
    assert refine(service, reply) == {outcome: 1}
    (kept,) = service.list(ALICE).records
    assert (kept.id, kept.text, kept.uses) == (note.id, MOVED, 1), "nor was it said again"
    assert service.refining.next_batch() is None, "the same answer would come again"


def test_good_statements_of_an_answer_are_kept_beside_bad_ones(service: MemoryService) -> None:
    told(service, MOVED, "My cat is called Tom.")
    reply = answer(
        statement("My home city is Lisbon."), statement("My cat is Tom.", 2), statement("My cat is Tom.", 1)
    )  # fmt: skip
    assert refine(service, reply) == {"accepted": 2, "ungrounded": 1}


def test_a_contradiction_supersedes_what_is_older(service: MemoryService, clock: Clock) -> None:
    told(service, "My home city is Turin.")
    assert refine(service, answer()) == {}
    clock.forward(60)
    told(service, MOVED)
    assert refine(service, answer(statement("My home city is Lisbon."))) == {"accepted": 1}
    assert listed(service) == [MOVED, "My home city is Lisbon."]
    (*_, made) = service.list(ALICE).records
    assert texts(service.history(ALICE, made.id)) == ["My home city is Turin.", "My home city is Lisbon."]


def test_it_does_not_supersede_what_the_user_said_since(service: MemoryService, clock: Clock) -> None:
    told(service, MOVED)
    batch = service.refining.next_batch()
    clock.forward(60)
    told(service, "My home city is Porto.")
    assert batch is not None
    outcomes = service.refining.finish(batch, answer(statement("My home city is Lisbon.")), "model@1")
    assert outcomes == {Outcome.OUTDATED: 1}
    assert listed(service) == [MOVED, "My home city is Porto."]


def test_what_was_taken_back_later_is_not_restated(service: MemoryService, clock: Clock) -> None:
    told(service, "I play the guitar and my cat listens.")
    batch = service.refining.next_batch()
    assert batch is not None
    clock.forward(60)
    told(service, "I don't play the guitar anymore.")
    outcomes = service.refining.finish(batch, answer(statement("I play the guitar.")), "model@1")
    assert outcomes == {Outcome.OUTDATED: 1}
    assert "I don't play the guitar anymore." in listed(service)


@pytest.mark.parametrize("change", ["delete", "update", "archive", "supersede"])
def test_a_note_that_changed_meanwhile_is_not_restated(service: MemoryService, clock: Clock, change: str) -> None:
    told(service, "My job is baker.")
    batch = service.refining.next_batch()
    assert batch is not None
    (note,) = batch.notes
    clock.forward(60)
    match change:
        case "delete":
            service.delete(ALICE, note.id)
        case "update":
            service.update(ALICE, note.id, text="My job is pilot.")
        case "archive":
            service.life.set_state(ALICE, note.id, "archived")
        case "supersede":
            told(service, "My job is pilot.")
    before = listed(service)
    assert service.refining.finish(batch, answer(statement("I work as a baker.")), "m") == {Outcome.GONE: 1}
    assert listed(service) == before


def restated(service: MemoryService) -> tuple[str, str]:
    """A note and what was made of it."""
    told(service, "My job is baker.")
    assert refine(service, answer(statement("I earn my money as a baker."))) == {"accepted": 1}
    note, made = service.list(ALICE).records
    return note.id, made.id


def test_what_was_made_of_a_note_is_deleted_with_it(service: MemoryService) -> None:
    note, made = restated(service)
    assert set(service.delete(ALICE, note).records) == {note, made}
    assert listed(service) == []


def test_what_was_made_of_a_note_is_superseded_with_it(service: MemoryService, tmp_path: Path) -> None:
    note, made = restated(service)
    told(service, "My job is pilot.")
    assert listed(service) == ["My job is pilot."]
    assert service.get(ALICE, made).superseded_by == service.get(ALICE, note).superseded_by
    service._store.close()
    assert maintenance.examine(tmp_path / "memory").problems == []


def test_what_was_made_of_a_note_is_archived_when_its_text_changes(service: MemoryService) -> None:
    note, made = restated(service)
    service.update(ALICE, note, text="My job is pilot.")
    assert service.get(ALICE, made).state == "archived"
    recalled = service.recall(ALICE, says("What is my job?"))
    assert texts(recalled.long_lived) == ["My job is pilot."] and not recalled.late


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        (lambda service, note: service.update(ALICE, note, sensitivity="sensitive"), "sensitivity", "sensitive"),
        (lambda service, note: service.life.set_state(ALICE, note, "archived"), "state", "archived"),
        (lambda service, note: service.update(ALICE, note, ttl_s=0.0), "expires_at", None),
    ],
    ids=["sensitive", "archived", "ending"],
)
def test_what_was_made_of_a_note_is_kept_from_prompts_with_it(
    service: MemoryService, change: Callable[[MemoryService, str], Any], name: str, value: Any
) -> None:
    note, made = restated(service)
    service.update(ALICE, note, ttl_s=100.0)
    assert service.get(ALICE, made).expires_at == service.get(ALICE, note).expires_at is not None
    change(service, note)
    assert getattr(service.get(ALICE, made), name) == value


def test_what_a_note_is_already_holds_for_what_was_made_of_it(service: MemoryService) -> None:
    note, made = restated(service)
    service.update(ALICE, note, sensitivity="sensitive")
    version = service.get(ALICE, note).version
    service.update(ALICE, made, sensitivity="normal")
    assert service.update(ALICE, note, sensitivity="sensitive").version == version
    assert service.get(ALICE, made).sensitivity == "sensitive"


def test_a_merge_with_a_new_text_leaves_nothing_that_was_made_of_the_old(service: MemoryService) -> None:
    note, made = restated(service)
    other = service.add(ALICE, "I bake.").id
    service.life.merge(ALICE, note, [other], "My job is pilot.")
    assert service.get(ALICE, made).state == "archived"


def test_what_has_an_end_is_not_restated(service: MemoryService) -> None:
    told(service, "My job is baker.")
    (note,) = service.list(ALICE).records
    service.update(ALICE, note.id, ttl_s=100.0)
    batch = service.refining.next_batch()
    assert batch is not None and (batch.notes, batch.left_out) == ((), (note.id,))
    assert service.refining.finish(batch, "", "m") == {} and service.refining.next_batch() is None


def test_deleting_what_was_made_leaves_the_note(service: MemoryService) -> None:
    _, made = restated(service)
    assert service.delete(ALICE, made).records == (made,)
    assert listed(service) == ["My job is baker."]


def test_users_take_turns_and_batches_keep_to_the_budget(service: MemoryService) -> None:
    for who in (ALICE, BOB):
        told(service, *(f"Ferry number {number} leaves at seven in the morning." for number in range(40)), who=who)
    seen: list[Batch] = []
    while (batch := service.refining.next_batch()) is not None:
        seen.append(batch)
        assert sum(len(each["content"].split()) for each in batch.messages()) <= ON["prompt_tokens"] + len(batch.notes)
        service.refining.finish(batch, answer(), "m")
    assert [batch.who for batch in seen[:4]] == [ALICE, BOB, ALICE, BOB]
    assert [note.text for batch in seen if batch.who == BOB for note in batch.notes] == listed(service, BOB)


def test_a_note_larger_than_the_budget_is_counted_and_passed_over(service: MemoryService) -> None:
    told(service, "I like " + "tea and " * 240 + "coffee.", "My cat is called Tom.")
    batch = service.refining.next_batch()
    assert batch is not None and texts(batch.notes) == ["My cat is called Tom."]
    assert service.refining.finish(batch, answer(), "m") == {Outcome.TOO_LONG: 1}
    assert service.refining.next_batch() is None and len(listed(service)) == 2


def test_what_waits_outlives_the_process(tmp_path: Path, clock: Clock) -> None:
    first = make_service(tmp_path / "memory", clock=clock, refiner=ON)
    told(first, MOVED)
    first._store.close()
    again = make_service(tmp_path / "memory", clock=clock, refiner=ON)
    batch = again.refining.next_batch()
    assert batch is not None and (batch.who, texts(batch.notes)) == (ALICE, [MOVED])


@pytest.mark.parametrize("text", ["x" * 3000, "```\nprint(1)\n```"], ids=["long", "code"])
def test_documents_and_api_memories_do_not_wait(service: MemoryService, text: str) -> None:
    told(service, text)
    service.add(ALICE, "My job is baker.")
    assert len(listed(service)) == 2 and service.refining.next_batch() is None


def test_a_repetition_does_not_wait_again(service: MemoryService) -> None:
    told(service, MOVED)
    refine(service, answer())
    told(service, MOVED)
    assert service.refining.next_batch() is None


def test_nothing_waits_while_it_is_off(tmp_path: Path) -> None:
    service = make_service(tmp_path / "memory")
    told(service, MOVED)
    assert service.refining.next_batch() is None


def test_a_date_of_the_models_own_grounds_no_number_and_is_not_kept(service: MemoryService) -> None:
    told(service, MOVED)
    assert refine(service, answer(statement("I moved to Lisbon on 7 March 2019.", valid_from="2019-03-07"))) == {
        "ungrounded": 1
    }
    told(service, "I moved to Lyon for the bakery.")
    assert refine(service, answer(statement("My city is Lyon.", valid_from="2019-03-07"))) == {"accepted": 1}
    made = service.list(ALICE).records[-1]
    assert (made.text, made.valid_from) == ("My city is Lyon.", made.created_at)
