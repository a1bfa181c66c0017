"""What is kept of what a user says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory.extraction import extract
from memos_vllm.memory.sentences import split


def kept(text: str) -> list[str]:
    return [extracted.text for extracted in extract(text)]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("I like tea. I like coffee.", ["I like tea.", "I like coffee."]),
        ("I pay 3.5 euros, or 1,000.25 yen. Fine.", ["I pay 3.5 euros, or 1,000.25 yen.", "Fine."]),
        ("I live in St. Mary. Dr. J. R. Smith knows.", ["I live in St. Mary.", "Dr. J. R. Smith knows."]),
        ("I use v2.0.31 of memos.example.com daily.", ["I use v2.0.31 of memos.example.com daily."]),
        ("I eat fruit, e.g. apples, etc. I like it.", ["I eat fruit, e.g. apples, etc.", "I like it."]),
        ("We meet at 5 p.m. on Monday.", ["We meet at 5 p.m. on Monday."]),
        ("It was me, not I. Really!", ["It was me, not I.", "Really!"]),
        (
            'He said "It is late. Go home." and left. I stayed.',
            ['He said "It is late. Go home." and left.', "I stayed."],
        ),
        ('"I am Ann." I said so.', ['"I am Ann."', "I said so."]),
        ("Wait... what? Well… no.", ["Wait... what?", "Well… no."]),
        ("我喜欢茶。我住在上海！你呢？", ["我喜欢茶。", "我住在上海！", "你呢？"]),
        ("彼は「元気です。」と言った。私も。", ["彼は「元気です。」と言った。", "私も。"]),
        ("मुझे चाय पसंद है। मैं दिल्ली में हूँ।", ["मुझे चाय पसंद है।", "मैं दिल्ली में हूँ।"]),
        ("- I like tea\n* I like chess\n1. I have a cat", ["I like tea", "I like chess", "I have a cat"]),
        ("My hobbies:\n- chess\n- rowing", ["My hobbies: chess", "My hobbies: rowing"]),
        ("Facts about me:\n- I am 30\n- my dog is Rex\n- nuts", ["I am 30", "my dog is Rex", "Facts about me: nuts"]),
        ("What my boss says:\n- I am lazy", ["What my boss says: I am lazy"]),
        ("Ich bin am 3. Mai geboren. Ja.", ["Ich bin am 3. Mai geboren.", "Ja."]),
        ("I am 31. May I ask? It was 1990. August came.", ["I am 31.", "May I ask?", "It was 1990.", "August came."]),
        ("My favourite drink is\noolong tea.", ["My favourite drink is oolong tea."]),
        ("I like tea\nI like coffee", ["I like tea", "I like coffee"]),
        ("x" * 58 + " in\nBerlin it rains.", ["x" * 58 + " in Berlin it rains."]),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_splits_into_sentences(text: str, sentences: list[str]) -> None:
    assert split(text) == sentences


@pytest.mark.parametrize(
    "text",
    [
        "My favourite drink is oolong tea.",
        "I'm allergic to nuts",
        "Alice's home city is Oslo.",
        "When I was young, I lived in Rome.",
        "i like green tea.",
        "Name is what I hate to give.",
        "我最喜欢的饮料是乌龙茶。",
        "私の好きな飲み物は緑茶です。",
        "Ich trinke gern Tee.",
        "No, my sister is called Eve.",
        "I said hi, my friend did not hear.",
        "iPhones are what I collect.",
    ],
)
def test_keeps_statements_verbatim(text: str) -> None:
    assert kept(text) == [text]


@pytest.mark.parametrize(
    "text",
    [
        *("Hello!", "Hi there", "Good morning.", "Thanks.", "Thank you so much for your help!", "OK, great.", "Bye!"),
        *("Got it, thanks!", "That's great.", "How are you today", "👍", "...", "你好！", "谢谢。", "こんにちは。"),
        *("ありがとうございます。", "Gracias!", "Berlin.", "Merci beaucoup!", "Vielen Dank.", "Muchas gracias."),
        *("I do.", "No, I don't.", "Yes, I have.", "I can't.", "Sure, go ahead."),
        *("What is my favourite drink?", "what is my favourite drink", "Do you remember me?", "do you know my name"),
        *(
            "Is it late",
            "Can you help me",
            "How many cats do I have",
            "我喜欢什么？",
            "你知道我的名字吗",
            "お元気ですか。",
        ),
        *("Do you remember that I like tea?", "Remember when we met?", "Why 🤔? 🤔"),
        *(
            "Write me a poem.",
            "Tell me a joke about my cat.",
            "Please translate this.",
            "Now summarize it please.",
            "Let's go on.",
        ),
        *(
            "I want you to act as a pirate.",
            "Don't use emojis.",
            "Suppose I live in Tokyo.",
            "请翻译这句话。",
            "詩を書いてください。",
            "Help me, please.",
        ),
    ],
)
def test_drops_what_tells_nothing_about_the_user(text: str) -> None:
    assert kept(text) == []


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Remember that my cat is called Tom.", "My cat is called Tom."),
        ("Please note that I'm vegetarian.", "I'm vegetarian."),
        ("please remember my birthday is May 3rd", "My birthday is May 3rd."),
        ("Can you remember that I am allergic to nuts?", "I am allergic to nuts."),
        ("Don't forget: the gate code is 42!", "The gate code is 42!"),
        ("Keep in mind that I live in St. Mary, please.", "I live in St. Mary."),
        ("Remember to call Ann on Monday.", "Remember to call Ann on Monday."),
        ("From now on, answer in French.", "From now on, answer in French."),
        ("Please use metric units from now on.", "Please use metric units from now on."),
        ("请记住，我住在上海。", "我住在上海。"),
        ("私は緑茶が好きだと覚えておいてください。", "私は緑茶が好きだ。"),
    ],
)
def test_keeps_what_it_is_asked_to_remember(text: str, content: str) -> None:
    (extracted,) = extract(text)
    assert (extracted.text, extracted.rule) == (content, "asked")


def test_an_order_for_good_is_a_preference_and_a_plan_a_fact() -> None:
    assert [each.type for each in extract("Going forward, don't use emojis.")] == ["preference"]
    assert [(each.type, each.rule) for each in extract("I am vegan from now on.")] == [("fact", "statement")]
    assert kept("Will you answer in French from now on?") == []


def test_takes_the_statement_out_of_a_turn() -> None:
    turn = "Hello! My favourite drink is oolong tea. Thanks. What should I drink? Tell me."
    assert kept(turn) == ["My favourite drink is oolong tea."]


def test_strips_a_greeting_in_front() -> None:
    assert kept("Hi there, my name is Ann.") == ["My name is Ann."]


def test_code_becomes_one_document() -> None:
    text = "I write Python.\n```python\nx = 1. Or 2.\n```\nMore:\n```\ny = 2\n```\n"
    assert [(e.text, e.type) for e in extract(text)] == [
        ("I write Python.", "fact"),
        ("```python\nx = 1. Or 2.\n```\n\n```\ny = 2\n```", "document"),
    ]


def test_an_open_code_block_reaches_to_the_end() -> None:
    assert [(e.text, e.type) for e in extract("```\nI like tea. I do.")] == [("```\nI like tea. I do.", "document")]


def test_a_long_paste_becomes_one_document() -> None:
    text = "I like tea. " * 200
    assert [(e.text, e.type, e.rule) for e in extract(text)] == [(text.strip(), "document", "long")]


def test_blank_long_text_is_nothing() -> None:
    assert extract(" " * 5000) == []


def test_a_megabyte_is_one_document() -> None:
    assert [e.type for e in extract("I like tea. " * 90_000)] == ["document"]


@given(st.text(alphabet=st.sampled_from(".!?。…:-\"'“”「」() \n\t1aAIi我か吗`~*é, "), max_size=1990) | st.text())
def test_never_fails_and_never_invents(text: str) -> None:
    for sentence in split(text):
        assert sentence == sentence.strip() != ""
    extract(text)


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        ("As I said, I live in Oslo.", "I live in Oslo."),
        ("As I’ve already told you, I live in Oslo.", "I live in Oslo."),
        ("Like I mentioned before: my name is Ann.", "My name is Ann."),
        ("FYI my time zone is CET.", "My time zone is CET."),
        ("Just FYI, my time zone is CET.", "My time zone is CET."),
        ("By the way, I live in Oslo.", "I live in Oslo."),
        ("Oh, by the way I live in Oslo.", "I live in Oslo."),
        ("Btw I'm vegetarian.", "I'm vegetarian."),
        ("Just so you know, I'm vegetarian.", "I'm vegetarian."),
        ("So you know: my cat is called Tom.", "My cat is called Tom."),
        ("Hi there, btw, my name is Ann.", "My name is Ann."),
        ("By the way, please remember that I like tea.", "I like tea."),
        ("Btw always answer in German.", "Always answer in German."),
    ],
)
def test_what_only_says_that_a_statement_follows_is_left_out(text: str, statement: str) -> None:
    (extracted,) = extract(text)
    assert (extracted.text, extracted.type) == (extract(statement)[0].text, extract(statement)[0].type)
    assert extracted.text == statement


@pytest.mark.parametrize("text", ["As I said to my wife, I live in Oslo.", "FYI is what my boss writes."])
def test_a_lead_in_that_says_more_stays(text: str) -> None:
    assert kept(text) == [text]


@pytest.mark.parametrize("text", ["As I said, write it shorter.", "By the way, what is the time?", "FYI: use a table."])
def test_a_lead_in_makes_no_statement_of_a_command_or_a_question(text: str) -> None:
    assert kept(text) == []
