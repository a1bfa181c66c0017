"""Repetitions and contradictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory.claims import Claim, claim_of, fold, keys_of
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, make_service, says, texts


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("My favourite drink is oolong tea.", Claim("my favourite drink", "oolong tea")),
        ("my favorite drink is now green tea!", Claim("my favourite drink", "green tea")),
        ("My favourite drink is green tea now.", Claim("my favourite drink", "green tea")),
        ("Alice's home city is Oslo.", Claim("alice's home city", "oslo")),
        ("Alice’s new address is 5 Main Street", Claim("alice's address", "5 main street")),
        ("My mother's name is Eve.", Claim("my mother's name", "eve")),
        ("My phone number is 555 12 34.", Claim("my phone number", "555 12 34")),
        ("My email address is a.b@example.com", Claim("my email", "a.b@example.com")),
        ("My date of birth is 3 May 1990.", Claim("my date of birth", "3 may 1990")),
        *(
            (text, Claim("my residence", "berlin"))
            for text in (
                "I live in Berlin.",
                "i live in berlin",
                "I now live in Berlin",
                "I live in Berlin now.",
                "I'm living in Berlin",
                "I moved to Berlin.",
                "I've just moved to Berlin!",
                "I am based in Berlin",
                "Now I live in Berlin.",
                "No, I live in Berlin.",
                "No I live in Berlin",
                "Actually, I live in Berlin.",
                "Sorry, I live in Berlin, not Paris.",
                "Wait... in fact, I live in Berlin.",
                "I live in Berlin again.",
            )
        ),
        ("I live in Berlin, Germany.", Claim("my residence", "berlin, germany")),
        ("I live in the Netherlands", Claim("my residence", "the netherlands")),
        ("I live in St. Louis.", Claim("my residence", "st. louis")),
        ("I live in 東京", Claim("my residence", "東京")),
        *(
            (text, Claim("my age", "31"))
            for text in (
                "I'm 31 years old.",
                "I am 31.",
                "I’m now 31 years old",
                "I just turned 31!",
                "My age is 31.",
                "I turned 31 today.",
            )
        ),
        ("I am thirty-one years old.", Claim("my age", "thirty-one")),
        ("Actually, my favourite drink is coffee.", Claim("my favourite drink", "coffee")),
        ("My favourite drink is coffee, actually.", Claim("my favourite drink", "coffee")),
        *(
            (text, Claim("my name", "eve"))
            for text in (
                "No, my name is Eve.",
                "Sorry, my name is Eve",
                "Correction: my name is Eve",
                "I'm called Eve.",
                "My name's Eve",
                "My name is Eve, not Ann.",
            )
        ),
        ("Call me Liz.", Claim("my nickname", "liz")),
        ("You can call me Liz from now on.", Claim("my nickname", "liz")),
        ("I work as a nurse.", Claim("my job", "nurse")),
        ("I'm now working as an art teacher", Claim("my job", "art teacher")),
        ("I work at Siemens now.", Claim("my employer", "siemens")),
        ("I work for the BBC.", Claim("my employer", "the bbc")),
        ("Ann lives in Berlin.", Claim("ann's residence", "berlin")),
        ("Ann Smith moved to Berlin", Claim("ann smith's residence", "berlin")),
        ("My sister's name is Eve.", Claim("my sister's name", "eve")),
        ("My mother is 61 years old.", Claim("my mother's age", "61")),
        ("Tom works as a baker.", Claim("tom's job", "baker")),
    ],
)
def test_reads_a_claim(text: str, claim: Claim) -> None:
    assert claim_of(text) == claim


@pytest.mark.parametrize(
    "text",
    [
        "My cat is black.",
        "My brother is a doctor.",
        "My favourite drink was oolong tea.",
        "My favourite drink is oolong tea and my cat is Tom.",
        "My favourite drink is oolong tea, usually.",
        "My favourite drink is not oolong tea.",
        "I think my name is Ann.",
        "My favourite drink is oolong tea. I like it.",
        "x" * 10_000,
        "",
        *("I lived in Paris.", "I used to live in Paris.", "I don't live in Paris.", "I never lived in Paris"),
        *("I live in Paris and work in Lyon.", "I live in Paris with my cat.", "I live in Paris during the week."),
        *("I live in Paris most of the time.", "I live in Paris at the moment.", "I live in Turin, near the river."),
        *(
            "I might move to Berlin.",
            "I will move to Berlin.",
            "I want to live in Berlin.",
            "I'd love to live in Berlin",
        ),
        *("If I live in Berlin", "Do I live in Berlin?", "I live in Berlin?", "I think I live in Berlin."),
        *(
            "I live in fear.",
            "I live in a small flat.",
            "i live in a flat",
            "I've moved to Linux.",
            "I moved to the sales team.",
        ),
        *("I moved to Berlin in 2019.", "When I was ten I moved to Berlin.", '"I live in Berlin."'),
        *(
            "He lives in Berlin.",
            "She moved to Berlin",
            "The cat lives in Berlin.",
            "Nobody lives in Berlin.",
            "It is 31 years old.",
        ),
        *("My son is 5 years old.", "My brother lives in Berlin.", "My cat moved to Berlin."),
        *("I'm 31 minutes late.", "I was 30 years old.", "I'm almost 31.", "I'm 5", "I feel 31 years old."),
        *("I am from Peru.", "I'm Ann.", "I'm tired.", "I'm called to court."),
        *("Call me back.", "Call me tomorrow.", "call me crazy", "Call me a taxi.", "Call me when you are there."),
        *(
            "I work as a nurse at night.",
            "I work at night.",
            "I work at home.",
            "I also work at Siemens.",
            "I worked at Siemens.",
        ),
        *("No one lives in Berlin.", "Actually.", "No, sorry."),
    ],
)
def test_what_says_more_or_less_is_no_claim(text: str) -> None:
    assert claim_of(text) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [("I like TEA.", " i  like\ttea. "), ("ｆｕｌｌ", "full"), ("Straße", "STRASSE"), ("é", "e\u0301")],
)
def test_folding_ignores_form_case_and_spaces(one: str, other: str) -> None:
    assert fold(one) == fold(other)
    assert keys_of(one) == keys_of(other)


ONE_VALUE = [
    ("I live in {}.", ["Paris", "Berlin", "New York", "the Hague"]),
    ("I moved to {}!", ["Paris", "Berlin"]),
    ("I'm {} years old", ["30", "31"]),
    ("My name is {}.", ["Ann", "Eve"]),
    ("Call me {}.", ["Liz", "Beth"]),
    ("I work as a {}.", ["nurse", "baker"]),
    ("I work at {}", ["Siemens", "the BBC"]),
    ("Ann lives in {}.", ["Oslo", "Rome"]),
    ("My favourite drink is {}.", ["tea", "coffee"]),
]
CORRECTIONS = [
    "",
    "Actually, ",
    "No, ",
    "Sorry, ",
    "Correction: ",
    "Wait, ",
    "In fact, ",
    "No, sorry, ",
    "Oh, wait... ",
]
OTHER_WORDS = ["I think ", "Ann says ", "Maybe ", "If ", "Once ", "I dreamt that "]


@given(st.data(), st.sampled_from(ONE_VALUE))
def test_a_correction_is_of_the_same_subject_and_other_words_in_front_make_no_claim(
    data: st.DataObject, form: Any
) -> None:
    sentence, values = form
    one, other = (data.draw(st.sampled_from(values)) for _ in range(2))
    first, second = (
        claim_of(data.draw(st.sampled_from(CORRECTIONS)) + sentence.format(value)) for value in (one, other)
    )
    assert first is not None and second is not None
    assert first.subject == second.subject
    assert (first.value == second.value) == (one == other)
    assert claim_of(data.draw(st.sampled_from(OTHER_WORDS)) + sentence.format(one)) is None
    assert (
        claim_of(sentence.format(one).rstrip(".!") + data.draw(st.sampled_from(["?", " and Lyon.", ", I think"])))
        is None
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("I live in Paris.", "I live in Berlin."),
        ("I live in Paris.", "I moved to Berlin."),
        ("I'm 30 years old.", "I just turned 31."),
        ("My favourite drink is tea.", "Actually, my favourite drink is coffee."),
        ("My name is Ann.", "No, my name is Eve."),
        ("I'm called Ann.", "Sorry, my name is Eve."),
        ("Call me Liz.", "Call me Beth."),
        ("My job is baker.", "I work as a nurse."),
        ("Ann lives in Paris.", "Ann moved to Berlin."),
    ],
)
def test_what_is_said_later_ends_what_was_said_before(tmp_path: Path, before: str, after: str) -> None:
    service = make_service(tmp_path / "memory")
    for text in (before, after):
        service.remember(ALICE, says(text))
    assert texts(service.list(ALICE).records) == [after]
    assert texts(service.recall(ALICE, says("xyzzy")).long_lived) == [after]
    (old, new) = service.list(ALICE, include_superseded=True).records
    assert (old.superseded_by, new.supersedes) == (new.id, old.id)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("I live in Paris.", "I lived in Berlin."),
        ("I live in Paris.", "I might move to Berlin."),
        ("I live in Paris.", "I live in Berlin and work in Lyon."),
        ("I live in Paris.", "My brother lives in Berlin."),
        ("My name is Elizabeth.", "Call me Liz."),
        ("I am from Lima.", "I am from Peru."),
        ("My son is 5 years old.", "My son is 8 years old."),
    ],
)
def test_what_may_both_be_true_ends_nothing(tmp_path: Path, before: str, after: str) -> None:
    service = make_service(tmp_path / "memory")
    for text in (before, after):
        service.remember(ALICE, says(text))
    assert texts(service.list(ALICE).records) == [before, after]


def test_a_colour_is_the_same_in_american_spelling(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    for text in ("My favourite colour is red.", "My favorite color is blue.", "My favourite colour is blue"):
        service.remember(ALICE, says(text))
    assert texts(service.list(ALICE).records) == ["My favorite color is blue."]
    (green,) = service.remember(ALICE, says("My favourite colour is green."))
    assert texts(service.history(ALICE, green.id)) == [
        "My favourite colour is red.",
        "My favorite color is blue.",
        "My favourite colour is green.",
    ]


@pytest.mark.parametrize("lead_in", ["As I said, ", "FYI ", "By the way, ", "Btw ", "Just so you know, "])
def test_a_statement_behind_a_lead_in_ends_the_same_as_without(service: MemoryService, lead_in: str) -> None:
    (paris,) = service.remember(ALICE, says("I live in Paris."))
    (oslo,) = service.remember(ALICE, says(f"{lead_in}I live in Oslo."))
    assert oslo.supersedes == paris.id and texts(service.list(ALICE).records) == ["I live in Oslo."]
    assert service.remember(ALICE, says("I live in Oslo."))[0].id == oslo.id
