"""The recall task: conversations about facts, in the prompt format that the plugin assembles.

A *fact* is a person's attribute and its value ("Alice's favourite drink is oolong tea."). It
stands in long-lived memory, in late memory or in an earlier turn, among facts about other people
and small talk. The answer to a question repeats the question's subject before it gives the value,
so that the value is found by looking up what followed the same words earlier in the context.

Every word of a name or value is for training or for evaluation by its checksum, whether it comes
from a list or is made up, so what is evaluated was no name or value in training (``is_held_out``).
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from memos_vllm.memory.assembly import assemble

Message = dict[str, Any]

NAMES = """
Alice Bob Carol David Emma Frank Grace Henry Ivy Jack Karen Liam Mia Noah Olivia Peter Quinn Rosa Samuel Tina Umar
Vera Walter Xenia Yusuf Zoe Anna Ben Clara Daniel Elena Felix Gina Hugo Irene Jonas Kira Leo Maria Nils Oscar Paula
Ravi Sofia Tom Ursula Victor Wendy Yara Zack Amir Bella Chen Diana Erik Fatima George Hana Igor Julia Kofi Laura
Marco Nadia Omar Priya Rachel Stefan Tara Viktor Wei Yuki Aisha Bruno Chloe Dmitri Esther Finn Greta Hassan Ingrid
Jamal Keiko Lars Mei Nora Otto Petra Ruth Sven Thea Ulrich Vivian Zara Adam Beth Charlie Dora Edward Fiona Gabriel
Helen Isaac Jane Kevin Lucy Martin Nina Oliver Pablo Rita Simon Theo Uma Vincent Will Yvonne Arthur Brenda Colin
Mallory Trudy Eve Dave Erin Judy Oscar Peggy Sybil Craig Niaj Heidi Ivan Rupert Faythe Grant Sam Max Kim Alex Robin
""".split()

WORDS = """
oolong tea coffee green black white red blue silver golden purple orange yellow lemon mint ginger apple cherry plum
peach mango banana grape melon berry honey sugar salt pepper vanilla cocoa milk water juice cider soda cream butter
cheese bread rice noodle soup salad pizza pasta curry taco burger pancake waffle cookie cake pie chocolate almond
walnut pumpkin carrot potato tomato onion garlic spinach olive mushroom corn bean lentil salmon tuna shrimp chicken
turkey lamb duck goose swan eagle hawk owl raven robin sparrow finch tiger lion bear wolf fox deer rabbit otter
beaver badger squirrel mouse horse pony donkey camel zebra giraffe elephant rhino monkey gorilla panda koala dolphin
whale shark turtle lizard gecko frog toad snake spider beetle cricket butterfly dragon unicorn phoenix paris london
berlin madrid rome vienna oslo helsinki athens lisbon dublin prague warsaw budapest tokyo kyoto osaka seoul beijing
shanghai delhi mumbai cairo lagos nairobi sydney perth toronto montreal boston chicago dallas denver seattle lima
quito bogota havana baker teacher doctor nurse pilot sailor farmer gardener painter sculptor writer poet singer
drummer dancer actor plumber carpenter welder mason tailor cobbler jeweller lawyer judge banker clerk chemist
physicist biologist geologist astronomer engineer programmer librarian editor chess tennis football rugby hockey
cricket golf rowing sailing skiing surfing climbing hiking running cycling swimming boxing fencing archery guitar
piano violin cello flute trumpet harp drum organ jazz blues rock folk opera tango waltz summer winter spring autumn
monday tuesday friday sunday january march april july october rose tulip daisy lily orchid violet iris poppy oak
maple birch cedar willow pine elm iron copper bronze marble granite amber jade ruby opal pearl velvet cotton linen
silk wool leather river mountain valley forest desert island ocean meadow garden castle bridge tower harbour market
old young big small fast slow cold warm sweet bitter quiet loud bright dark soft hard happy lazy clever brave gentle
""".split()

ATTRIBUTES = """
favourite drink|favourite colour|favourite food|favourite song|favourite animal|favourite book|favourite film
favourite game|favourite sport|favourite city|favourite season|favourite flower|favourite number|favourite fruit
home city|home town|home country|birthday|birthplace|job|hobby|employer|school|address|office|car|bike|team|language
nickname|last name|middle name|email|phone number|shoe size|lucky number|password|allergy|diet|age|pet|plan|project
pet's name|cat's name|dog's name|sister's name|brother's name|wife's name|boss|best friend|doctor|landlord|horse's name
""".replace("\n", "|").split("|")
ATTRIBUTES = [attribute for attribute in ATTRIBUTES if attribute]

HELD_OUT_ATTRIBUTES = """
favourite dessert|favourite band|favourite holiday|home village|blood type|eye colour|parrot's name|mother's name
teacher|neighbour|instrument|star sign|coffee order|seat number|desk|favourite painter|gym|bank|wifi name|lunch
""".replace("\n", "|").split("|")
HELD_OUT_ATTRIBUTES = [attribute for attribute in HELD_OUT_ATTRIBUTES if attribute]

BASE_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about the user.",
    "You are the support assistant of a small shop. Be polite and short.",
    "Answer from what you remember.",
]

GREETINGS = ["Hi!", "Hello!", "Hello there.", "Good morning!", "Hey!", "Good evening.", "Thanks!", "Hi there!"]

SMALL_TALK = [
    "It rained all day.",
    "The weather is nice today.",
    "I like walking.",
    "I like {w}.",
    "I went to the {w} yesterday.",
    "We had {w} for lunch.",
    "{n} called me this morning.",
    "{n} likes {w}.",
    "I met {n} at the {w}.",
    "The train was late again.",
    "My friend {n} has a {w}.",
    "Tomorrow I will see {n}.",
    "I slept well.",
    "That {w} was too {w}.",
    "{n} and {n} are friends.",
    "The {w} is next to the {w}.",
    "I bought a {w} {w} last week.",
    "There was a {w} in the garden.",
    "Please remember that.",
    "I am a bit tired.",
    "How nice.",
    "The meeting is on {w}.",
    "I talked with {n} about {w}.",
    "You are very kind.",
    "This is my {w}.",
    "Let me tell you about {n}.",
]

ACKNOWLEDGEMENT = "Noted."
UNKNOWN = "not known to me"

_ONSETS = "b c d f g h j k l m n p r s t v w z b d f k l m n r s t br ch cl dr gr kr pl sh st tr th".split()
_NUCLEI = "a e i o u a e i o u ai ea".split()
_CODAS = "n r s l t m k x st".split() + [""] * 12
_ACCENTED = "äöüéèñçøåšžłığćőАБВГДеждиклмнопрстαβγδλπσω東京茶山川大小水日"


def is_held_out(word: str) -> bool:
    """True for the quarter of all possible words that only evaluation may use."""
    return zlib.crc32(word.lower().encode()) % 4 == 0


@dataclass(frozen=True)
class Fact:
    """``person`` is None for the user, who then speaks in the first person."""

    person: str | None
    attribute: str
    value: str

    def sentence(self) -> str:
        return f"{'My' if self.person is None else self.person + chr(39) + 's'} {self.attribute} is {self.value}."


@dataclass(frozen=True)
class Question:
    """A question about one attribute of one person; ``value`` is None if the context does not tell."""

    person: str | None
    attribute: str
    value: str | None

    def text(self) -> str:
        return f"What is {'my' if self.person is None else self.person + chr(39) + 's'} {self.attribute}?"

    def answer(self) -> str:
        owner = "Your" if self.person is None else self.person + "'s"
        return f"{owner} {self.attribute} is {UNKNOWN if self.value is None else self.value}."


class Vocabulary:
    """Random names, values and attributes, from the words for training or the held-out ones."""

    def __init__(self, rng: random.Random, *, held_out: bool = False, listed_attributes: float = 0.75):
        self.rng = rng
        self.listed_attributes = listed_attributes
        self.held_out = held_out
        self._names = [word for word in NAMES if is_held_out(word) == held_out]
        self._words = [word for word in WORDS if is_held_out(word) == held_out]

    def _draw(self, make: Any) -> str:
        while is_held_out(word := make()) != self.held_out:
            pass
        return word

    def _syllables(self, least: int, most: int) -> str:
        rng = self.rng
        return "".join(
            rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(rng.randint(least, most))
        )

    def _letters(self) -> str:
        alphabet = string.ascii_letters + string.digits if self.rng.random() < 0.5 else _ACCENTED
        return "".join(self.rng.choice(alphabet) for _ in range(self.rng.randint(2, 6)))

    def word(self) -> str:
        kind = self.rng.random()
        if kind < 0.4:
            return self.rng.choice(self._words)
        if kind < 0.85:
            return self._draw(lambda: self._syllables(1, 3))
        if kind < 0.93:
            return self._draw(self._letters)
        return self._draw(lambda: str(self.rng.randint(1, 10 ** self.rng.randint(1, 5))))

    def name(self) -> str:
        if self.rng.random() < 0.4:
            return self.rng.choice(self._names)
        return self._draw(lambda: self._syllables(1, 3)).capitalize()

    def value(self) -> str:
        words = [self.word() for _ in range(self.rng.choice((1, 1, 2, 2, 3)))]
        return " ".join(word.capitalize() if self.rng.random() < 0.15 else word for word in words)

    def value_of(self, attribute: str) -> str:
        return self.name() if attribute.endswith("name") and self.rng.random() < 0.7 else self.value()

    def attribute(self) -> str:
        """Mostly one of ``ATTRIBUTES``; else made-up words in training, ``HELD_OUT_ATTRIBUTES`` in evaluation."""
        if self.rng.random() < self.listed_attributes:
            return self.rng.choice(ATTRIBUTES)
        if self.held_out:
            return self.rng.choice(HELD_OUT_ATTRIBUTES)
        words = [self.word().lower() for _ in range(self.rng.choice((1, 2)))]
        return " ".join(["favourite", *words] if self.rng.random() < 0.3 else words)

    def talk(self) -> str:
        text = self.rng.choice(SMALL_TALK)
        while "{" in text:
            text = text.replace("{n}", self.name(), 1).replace("{w}", self.word(), 1)
        return text


@dataclass
class World:
    """A few people and attributes, so that most facts share one of the two with a question."""

    vocabulary: Vocabulary
    num_people: int
    num_attributes: int
    told: dict[tuple[str | None, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {self.vocabulary.name() for _ in range(self.num_people)}
        attributes = {self.vocabulary.attribute() for _ in range(self.num_attributes)}
        self.pairs = [(name, attribute) for name in [None, None, *sorted(names)] for attribute in sorted(attributes)]
        self.pairs += [(None, "name")]
        self.pairs = list(dict.fromkeys(self.pairs))
        self.vocabulary.rng.shuffle(self.pairs)
        self._next = 0

    def new_fact(self) -> Fact | None:
        """A fact about a pair not told before; None when a quarter of the pairs, kept for absence, is left."""
        if self._next >= max(1, len(self.pairs) * 3 // 4):
            return None
        person, attribute = self.pairs[self._next]
        self._next += 1
        return Fact(person, attribute, self.vocabulary.value_of(attribute))

    def corrected_fact(self) -> Fact | None:
        """A fact told before, with another value."""
        if not self.told:
            return None
        person, attribute = self.vocabulary.rng.choice(list(self.told))
        return Fact(person, attribute, self.vocabulary.value_of(attribute))

    def tell(self, facts: Iterable[Fact]) -> None:
        for fact in facts:
            self.told[fact.person, fact.attribute] = fact.value

    def ask_absent(self) -> Question:
        rng = self.vocabulary.rng
        if rng.random() < 0.7 and self._next < len(self.pairs):
            person, attribute = rng.choice(self.pairs[self._next :])
        else:
            person = None if rng.random() < 0.5 else self.vocabulary.name()
            attribute = self.vocabulary.attribute()
        return Question(person, attribute, self.told.get((person, attribute)))

    def ask_present(self) -> Question:
        person, attribute = self.vocabulary.rng.choice(list(self.told))
        return Question(person, attribute, self.told[person, attribute])


class Lines:
    """Writes facts and small talk into lines, and tells the world what it wrote."""

    def __init__(self, world: World, talk: float, corrections: float):
        self.world = world
        self.rng = world.vocabulary.rng
        self.talk = talk
        self.corrections = corrections

    def line(self) -> str:
        """One line: mostly one sentence, sometimes a fact with small talk around it."""
        vocabulary, rng = self.world.vocabulary, self.rng
        if rng.random() < self.talk:
            return vocabulary.talk()
        fact = self.world.corrected_fact() if rng.random() < self.corrections else self.world.new_fact()
        if fact is None:
            return vocabulary.talk()
        self.world.tell([fact])
        sentences = [fact.sentence()]
        if rng.random() < 0.15:
            sentences.insert(0, rng.choice(GREETINGS) if rng.random() < 0.5 else vocabulary.talk())
        if rng.random() < 0.1:
            sentences.append(vocabulary.talk())
        return " ".join(sentences)


def turn(user: str, answer: str, late: Sequence[str] = ()) -> list[Message]:
    user_message = {"role": "user", "content": user}
    if late:
        [user_message] = assemble([user_message], late=late)
    return [user_message, {"role": "assistant", "content": answer}]


def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The chat template, for the generator's plain messages."""
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return text + "<|im_start|>assistant\n" if add_generation_prompt else text


def base_prompt(vocabulary: Vocabulary) -> list[Message]:
    """No system message, a usual one, or one that says anything."""
    kind = vocabulary.rng.random()
    if kind < 0.4:
        return []
    if kind < 0.9:
        return [{"role": "system", "content": vocabulary.rng.choice(BASE_PROMPTS)}]
    return [{"role": "system", "content": " ".join(vocabulary.talk() for _ in range(vocabulary.rng.randint(1, 4)))}]


def make_world(vocabulary: Vocabulary, num_lines: int) -> World:
    """Room for ``num_lines`` facts and a third more pairs that stay untold."""
    num_pairs = max(4, num_lines * 3 // 2)
    num_people = vocabulary.rng.randint(1, max(1, min(num_pairs // 2, 24)))
    return World(vocabulary, num_people, max(1, -(-num_pairs // (num_people + 1))))


HELD_OUT_CHARACTERS_PER_TOKEN = 2.0
CHARACTERS_PER_TOKEN = 2.35  # of the shipped tokenizer on these texts; used to size texts before they are encoded
CHARACTERS_PER_LINE = 36


def training_text(rng: random.Random, num_tokens: int, listed_attributes: float = 0.75) -> str:
    """About ``num_tokens`` of one conversation: memory first, then statements and many questions."""
    vocabulary = Vocabulary(rng, listed_attributes=listed_attributes)
    budget = num_tokens * CHARACTERS_PER_TOKEN
    memory_budget = budget * rng.uniform(0.15, 0.75)
    world = make_world(vocabulary, int(memory_budget / CHARACTERS_PER_LINE) + 2)
    lines = Lines(world, talk=rng.choice((0.0, 0.2, 0.5)), corrections=rng.choice((0.0, 0.0, 0.0, 0.15)))
    statement_rate, late_rate = rng.choice((0.0, 0.1, 0.3)), rng.choice((0.0, 0.1, 0.4))

    memory: list[str] = []
    if rng.random() < 0.85:
        while sum(map(len, memory)) + 3 * len(memory) < memory_budget:
            memory.append(lines.line())
    messages = assemble(base_prompt(vocabulary), long_lived=memory)
    unasked = list(world.told)
    rng.shuffle(unasked)
    length = len(render(messages))
    while length < budget * 1.15:
        late = [lines.line() for _ in range(rng.randint(1, 6))] if rng.random() < late_rate else []
        if rng.random() < statement_rate:
            before = set(world.told)
            text = lines.line() if rng.random() < 0.7 else rng.choice([*GREETINGS, vocabulary.talk()])
            unasked += [pair for pair in world.told if pair not in before]
            added = turn(text, ACKNOWLEDGEMENT, late)
        else:
            if late:  # what stands in late memory is mostly what the question is about
                unasked += list(world.told)[-2:]
            if unasked and rng.random() < 0.75:
                pair = unasked.pop(-1 if late else rng.randrange(len(unasked)))
                question = Question(*pair, world.told[pair])
            else:
                question = world.ask_absent()
            text = question.text()
            if rng.random() < 0.1:
                text = f"{rng.choice(GREETINGS)} {text}"
            elif rng.random() < 0.05:
                text = f"{lines.line()} {text}"
                pair = question.person, question.attribute
                question = Question(*pair, world.told.get(pair))
            added = turn(text, question.answer(), late)
        messages += added
        length += len(render(added))
    return render(messages)


PLACEMENTS = ("long_lived", "late", "history")


@dataclass(frozen=True)
class Example:
    """One request as the server would see it, and the answer that is right."""

    messages: list[Message]
    answer: str
    labels: tuple[str, ...]  # what kind of example it is, for the table of results


class Draft:
    """A context of held-out names and values, in which every fact's section is known."""

    def __init__(self, rng: random.Random, num_tokens: int, placement: str):
        self.vocabulary = Vocabulary(rng, held_out=True)
        budget = num_tokens * HELD_OUT_CHARACTERS_PER_TOKEN - 110  # less the question and what is around it
        shares = {"long_lived": 1.0}
        if placement == "late":
            late = 0.5 if budget < 400 else 200 / budget
            shares = {"long_lived": 1 - late, "late": late}
        elif placement == "history":
            shares = {"long_lived": 0.5, "history": 0.5}
        self.world = make_world(self.vocabulary, max(2, int(budget / CHARACTERS_PER_LINE)))
        lines = Lines(self.world, talk=rng.choice((0.1, 0.3, 0.5)), corrections=rng.choice((0.0, 0.0, 0.1)))
        self.sections: dict[str, list[str]] = {name: [] for name in PLACEMENTS}
        self.told_in: dict[tuple[str | None, str], str] = {}
        for section, share in shares.items():
            overhead = 60 if section == "history" else 4
            length = 0
            while length < budget * share or not self.sections[section]:
                before = dict(self.world.told)
                text = lines.line()
                self.sections[section].append(text)
                length += len(text) + overhead
                told = self.world.told
                self.told_in.update({pair: section for pair in told if before.get(pair) != told[pair]})

    def request(self, query: str) -> list[Message]:
        """The messages in the plugin's format: the order in which the facts were told above."""
        history = [message for text in self.sections["history"] for message in turn(text, ACKNOWLEDGEMENT)]
        messages = [*base_prompt(self.vocabulary), *history, {"role": "user", "content": query}]
        return assemble(messages, long_lived=self.sections["long_lived"], late=self.sections["late"])


def evaluation_example(rng: random.Random, num_tokens: int, placement: str, *, known: bool, first: bool) -> Example:
    """About ``num_tokens`` that end with a question: about a fact told in ``placement``, or one never told."""
    while True:
        draft = Draft(rng, num_tokens, placement)
        told = draft.world.told
        if known:
            pairs = [pair for pair, section in draft.told_in.items() if section == placement]
        else:
            pairs = [pair for pair in draft.world.pairs if pair not in told]
            stranger = (None if first else draft.vocabulary.name(), draft.vocabulary.attribute())
            if stranger not in told and (not pairs or rng.random() < 0.3):
                pairs = [stranger]
        if pairs := [pair for pair in pairs if (pair[0] is None) == first]:
            break
    question = Question(*(pair := rng.choice(pairs)), told.get(pair))
    attribute = "unseen attribute" if question.attribute in HELD_OUT_ATTRIBUTES else "seen attribute"
    labels = (f"told in {placement}" if known else "not told", "first person" if first else "third person", attribute)
    return Example(draft.request(question.text()), question.answer(), labels)


def statement_example(rng: random.Random, num_tokens: int) -> Example:
    """About ``num_tokens`` that end with something that asks nothing."""
    draft = Draft(rng, num_tokens, rng.choice(PLACEMENTS))
    vocabulary = draft.vocabulary
    attribute = vocabulary.attribute()
    fact = Fact(rng.choice((None, vocabulary.name())), attribute, vocabulary.value_of(attribute)).sentence()
    greeting, talk = rng.choice(GREETINGS), vocabulary.talk()
    sentences = rng.choice(([greeting], [talk], [fact], [greeting, fact, talk]))
    return Example(draft.request(" ".join(sentences)), ACKNOWLEDGEMENT, ("statement",))
