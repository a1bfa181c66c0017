"""From statements to questions, by rules: what a distillation asks, and what it must leave as it was.

A rule turns one sentence around ("My job is baker." asks "What is my job?"); a sentence that no rule
fits asks nothing, and its memory is left out unless the caller brings questions of his own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_SENTENCE = re.compile(r"[^.!?\n]+(?:\.(?=\S)[^.!?\n]+)*[.!]?")
_IS = re.compile(
    r"(?P<subject>(?:My|Our|The|[^\W\d_][\w-]*(?: [^\W\d_][\w-]*)?'s) [^,;:]{1,60}?) (?P<verb>is|are) (?P<value>.+)"
)
_I = re.compile(r"I (?P<verb>live|work|study|like|love|hate|prefer|drive|speak|play) (?P<value>.+)")
_WHERE = {"live", "work", "study"}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about one statement, and the words that a right answer contains."""

    text: str
    value: str
    statement: str


def questions_of(text: str) -> Iterator[Question]:
    """The questions that a memory's text answers, one per sentence that a rule fits."""
    for match in _SENTENCE.finditer(text):
        statement = match[0].strip()
        said = statement.rstrip(".! ").replace("’", "'")
        if fits := _IS.fullmatch(said):
            subject = re.sub(r"^(My|Our|The)\b", lambda word: word[0].lower(), fits["subject"])
            yield Question(f"What {fits['verb']} {subject}?", fits["value"], statement)
        elif fits := _I.fullmatch(said):
            asks = "Where" if fits["verb"] in _WHERE else "What"
            yield Question(f"{asks} do I {fits['verb']}?", fits["value"], statement)


_PEOPLE = "Alice Bruno Clara David Elena Felix Grace Hassan Ingrid Jonas Keiko Laura Marco Nadia Oscar Priya".split()
_THINGS = [
    *("favourite drink", "favourite colour", "favourite food", "favourite animal", "favourite sport", "home city"),
    *("job", "hobby", "birthday", "phone number", "car", "school", "language", "best friend", "nickname", "address"),
]
_VALUES = """amber copper violet marble cedar willow falcon otter badger lemon ginger barley velvet silver harbour
meadow granite saffron pepper walnut""".split()
_GENERAL = [
    *("Hello!", "Good morning!", "Thank you.", "Hi there!", "How nice.", "I slept well.", "It rained all day."),
    *(
        "The train was late again.",
        "I like walking.",
        "Please remember that.",
        "Good evening.",
        "We had soup for lunch.",
    ),
    *("What is the capital of France?", "What is two plus two?", "What is a cat?", "Tell me a story."),
]


@dataclass(frozen=True, slots=True)
class Control:
    """A prompt whose answer an adapter should leave as it is.

    Attributes:
        memory: what stands in the prompt as remembered.
        answer: what a right answer contains; None: the answer of the model without an adapter is right.
    """

    text: str
    memory: tuple[str, ...] = ()
    answer: str | None = None


def controls(num_controls: int, seed: int, taken: Sequence[str] = ()) -> Iterator[Control]:
    """Prompts that have nothing to do with the distilled memory: in turn, an invented fact that stands in
    the prompt, a question that nothing answers, and something general.

    Args:
        taken: questions of the distillation, which are never asked.
    """
    rng = random.Random(f"controls {seed}")
    asked = {text.casefold() for text in taken}
    kind = 0
    while num_controls:
        owner = "my" if rng.random() < 0.3 else rng.choice(_PEOPLE) + "'s"
        thing = rng.choice(_THINGS)
        question = f"What is {owner} {thing}?"
        if kind == 2:
            yield Control(rng.choice(_GENERAL))
        elif question.casefold() in asked:
            continue
        elif kind == 0:
            value = " ".join(rng.sample(_VALUES, rng.choice((1, 1, 2))))
            others = (
                _statement(rng, rng.choice(_PEOPLE) + "'s", rng.choice(_THINGS)) for _ in range(rng.randint(0, 3))
            )
            fact = f"{owner[0].upper()}{owner[1:]} {thing} is {value}."
            memory = [*(other for other in others if f"{owner} {thing}" not in other), fact]
            rng.shuffle(memory)
            yield Control(question, tuple(memory), value)
        else:
            yield Control(question)
        kind = (kind + 1) % 3
        num_controls -= 1


def _statement(rng: random.Random, owner: str, thing: str) -> str:
    return f"{owner} {thing} is {rng.choice(_VALUES)}."
