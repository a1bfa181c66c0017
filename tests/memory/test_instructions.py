"""Instructions on how to answer: which of them stand, and which take the place of an earlier one."""

from __future__ import annotations

import pytest

from memos_vllm.memory.extraction import extract
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, says, texts


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Always answer in German.",
            "Never use emojis",
            "From now on keep answers short.",
            "Always cite your sources.",
        ),
        *("Please always use metric units", "In future, reply without bullet points", "Never call me Bob."),
        *("Please never use bullet points in your answers.", "I want you to always answer in French."),
        *("Remember to always answer in French.", "Always be honest with me.", "From now on no emojis."),
        *("always answer in german pls", "Please don't use emojis anymore.", "I want you to never use emojis again."),
        *("I don't want you to use emojis any more.", "Never use the word 'delve'.", "Always use metric."),
        *("You can now answer in English.", "Sprich immer Deutsch mit mir.", "Habla siempre español."),
        *("You can use emojis again.", "You may use tables now.", "You don't have to answer in German anymore."),
        *("Antworte immer auf Deutsch.", "Bitte verwende nie Emojis.", "Ab jetzt antworte auf Englisch."),
        *("Réponds toujours en français.", "N'utilise jamais d'émojis.", "Désormais, réponds en anglais."),
        *("Responde siempre en español.", "Nunca uses emojis.", "A partir de ahora responde en inglés."),
        *("Rispondi sempre in italiano.", "Non usare mai emoji.", "D'ora in poi rispondi in inglese."),
        *("Responda sempre em português.", "Nunca use emojis.", "De agora em diante responda em inglês."),
    ],
)
def test_an_instruction_for_good_stands_in_every_prompt(service: MemoryService, text: str) -> None:
    (record,) = service.remember(ALICE, says(text))
    assert (record.text, record.type) == (text, "preference")
    assert texts(service.recall(ALICE, says("xyzzy")).long_lived) == [text]


@pytest.mark.parametrize(
    "text",
    [
        *("Answer in German.", "Use a table.", "Translate always as 'immer'.", "Keep it short.", "Don't use emojis."),
        *("Always look on the bright side of life.", "Never give up.", "Always be yourself.", "Never mind."),
        *("Never use your phone at the table.", "Always use protection.", "Never answer the phone.", "Never again."),
        *("Never call me again.", "Always use the same name in this text.", "Never use emojis in this post."),
        *("Always answer in German, my teacher said.", "Write a post on owls. Never use emojis."),
        *("Could you draft a letter? Please always use metric units.", "Imagine a city in the future."),
        *("Write a story set in the future.", "Does he always answer in German?", "Antworte auf Deutsch."),
        *(
            "Will you always answer in German?",
            "Don't use emojis.",
            "Don't answer that again.",
            "Always answer my emails.",
        ),
    ],
)
def test_a_command_for_the_moment_is_not_kept(text: str) -> None:
    assert extract(text) == []


@pytest.mark.parametrize(
    "text",
    [
        *("My boss always answers in German.", "He never uses emojis.", "You can use emojis.", "Réponds en français."),
        *(
            "Responde en español.",
            "Antwort war immer auf Deutsch.",
            "Habla siempre en serio.",
            "Antworte immer auf diese Frage auf Deutsch.",
        ),
    ],
)
def test_what_only_sounds_like_one_is_no_preference(text: str) -> None:
    assert [each.type for each in extract(text)] != ["preference"]


def test_what_is_asked_beside_a_task_stands_if_it_names_the_answers(service: MemoryService) -> None:
    service.remember(ALICE, says("Write a poem. Always answer in German. From now on, never use emojis."))
    assert texts(service.list(ALICE).records) == ["Always answer in German.", "From now on, never use emojis."]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Never use emojis.", "You can use emojis again."),
        ("Never use emojis.", "Always use emojis."),
        ("You can use emojis again.", "From now on no smileys, please."),
        ("In future, reply without bullet points.", "You may use bullet points again."),
        ("Always use bullet points.", "Please stop using bullet points from now on."),
        ("Always answer in German.", "Always answer in English."),
        ("Always answer in German.", "You don't have to answer in German anymore."),
        ("Always answer in German.", "Never answer in German."),
        ("You can use emojis again.", "Don't use emojis anymore."),
        ("Never answer in English.", "You can answer in English again."),
        ("Never answer in English.", "Always answer in English."),
        ("Antworte immer auf Deutsch.", "From now on, answer in English."),
        ("Réponds toujours en français.", "Responde siempre en español."),
        ("Verwende nie Emojis.", "Du darfst wieder Emojis verwenden."),
        ("From now on keep answers short.", "Always give me detailed answers."),
        ("Please always use metric units.", "Always use imperial units."),
        ("Call me Bob.", "Don't ever call me Bob, call me Rob."),
        ("Never call me Bob.", "You can call me Bob again."),
        ("You can call me Bob.", "Never call me Bob."),
        ("Don’t ever call me Bob, call me Rob", "Always call me Bobby."),
    ],
)
def test_a_later_instruction_about_the_same_takes_its_place(service: MemoryService, before: str, after: str) -> None:
    for text in (before, after):
        service.remember(ALICE, says(text))
    (new,) = service.list(ALICE).records
    assert texts(service.history(ALICE, new.id)) == [before, after]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Never use emojis.", "Never use tables."),
        ("Always answer in German.", "Never answer in English."),
        ("Always answer in German.", "Never use emojis."),
        ("Never call me Bob.", "Always call me Rob."),
        ("Always use metric units.", "Always use Celsius."),
        ("I like emojis.", "Never use emojis."),
    ],
)
def test_instructions_about_other_things_stand_side_by_side(service: MemoryService, before: str, after: str) -> None:
    for text in (before, after):
        service.remember(ALICE, says(text))
    assert texts(service.list(ALICE).records) == [before, after]


def test_what_was_never_meant_for_good_takes_no_place(service: MemoryService) -> None:
    for text in ("Always answer in German.", "Answer in English.", "Use emojis."):
        service.remember(ALICE, says(text))
    assert texts(service.list(ALICE).records) == ["Always answer in German."]
