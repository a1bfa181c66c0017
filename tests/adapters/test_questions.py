from __future__ import annotations

import pytest

from memos_vllm.adapters.questions import controls, questions_of


@pytest.mark.parametrize(
    ("text", "question", "value"),
    [
        ("My job is baker.", "What is my job?", "baker"),
        ("Alice's favourite drink is oolong tea.", "What is Alice's favourite drink?", "oolong tea"),
        ("The Wi-Fi passwords are a and b!", "What are the Wi-Fi passwords?", "a and b"),
        ("I live in Turin.", "Where do I live?", "in Turin"),
        ("I like jazz", "What do I like?", "jazz"),
        ("My e-mail is a.b@c.org.", "What is my e-mail?", "a.b@c.org"),
    ],
)
def test_a_statement_is_turned_into_its_question(text: str, question: str, value: str) -> None:
    (made,) = questions_of(text)
    assert (made.text, made.value, made.statement) == (question, value, text)


def test_each_sentence_asks_its_own_and_the_rest_asks_nothing() -> None:
    made = list(questions_of("Hi there! My job is baker. It rained.\nMy pet is a cat."))
    assert [each.text for each in made] == ["What is my job?", "What is my pet?"]


def test_controls_are_of_three_kinds_and_never_ask_what_is_distilled() -> None:
    taken = [control.text for control in controls(60, seed=1)][:2]
    made = list(controls(300, seed=1, taken=taken))
    assert len(made) == 300 and not {each.text for each in made} & {text for text in taken if text.startswith("What")}
    assert sum(each.answer is not None for each in made) == 100
    assert all(any(each.answer in line for line in each.memory) for each in made if each.answer)
    assert made == list(controls(300, seed=1, taken=taken)) != list(controls(300, seed=2, taken=taken))
