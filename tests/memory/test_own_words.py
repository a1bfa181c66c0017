"""What of a message is the user's own word, and what he asks not to have remembered."""

from __future__ import annotations

import pytest

from memos_vllm.memory import own_words
from memos_vllm.memory.extraction import extract
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, says, texts
from tests.memory.test_types import call, result

ABOUT_LAURA = "My name is Laura and I live in London. My phone number is 555 1234. I hate cats."


@pytest.mark.parametrize(
    "operation",
    [
        *("Translate this to French:\n", "Can you translate this?\n", "Translate: ", "please rewrite this: "),
        *("Proofread this email:\n\n", "Fix the grammar: ", "Check my spelling:\n", "Reply to this message:\n"),
        *("Summarize the following text.\n\n", "Hi, could you improve my cover letter:\n", "Shorten it please\n"),
        *("Übersetze: ", "Bitte korrigiere das:\n", "Traduis en anglais : ", "Traduce al inglés:\n", "Traduci: "),
        *("Traduza para inglês:\n", "Переведи: ", "翻译成英文：", "请润色这段话：\n"),
        *("### Task:\nGenerate a title for the chat.\n### Chat History:\nUSER: ", "> ", "Hello! Translate: "),
    ],
)
def test_a_text_that_is_handed_over_is_not_the_users_word(service: MemoryService, operation: str) -> None:
    service.remember(ALICE, says("My phone number is 555 9999."))
    assert service.remember(ALICE, says(operation + ABOUT_LAURA)) == []
    assert texts(service.list(ALICE).records) == ["My phone number is 555 9999."]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("I like tea.\nTranslate: I like coffee", ["I like tea."]),
        ("Plan my week: I work on Mondays.\nI love hiking.", ["I love hiking."]),
        ("Improve my meal plan.\nI am vegan.", ["I am vegan."]),
        ("Summarize what you know about me.\nI also have a dog.", ["I also have a dog."]),
        ("I translate books.\nI live in Rome.", ["I translate books.", "I live in Rome."]),
        ("Rewriting old songs is my hobby: it calms me.", ["Rewriting old songs is my hobby: it calms me."]),
        ("USER: My name is Bob.\nASSISTANT: Nice, I am glad!\nI live in Rome.", ["I live in Rome."]),
        ("> I am Ann\nI disagree with my sister.", ["I disagree with my sister."]),
        ("User: Ann, that is me.", ["User: Ann, that is me."]),
        ("# About me\nI am a nurse.\n\n## Hobbies\nI play chess.", ["I am a nurse.", "I play chess."]),
        ("#1 of my hobbies is chess.", ["#1 of my hobbies is chess."]),
        ("Résumé : je suis médecin.", ["Résumé : je suis médecin."]),
    ],
)
def test_what_stands_beside_it_is_kept(text: str, kept: list[str]) -> None:
    assert [extracted.text for extracted in extract(text)] == kept


def test_a_long_task_of_a_front_end_is_no_document() -> None:
    assert extract("### Task:\nGenerate tags.\n" + ABOUT_LAURA * 30) == []
    assert [each.type for each in extract("### Taste:\n" + ABOUT_LAURA * 30)] == ["document"]


@pytest.mark.parametrize(
    "text",
    [
        *("Don't save this. I'm pregnant.", "Off the record: I like my boss.", "I like tea, but don’t remember that."),
        *("Please don't remember this, but I have HIV.", "Do not store the following: my salary is 100k."),
        *("It is confidential, don't save it: I am on parole.", "I live in Rome, don't keep that in memory."),
        *(
            "You must not remember this: I am ill.",
            "dont remember this im sick",
            "I drink. Never store what I tell you.",
        ),
        *("Speicher das nicht: ich bin krank.", "Das bitte nicht merken: ich bin krank.", "别记住这个：我生病了"),
        *("Ne retiens pas ça : je suis enceinte.", "No guardes esto: estoy enfermo.", "これは覚えないで：私は病気です"),
        *("Non salvare questo: sono malato.", "Não guarde isso: estou doente.", "Не запоминай: я болен."),
        *(
            "Without saving this: my cat is ill.",
            "This is off the record, but I drink.",
            "Don't note it down. I am Ann.",
        ),
    ],
)
def test_who_asks_so_has_nothing_remembered(service: MemoryService, text: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert service.remember(ALICE, [*says(text), call(1, "f", "{}"), result(1)], tools=tools) == []
    assert service.list(ALICE).records == ()


@pytest.mark.parametrize(
    "text",
    [
        *("I don't remember that film.", "Don't forget my anniversary is June 12.", "They don't save it.", "I log it."),
        *(
            "Refactor it, but don't save it to disk.",
            "You don't remember that I like tea?",
            "I asked him off the record.",
        ),
        *("My milk is warm, don't keep it in the sun.", "I never remember that word.", "We do not store any data."),
        *(
            "Ich merke mir das nicht so gut.",
            "Je ne retiens pas ça.",
            "No recuerdo eso.",
            "我不记得这个",
            "请不要忘记我",
        ),
        *("Remember this: I never save anything.", "Don't write this in capitals.", "He said don't log in."),
    ],
)
def test_other_sentences_with_such_words_ask_for_nothing(text: str) -> None:
    assert not own_words.are_withheld(text)
