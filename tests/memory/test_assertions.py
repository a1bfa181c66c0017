"""What is denied later ends what was asserted, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory import maintenance
from memos_vllm.memory.assertions import NO, YES, assertion_of
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, says, texts


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("I'm vegetarian.", "I'm not vegetarian anymore."),
        ("I'm a vegetarian.", "I’m no longer vegetarian."),
        ("I am vegetarian", "I stopped being vegetarian."),
        ("I'm vegetarian.", "I eat meat again."),
        ("I eat meat again.", "I'm vegetarian again."),
        ("I'm vegan.", "Actually, I eat meat again now."),
        ("I'm not married.", "I'm married now."),
        ("I don't smoke anymore.", "I smoke."),
        ("I have two cats.", "I have three cats."),
        ("I have two cats.", "I now have 3 cats."),
        ("I have two cats.", "I don't have cats any more."),
        ("I have a cat.", "I have no cats anymore."),
        ("I've got two cats.", "I don't have any cats."),
        ("I don't have cats.", "I have a cat."),
        ("I have two children.", "I have three children."),
        ("I own a car.", "I don't own a car anymore."),
        ("I play the guitar.", "I don't play the guitar anymore."),
        ("I play the guitar", "I no longer play guitar."),
        ("I play guitar.", "I gave up playing the guitar."),
        ("I'm learning Greek.", "I stopped learning Greek."),
        ("I smoke.", "I quit smoking."),
        ("I quit smoking.", "I smoke again."),
        ("I like coffee.", "I don't like coffee anymore."),
        ("I work at Siemens.", "I quit my job at Siemens."),
        ("I work for the BBC.", "I left the BBC."),
        ("I work at Siemens.", "I don't work at Siemens anymore."),
        ("I work at Siemens.", "I was laid off from Siemens last week."),
        ("I work at Siemens.", "I lost my job."),
        ("I quit my job at Siemens.", "I work at Siemens again."),
        ("I moved to Berlin.", "I don't live in Berlin anymore."),
        ("I work as a nurse.", "I no longer work as a nurse."),
    ],
)
def test_a_later_denial_ends_what_was_said(service: MemoryService, before: str, after: str) -> None:
    for text in (before, after):
        service.remember(ALICE, says(text))
    assert texts(service.list(ALICE).records) == [after]
    (old, new) = service.list(ALICE, include_superseded=True).records
    assert (old.superseded_by, new.supersedes) == (new.id, old.id) and old.valid_to is not None
    assert texts(service.history(ALICE, new.id)) == [before, after]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("I'm vegetarian.", "My brother is not vegetarian anymore."),
        ("I'm vegetarian.", "I'm not vegan."),
        ("I'm vegetarian.", "I was not vegetarian."),
        ("I'm vegetarian.", "I'm not vegetarian when I travel."),
        ("I'm vegetarian.", "I might not be vegetarian for long."),
        ("I'm vegetarian.", "I like fish."),
        ("I have two cats.", "I have two dogs."),
        ("I have two cats.", "I have a cat."),
        ("I have two cats.", "I have cats."),
        ("I have two cats.", "I have three cats and a dog."),
        ("I have two cats.", "My sister has three cats."),
        ("I have a black cat.", "I have a white cat."),
        ("I play the guitar.", "I don't play the piano."),
        ("I play the guitar.", "I don't play the guitar on Sundays."),
        ("I play the guitar.", "I don't always play the guitar."),
        ("I play the guitar.", "If I don't play the guitar, I am sad."),
        ("I work at Siemens.", "I quit my job at Bosch."),
        ("I work at Siemens.", "I want to quit my job at Siemens."),
        ("I work at Siemens.", "I lost my keys."),
        ("I like tea.", "I don't like it."),
        ("I like tea.", "I don't like tea."),
        ("I'm vegetarian.", "I eat meat."),
        ("I live in Paris.", "I don't live in Berlin."),
    ],
)
def test_another_thing_or_a_sentence_that_says_more_ends_nothing(
    service: MemoryService, before: str, after: str
) -> None:
    for text in (before, after):
        service.remember(ALICE, says(text))
    assert before in texts(service.list(ALICE).records)


def test_a_question_ends_nothing(service: MemoryService) -> None:
    for text in ("I'm vegetarian.", "I'm not vegetarian anymore?", "Am I vegetarian?"):
        service.remember(ALICE, says(text))
    assert texts(service.list(ALICE).records) == ["I'm vegetarian."]


@pytest.mark.parametrize("text", ["I eat meat again.", "I smoke again.", "I'm vegetarian again."])
def test_what_one_does_again_stands_in_every_prompt(service: MemoryService, text: str) -> None:
    service.remember(ALICE, says(text))
    assert texts(service.recall(ALICE, says("xyzzy")).long_lived) == [text]


VERBS = {
    "play": "playing",
    "smoke": "smoking",
    "run": "running",
    "use": "using",
    "study": "studying",
    "sell": "selling",
}


@given(st.sampled_from(sorted(VERBS)), st.sampled_from(["", " the guitar", " at night", " my bike"]))
def test_a_gerund_denies_its_verb(verb: str, rest: str) -> None:
    said, denied = assertion_of(f"I {verb}{rest}."), assertion_of(f"I stopped {VERBS[verb]}{rest}.")
    assert said is not None and denied is not None
    assert (said.predicate, said.value, denied.value) == (denied.predicate, YES, NO)


def test_schema_5_finds_what_became_an_assertion(make: Callable[..., MemoryService]) -> None:
    service = make()
    for text in ("I play the guitar.", "Always answer in German."):
        service.remember(ALICE, says(text))

    def back_to_5(txn: Any, dbs: Any) -> None:
        for key in list(txn.cursor(db=dbs["current"]).iternext(values=False)):
            if key[8:9] in (b"p", b"s"):
                txn.delete(key, db=dbs["current"])
        txn.put(b"schema_version", b"5", db=dbs["meta"])

    service._store.maintain(back_to_5)
    service._store.close()
    renewed = make()
    assert maintenance.examine_open(renewed._store).problems == []
    for text in ("I don't play the guitar anymore.", "Always answer in English."):
        renewed.remember(ALICE, says(text))
    assert texts(renewed.list(ALICE).records) == ["I don't play the guitar anymore.", "Always answer in English."]
