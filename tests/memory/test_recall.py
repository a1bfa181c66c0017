"""What goes into the prompt: long-lived memory with a stable prefix, frozen sessions, late memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm.errors import StoreFull
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, BOB, Clock, make_service, says, texts

Make = Callable[..., MemoryService]


def long_lived(service: MemoryService, session: str | None = None) -> list[str]:
    return texts(service.recall(ALICE, says("xyzzy"), session=session).long_lived)


def late(service: MemoryService, query: object) -> list[str]:
    return texts(service.recall(ALICE, says(query)).late)


def test_pinned_first_then_statements_in_order(service: MemoryService) -> None:
    service.add(ALICE, "fact 1")
    service.add(ALICE, "a document", type="document")
    service.add(ALICE, "pinned document", type="document", pinned=True)
    service.add(ALICE, "preference 2", type="preference")
    service.add(ALICE, "pinned fact", pinned=True)
    service.add(ALICE, "working", type="working", session="s")
    assert long_lived(service) == ["pinned document", "pinned fact", "fact 1", "preference 2"]


def test_what_does_not_fit_is_gone_around(make: Make) -> None:
    service = make(long_lived_tokens=8)
    for text in ("one two three", "one two three four five six", "one"):
        service.add(ALICE, text)
    assert long_lived(service) == ["one two three four five six", "one"]
    service.add(ALICE, "p1 p2 p3 p4", pinned=True)
    service.add(ALICE, "q1 q2 q3 q4 q5", pinned=True)
    service.add(ALICE, "r1", pinned=True)
    assert long_lived(service) == ["p1 p2 p3 p4", "r1", "one"]


def statements(service: MemoryService, numbers: Iterable[int], type: str = "fact") -> list[str]:
    """Of three words each, so that a budget of 100 has room for 33."""
    return [service.add(ALICE, f"{type} number {number}", type=type).text for number in numbers]


def test_of_too_many_the_newest_stand_and_the_room_is_used(make: Make) -> None:
    service = make(long_lived_tokens=100)
    told = statements(service, range(60))
    standing = long_lived(service)
    assert standing == told[-len(standing) :] and 25 <= len(standing) <= 33


def test_who_somebody_is_has_the_room_before_facts(make: Make) -> None:
    service = make(long_lived_tokens=100)
    profile = statements(service, range(10), "profile")
    facts = statements(service, range(60))
    preferences = statements(service, range(10), "preference")
    standing = long_lived(service)
    kept = [text for text in standing if text in facts]
    assert kept == facts[-len(kept) :] and 10 <= len(kept) <= 13
    assert standing == [*profile, *kept, *preferences], "in order of creation"
    later = statements(service, range(10, 60), "profile")
    assert later[-25:] == long_lived(service)[-25:]


def test_a_full_prefix_changes_once_in_many_statements(make: Make) -> None:
    service = make(long_lived_tokens=100)
    statements(service, range(40))
    before, changes = long_lived(service), 0
    for number in range(40, 140):
        (new,) = statements(service, [number])
        after = long_lived(service)
        assert after[-1] == new
        changes += after[: len(before)] != before
        before = after
    assert 3 <= changes <= 50, "by age alone it would change 100 times"


def test_a_large_one_that_does_not_fit_does_not_end_the_run(make: Make) -> None:
    service = make(long_lived_tokens=100)
    old = statements(service, range(4))
    service.add(ALICE, " ".join(["long"] * 60))
    new = statements(service, range(4, 20))
    assert long_lived(service) == old + new


def test_what_was_left_out_is_counted(make: Make) -> None:
    service = make(long_lived_tokens=100)
    statements(service, range(60))
    service.add(ALICE, "a document", type="document")
    service.add(ALICE, "my secret", sensitivity="sensitive")
    service.life.set_state(ALICE, service.add(ALICE, "long ago").id, "archived")
    service.add(ALICE, "pinned " * 101, pinned=True)
    recall = service.recall(ALICE, says("xyzzy"), session="s", count_left_out=True)
    assert recall.left_out == 61 - len(recall.long_lived)
    statements(service, [60])
    again = service.recall(ALICE, says("xyzzy"), session="s", count_left_out=True)
    assert again.left_out == recall.left_out + 1, "it stands from the next session on"
    assert service.recall(ALICE, says("xyzzy"), session="s").left_out is None


LETTERS = st.sets(st.sampled_from("abcdef"), min_size=1)


@settings(max_examples=15)
@given(st.lists(LETTERS, min_size=1, max_size=14), st.integers(0, 20), st.integers(1, 8), LETTERS)
def test_what_stands_changes_no_rank(memories: list[set[str]], num_tokens: int, top_k: int, asked: set[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        service = make_service(Path(directory), long_lived_tokens=num_tokens, late_tokens=1000)
        for letters in memories:
            service.add(ALICE, " ".join(f"word{letter}" for letter in sorted(letters)))
        query = " ".join(f"word{letter}" for letter in sorted(asked))
        recall = service.recall(ALICE, says(query), top_k=top_k)
        ranked = [hit.record.id for hit in service.search(ALICE, query, top_k=1000)]
        stand = {record.id for record in recall.long_lived}
        assert [hit.record.id for hit in recall.late] == [each for each in ranked if each not in stand][:top_k]
        assert list(recall.answering) == [each for each in ranked[:top_k] if each in stand]
        service._store.close()


def test_to_stand_there_is_no_use_and_to_answer_is(make: Make, clock: Clock) -> None:
    service = make()
    tea, cat = (service.add(ALICE, text) for text in ("I drink green tea.", "I have a black cat."))
    for _ in range(12):
        clock.forward(20 * 86400.0)
        recall = service.recall(ALICE, says("Which tea do I drink?"))
        ids = [record.id for record in recall.long_lived]
        service.life.used(ALICE, {"long_lived": ids}, standing=set(ids).difference(recall.answering), scene="x")
        service.life.tend()
    assert (service.get(ALICE, tea.id).state, service.get(ALICE, cat.id).state) == ("activated", "archived")
    (stood, archived) = service.life.events(ALICE, cat.id)
    assert (stood.kind, stood.detail) == ("recalled", {"where": "long_lived", "scene": "x"})
    assert archived.kind == "archived"


@pytest.mark.parametrize("pinned", [True, False])
def test_one_that_exceeds_the_whole_budget_blocks_nothing(make: Make, pinned: bool) -> None:
    service = make(long_lived_tokens=5)
    service.add(ALICE, "far too long for this budget", pinned=pinned)
    service.add(ALICE, "small pinned", pinned=True)
    service.add(ALICE, "small fact")
    assert long_lived(service) == ["small pinned", "small fact"]


def test_no_budget_no_memory(make: Make) -> None:
    service = make(long_lived_tokens=0, late_tokens=0)
    service.add(ALICE, "tea")
    assert service.recall(ALICE, says("tea")).late == ()
    assert long_lived(service) == []


MEMORY = st.tuples(st.integers(1, 12), st.booleans(), st.sampled_from(["fact", "profile", "document"]))


@settings(max_examples=15)
@given(st.lists(MEMORY, max_size=12))
def test_a_new_memory_keeps_the_prefix_while_all_fit(memories: list[tuple[int, bool, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        service = make_service(Path(directory), long_lived_tokens=10)
        total = 0
        before: list[str] = []
        for number, (num_words, pinned, kind) in enumerate(memories):
            service.add(ALICE, " ".join([str(number)] * num_words), pinned=pinned, type=kind)
            after = long_lived(service)
            total += num_words if num_words <= 10 and (pinned or kind != "document") else 0
            if not pinned and total <= 10:
                assert after[: len(before)] == before
            assert sum(len(text.split()) for text in after) <= 10
            before = after
        service._store.close()


def test_a_session_freezes_the_choice(service: MemoryService) -> None:
    service.add(ALICE, "first")
    assert long_lived(service, "s") == ["first"]
    service.add(ALICE, "second")
    service.add(ALICE, "pinned", pinned=True)
    assert long_lived(service, "s") == ["first"]
    assert long_lived(service, "other") == ["pinned", "first", "second"]
    assert long_lived(service) == ["pinned", "first", "second"]


def test_an_empty_choice_is_frozen_too(service: MemoryService) -> None:
    assert long_lived(service, "s") == []
    service.add(ALICE, "first")
    assert long_lived(service, "s") == []


def test_a_frozen_session_shows_current_texts_and_nothing_deleted(service: MemoryService) -> None:
    first, second = service.add(ALICE, "first"), service.add(ALICE, "second")
    service.remember(ALICE, says("My favourite drink is tea."))
    assert len(long_lived(service, "s")) == 3
    service.update(ALICE, first.id, text="changed")
    assert service.delete(ALICE, second.id).sessions == 1
    service.remember(ALICE, says("My favourite drink is milk."))
    assert long_lived(service, "s") == ["changed", "My favourite drink is milk."]


def test_what_came_after_the_freeze_is_recalled_late(service: MemoryService) -> None:
    long_lived(service, "s")
    service.add(ALICE, "green tea")
    recall = service.recall(ALICE, says("tea"), session="s")
    assert (texts(recall.long_lived), texts(recall.late)) == ([], ["green tea"])


def test_a_correction_takes_its_place_in_every_session(service: MemoryService) -> None:
    told = [service.remember(ALICE, says(text))[0] for text in ("I live in Berlin.", "I like tea.", "I am 30.")]
    for session in ("s", "t"):
        service.recall(ALICE, says("hello"), session=session)
    for text in ("I like chess.", "I moved to Oslo.", "I turned 31.", "I moved to Rome."):
        service.remember(ALICE, says(text), session="s")
    corrected = ["I moved to Rome.", "I like tea.", "I turned 31."]
    for session in ("s", "t"):
        assert texts(service.recall(ALICE, says("hello"), session=session).long_lived) == corrected
    service.life.merge(ALICE, told[1].id, [service.list(ALICE).records[-1].id], text="I like tea and Rome.")
    assert texts(service.recall(ALICE, says("hello"), session="t").long_lived) == [
        "I like tea and Rome.",
        "I turned 31.",
    ]
    (rome,) = service.remember(ALICE, says("I moved to Rome."))
    service.remember(ALICE, says("I moved to Turin."))
    service.delete(ALICE, rome.id)
    assert "Turin" not in str(texts(service.recall(ALICE, says("hello"), session="t").long_lived))


def test_a_correction_that_stands_in_no_prompt_takes_no_place(service: MemoryService) -> None:
    service.remember(ALICE, says("My job is baker."))
    service.recall(ALICE, says("hello"), session="s")
    (cook,) = service.remember(ALICE, says("My job is cook."))
    service.update(ALICE, cook.id, sensitivity="sensitive")
    assert service.recall(ALICE, says("hello"), session="s").long_lived == ()


def test_a_session_outlives_the_process(make: Make) -> None:
    service = make()
    service.add(ALICE, "first")
    long_lived(service, "s")
    service._store.close()
    service = make()
    service.add(ALICE, "second")
    assert long_lived(service, "s") == ["first"]


def test_sessions_of_two_users_are_apart(service: MemoryService) -> None:
    service.add(ALICE, "first")
    long_lived(service, "s")
    assert service.recall(BOB, says("first"), session="s").long_lived == ()


def test_an_idle_session_ends_and_a_used_one_does_not(make: Make, clock: Clock) -> None:
    service = make(session_ttl_s=100)
    service.add(ALICE, "first")
    long_lived(service, "s")
    service.add(ALICE, "second")
    for _ in range(20):
        clock.forward(99)
        assert long_lived(service, "s") == ["first"]
    clock.forward(111)
    assert long_lived(service, "s") == ["first", "second"]


def test_sessions_that_are_over_are_taken_out(make: Make, clock: Clock) -> None:
    service = make(session_ttl_s=100)
    for name in ("a", "b", "c"):
        long_lived(service, name)
    assert service.stats()["sessions"] == 3
    clock.forward(200)
    long_lived(service, "d")
    assert service.stats()["sessions"] == 1


def test_a_turn_writes_nothing_once_the_session_is_frozen(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_lived(service, "s")
    monkeypatch.setattr(service._store, "write", None)
    long_lived(service, "s")


def test_a_full_store_does_not_stop_a_recall(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    service.add(ALICE, "first")

    def full(*_: object, **__: object) -> None:
        raise StoreFull("full")

    monkeypatch.setattr(service._store, "write", full)
    assert long_lived(service, "s") == ["first"]


def test_late_is_what_the_query_finds_beside_long_lived(make: Make) -> None:
    service = make(long_lived_tokens=3)
    for text in ("tea is from China", "the tea ceremony of Japan", "cats like me too", "I like tea"):
        service.add(ALICE, text)
    assert long_lived(service) == ["I like tea"]
    assert late(service, "tea ceremony?") == ["the tea ceremony of Japan", "tea is from China"]
    assert late(service, "quantum?") == []


def test_late_keeps_to_its_budget_and_top_k(make: Make) -> None:
    service = make(long_lived_tokens=0, late_tokens=5, top_k=3)
    for text in ("tea tea tea tea tea tea", "tea and milk", "tea with lemon", "tea"):
        service.add(ALICE, text)
    recalled = late(service, "tea")
    assert sum(len(text.split()) for text in recalled) <= 5
    assert "tea" in recalled and "tea tea tea tea tea tea" not in recalled
    assert len(service.recall(ALICE, says("tea"), top_k=1).late) <= 1


@pytest.mark.parametrize(
    "content",
    [
        "tea?",
        [{"type": "text", "text": "tea?"}],
        [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "tea"}],
    ],
)
def test_the_query_is_the_last_user_message(make: Make, content: object) -> None:
    service = make(long_lived_tokens=0)
    service.add(ALICE, "green tea")
    service.add(ALICE, "black coffee")
    conversation = [
        *says("coffee"),
        {"role": "assistant", "content": "x"},
        *says(content),
        {"role": "tool", "content": "y"},
    ]
    assert texts(service.recall(ALICE, conversation).late) == ["green tea"]


@pytest.mark.parametrize("messages", [[], says(None), says([]), [{"role": "system", "content": "tea"}], [{}]])
def test_no_user_message_no_late_memory(make: Make, messages: list[dict[str, object]]) -> None:
    service = make(long_lived_tokens=0)
    service.add(ALICE, "green tea")
    assert service.recall(ALICE, messages).late == ()


def test_a_pinned_note_of_a_session_stands_in_that_session_alone(service: MemoryService) -> None:
    service.add(ALICE, "The user is in a hurry.", type="working", session="s1", pinned=True)
    for session in ("s2", None):
        recalled = service.recall(ALICE, says("hello"), session=session)
        assert texts(recalled.long_lived) == texts(recalled.late) == []
    assert texts(service.recall(ALICE, says("hello"), session="s1").late) == ["The user is in a hurry."]


def test_a_session_keeps_to_the_budget_when_a_text_grows(make: Callable[..., MemoryService]) -> None:
    service = make(long_lived_tokens=20)
    first, second, third = (service.add(ALICE, text) for text in ("My cat is black.", "I like tea.", "I like jam."))
    assert len(service.recall(ALICE, says("hi"), session="s").long_lived) == 3
    service.update(ALICE, second.id, text="I like tea " + "very " * 14 + "much.")
    assert texts(service.recall(ALICE, says("hi"), session="s").long_lived) == ["My cat is black.", "I like jam."]
    service.update(ALICE, second.id, text="I like tea " + "very " * 100 + "much.")  # never stands there
    recalled = service.recall(ALICE, says("hi"), session="s").long_lived
    assert [record.id for record in recalled] == [first.id, third.id]


def test_a_recall_changes_no_memory_that_is_in_use_already(service: MemoryService, clock: Clock) -> None:
    added = service.add(ALICE, "My cat is black.")
    service.life.used(ALICE, {"long_lived": [added.id]}, session="s", scene="x")
    version, record = service.memory_version(ALICE), service.get(ALICE, added.id)
    clock.forward(60)
    service.life.used(ALICE, {"long_lived": [added.id]}, session="s", scene="x")
    assert (service.memory_version(ALICE), service.get(ALICE, added.id)) == (version, record)
    assert service.life.events(ALICE, added.id)[-1].times == 2
