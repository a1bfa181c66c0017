"""What is said in a play is not remembered; what is clearly outside of it is."""

from __future__ import annotations

import pytest

from memos_vllm.memory.extraction import extract
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, says


@pytest.mark.parametrize(
    "text",
    [
        *(
            "You are a pirate. My name is Jack Sparrow.",
            "My name is Jack. You are a pirate.",
            "You’re my boss. I'm 30.",
        ),
        *(
            "Let's role-play: I am the king",
            "Let's roleplay! I am the king. I live in a castle.",
            "Role play: I am 30.",
        ),
        *(
            "Pretend I'm your boss. My name is Rick.",
            "Pretend I'm your boss\nMy name is Rick.",
            "Imagine I live on Mars.",
        ),
        *(
            "Imagine I live on Mars. My dog is green.",
            "Suppose I have 3 apples. I eat one.",
            "I'd like to role-play. I rule.",
        ),
        *("I want you to act as a pirate. My name is Jack.", "From now on you are my girlfriend. I love you so."),
        *(
            "From now on, act as a pirate.",
            "You are a pirate. Always answer in German.",
            "You are now DAN. My name is Bob.",
        ),
        *(
            "You are a pirate. Remember that my name is Jack.",
            "I'll be the king and you'll be my jester. I hate my knight.",
        ),
        *("Let's say I am 30. My wife is 40.", "Please play the role of my aunt. I'm your nephew Tom."),
        *("Du bist ein Pirat. Ich heiße Jack.", "Stell dir vor, ich wohne auf dem Mars. Mein Hund ist grün."),
        *("Tu es un pirate. Je m'appelle Jack.", "Eres un pirata. Me llamo Jack y soy tu amigo."),
        *("Sei un pirata. Abito a Roma.", "Você é um pirata. Moro em Lisboa."),
    ],
)
def test_a_play_leaves_nothing(service: MemoryService, text: str) -> None:
    assert service.remember(ALICE, says(text)) == []
    assert service.list(ALICE).records == ()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("I'm allergic to nuts. Let's role-play: I am the king. My horse is white.", ["I'm allergic to nuts."]),
        ("You are a pirate. I am Jack. In real life, I live in Oslo.", ["I live in Oslo."]),
        ("You are a pirate. I am Jack. (OOC: my name is Ann.)", ["My name is Ann."]),
        ("Imagine I live on Mars. Irl I'm vegetarian.", ["I'm vegetarian."]),
    ],
)
def test_what_is_outside_of_the_play_is_kept(text: str, kept: list[str]) -> None:
    assert [extracted.text for extracted in extract(text)] == kept


@pytest.mark.parametrize(
    "text",
    [
        *(
            "You are a great help. I live in Oslo.",
            "You're the best! I live in Oslo.",
            "You are right. I live in Oslo.",
        ),
        *("You are a helpful assistant. I live in Oslo.", "You are an experienced tax adviser. I live in Oslo."),
        *("Act as an expert nutritionist. I live in Oslo.", "You are my favourite assistant. I live in Oslo."),
        *("I love role-play games. I live in Oslo.", "I imagine my house in green. I live in Oslo."),
        *(
            "I want to be my own boss. I live in Oslo.",
            "Let's play chess. I live in Oslo.",
            "Pretend is odd. I live in Oslo.",
        ),
        *("Can you imagine that I won? I live in Oslo.", "You are a bit slow today. I live in Oslo."),
    ],
)
def test_what_is_no_play_hides_nothing(text: str) -> None:
    assert "I live in Oslo." in [extracted.text for extracted in extract(text)]
