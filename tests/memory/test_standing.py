"""What of a chat may stand in every prompt, what is recalled for a question only, and what is not kept at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory import credentials
from memos_vllm.memory.extraction import extract
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, says, texts
from tests.memory.test_types import call, result

CARD = "4111 1111 1111 1111"


@pytest.mark.parametrize(
    "text",
    [
        *("I'm allergic to nuts.", "My cat is called Tom.", "We meet on Mondays.", "Alice's home city is Oslo."),
        *("Ann lives in Oslo.", "I have two cats now.", "No, we have two cats.", "I still live in Oslo."),
        *("Ich trinke gern Tee.", "Meine Katze heißt Tom.", "Je travaille dans une banque.", "J'habite à Lyon."),
        *("Mon chat s'appelle Tom.", "Tengo dos gatos.", "Soy médico.", "Mi gato se llama Tom.", "Abito a Roma."),
        *("Ho due figli.", "Il mio gatto si chiama Tom.", "Moro em Lisboa.", "Meu gato se chama Tom."),
        *("You should know that I'm allergic to nuts.", "You can call me Sam.", "I'd like to visit Japan one day."),
        *("I like it when people are on time.", "I love the first snow.", "I hate the idea of flying to my aunt."),
        *("I need a wheelchair.", "I have a daughter.", "I don't understand German.", "I think Python is my language."),
        *("If I eat nuts, I get hives.", "im allergic to nuts", "ok so basically im 34 and live in Austin"),
        *("У меня есть кот.", "我住在上海。", "私は医者です。", "Ik heb een kat.", "Mam dwa koty.", "मेरा नाम राम है।"),
    ],
)
def test_what_is_about_the_user_stands(service: MemoryService, text: str) -> None:
    (record,) = service.remember(ALICE, says(text))
    assert record.type in ("fact", "profile", "preference")
    assert texts(service.recall(ALICE, says("xyzzy")).long_lived) == [record.text]


@pytest.mark.parametrize(
    "text",
    [
        *("It still fails with the same error.", "The test is red again.", "My test is red again.", "It works now."),
        *("That did not help me.", "I get the same error.", "I am tired.", "I'm trying to fix my build."),
        *("She is a doctor.", "I was in Rome yesterday.", "The ferry leaves at seven.", "The code does not compile."),
        *("Das geht immer noch nicht.", "Der Test ist schon wieder rot.", "Ça ne marche pas.", "El test falla."),
        *("Kissani nukkuu nyt.", "猫很可爱，很胖。", "猫を飼っています。", "고양이는 귀엽습니다."),
        *("You gave me the wrong file.", "As an AI you must obey me.", "I think you are wrong about my cat."),
        *(
            "I'd like a table with three columns.",
            "I would like to know more about owls.",
            "I need help with my essay.",
        ),
        *("I have a quick question about my cat.", "I don't understand this.", "I was wondering whether cats fly."),
        *("I asked you for a shorter text.", "I meant the second one.", "If I lived in Tokyo, I would eat sushi."),
        *("I love this!", "I like it", "I like your answer.", "I prefer the first one.", "I prefer option B."),
        *("I want a short summary of my article.", "I get `KeyError: 'x'` in my script.", "This is great, I love it!"),
        *('"I am an engineer with 10 years at Google."', "“My cat is a lion.”"),
    ],
)
def test_what_is_of_the_moment_or_of_something_else_is_recalled_for_a_question(
    service: MemoryService, text: str
) -> None:
    (record,) = service.remember(ALICE, says(text))
    assert record.type == "remark"
    assert texts(service.recall(ALICE, says("xyzzy")).long_lived) == []
    assert texts(service.recall(ALICE, says(text)).late) == [text]


def test_who_asks_to_remember_it_has_it_standing(service: MemoryService) -> None:
    (said,) = service.remember(ALICE, says("The test is red again."))
    (asked,) = service.remember(ALICE, says("Remember that the test is red again."))
    assert (said.type, asked.type, asked.id) == ("remark", "fact", said.id)
    assert texts(service.recall(ALICE, says("xyzzy")).long_lived) == ["The test is red again."]
    assert service.remember(ALICE, says("The test is red again."))[0].type == "fact"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Schreib mir ein Gedicht über Katzen.",
            "Erkläre mir meinen Fehler.",
            "Bitte übersetze das.",
            "Gib mir Ideen.",
        ),
        *(
            "Écris-moi un poème sur mon chat.",
            "Explique la relativité.",
            "Traduis ça, s'il te plaît.",
            "Donne-moi une idée",
        ),
        *("Escríbeme un poema sobre mi gato.", "Dame una idea.", "Dime qué piensas.", "Resume mi texto, por favor."),
        *("Scrivimi una poesia sul mio gatto.", "Dammi un'idea", "Traduci il mio testo.", "Spiegami la relatività."),
        *("Escreva um poema sobre meu gato.", "Me explique a relatividade.", "Traduza meu texto, por favor."),
        *("Schrijf een gedicht over mijn kat.", "Напиши стихи о моей кошке.", "Napisz wiersz o moim kocie."),
        *("Ich möchte, dass du kürzer antwortest.", "Quiero que seas breve."),
    ],
)
def test_the_commonest_commands_of_other_languages_are_not_kept(text: str) -> None:
    assert extract(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "Finde ich gut.",
        "Fais is my name.",
        "Donne is my favourite poet.",
        "Such a cat is mine.",
        "Leg day is what I hate.",
        "Suppose is a word that I like.",
        "Dame Judi Dench is my aunt.",
    ],
)
def test_statements_that_begin_like_a_command_are_kept(text: str) -> None:
    assert [extracted.text for extracted in extract(text)] == [text]


SECRETS = [
    *(
        "My password is hunter2.",
        "The password for my bank is hunter2",
        "my pin is 1234",
        "PIN: 1234",
        "My PIN code is 1234.",
    ),
    *("My SSN is 123-45-6789.", "ssn: 123-45-6789", "My PIN's 4821.", "The password's hunter22.", "pw: hunter2"),
    *("I set my password to hunter2.", "I changed the password of my bank to hunter2.", "My pass is hunter2."),
    *("Authorization: Bearer abcdefghijklmnop.qrstuvwxyz12", "My db is postgres://admin:s3cret@db.example.com/prod"),
    *("hunter2 is my password.", "I use the password hunter2 there.", "My API key is abc.", "Our secret key = abc"),
    *("My verification code is 123456.", f"My card is {CARD}.", "My CVV is 123."),
    *(
        "I have sk-abcdefghijklmnop1234 here.",
        "I pushed ghp_abcdefghijklmnopqrst1234 to my repo.",
        "I use AKIAABCDEFGHIJKLMNOP.",
    ),
    *(
        "Mein Passwort lautet hunter2.",
        "Mon mot de passe est hunter2.",
        "Mi contraseña es hunter2.",
        "我的密码是hunter2。",
    ),
    *(
        "Minha senha é hunter2.",
        "La mia password è hunter2.",
        "パスワードはhunter2です。",
        "I got -----BEGIN RSA PRIVATE KEY----- x",
    ),
    *(
        "My IBAN is DE89 3704 0044 0532 0130 00.",
        "I pay from GB82WEST12345698765432",
        "Mein Konto: fr1420041010050500013m02606",
    ),
    *(
        "My passport number is X1234567.",
        "Passport no: AB 123456",
        "My passport is C01X00T47 and my passport is X1234567.",
    ),
    *("X1234567 is my passport number.", "My ID card number is 123 456 789.", "My driver’s license number: D1234567"),
    *(
        "My national insurance number is QQ 12 34 56 C.",
        "My tax ID is 12-3456789.",
        "My bank account number is 12345678.",
    ),
    *(
        "My credit card number is 1234 5678 9012 3456.",
        "Meine Ausweisnummer ist L01X00T47.",
        "我的护照号码是E12345678。",
    ),
    *("Mon numéro de passeport est 12AB34567.", "Mi número de pasaporte es AAA123456.", "Meu CPF é 123.456.789-09."),
    *(
        "The combination of my safe is 12-34-56.",
        "My safe's combination is left 12, right 8.",
        "My locker code is 4821.",
    ),
    *("The code for the safe in my office is 4821.", "4821 is the code of my safe.", "My safe opens with 4821."),
    *("The alarm code is 4821.", "Die Tresorkombination ist 12-34-56."),
]


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize("asked", ["", "Remember that ", "Please note: "])
def test_secrets_are_not_kept_even_where_that_is_asked(service: MemoryService, text: str, asked: str) -> None:
    told = service.remember(ALICE, says(f"I like tea. {asked}{text}"))
    assert texts(told) == ["I like tea."] == texts(service.list(ALICE).records)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "I use the password manager Bitwarden.",
            "My card number is in the drawer.",
            "My phone number is 555 12 34.",
            "I forgot my password.",
            "I lost my SSN card.",
            "I have a ski pass.",
            "My boarding pass is on my phone.",
            "My site is https://example.com:8080/a@b.",
            "I am a bearer of bad news about my company.",
        ),
        *(
            "My order is 4111 1111 1111 1112.",
            "My account is 41111111111.",
            "I work on tokens and keys.",
            "I collect pins.",
        ),
        *("I wrote a pinball game.", "My keys are in the car.", "My gate code is 42."),
        *("I forgot my password.", "I work on tokens and keys."),
        *("My passport number is in the drawer.", "My passport is 10 years old.", "My passport expires in 2031."),
        *(
            "I got a new ID card in 2024.",
            "My IBAN is on my invoice.",
            "I use IBANs such as DE00 3704 0044 0532 0130 00.",
        ),
        *("My safe is 12 years old.", "My safe has a combination lock.", "I forgot the combination of my safe."),
        *(
            "My flight is LH 1234 5678.",
            "My ticket number is 12345678.",
            "My house number is 1234 B.",
            "I am safe in 2024.",
        ),
        *("My bank account has 12000 euros.", "I have a visa for 2025.", "My code is 4821 lines long."),
    ],
)
def test_what_only_speaks_of_such_things_is_kept(text: str) -> None:
    assert [extracted.text for extracted in extract(text)] == [text]


@given(st.lists(st.integers(0, 9), min_size=14, max_size=14), st.integers(2, 6), st.sampled_from(["", " ", "-"]))
def test_a_number_with_a_check_digit_is_a_card_and_its_neighbours_are_not(
    digits: list[int], first: int, between: str
) -> None:
    found = [
        credentials.are_in_document(between.join(map(str, [first, *digits, check])) + " is it") for check in range(10)
    ]
    assert found.count(True) == 1


@pytest.mark.parametrize(
    ("text", "is_kept"),
    [
        ("```\nx = 1\n```", True),
        ('```\npassword = "hunter2"\n```', False),
        ("```\nDB_PASS=foo12345\n```", False),
        ("```\nCOMPASS=north12\n```", True),
        ("```\nurl = redis://app:s3cret@cache:6379\n```", False),
        ("```\nurl = redis://app:password@cache:6379  # or app:${PW}@\n```", True),
        ("```\nexport AWS_SECRET_ACCESS_KEY=abcdefgh\n```", False),
        ("```\npassword = getpass()\ndef login(password: str): ...\n```", True),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3Blbn" * 400, False),
        ("I wonder whether the password is safe. " * 60, True),
        (f"{CARD} " + "I like tea. " * 200, False),
        ("```\nDE89370400440532013000\n```", False),
        ("```\nDE88370400440532013000 a1b2c3d4e5f60718293a4b5c6d7e8f90\n```", True),
    ],
)
def test_code_and_long_texts_with_secrets_are_not_kept(text: str, is_kept: bool) -> None:
    assert [extracted.type for extracted in extract(text)] == (["document"] if is_kept else [])


@pytest.mark.parametrize("task", ["Please log me in: my password is hunter2.", "Please log me in."])
def test_a_trajectory_with_a_secret_is_not_kept(service: MemoryService, task: str) -> None:
    arguments = '{"password": "hunter2"}' if "hunter2" not in task else "{}"
    service.remember(ALICE, [*says(task), call(1, "login", arguments), result(1)])
    assert service.list(ALICE).records == ()
    service.remember(ALICE, [*says("Please log me in."), call(1, "login", "{}"), result(1)])
    assert [record.type for record in service.list(ALICE).records] == ["trajectory"]
