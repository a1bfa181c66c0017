"""Repetitions and contradictions."""

from __future__ import annotations

import pytest

from memos_vllm.memory.claims import Claim, claim_of, fold, keys_of


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
