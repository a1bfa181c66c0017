"""What a sentence asserts or denies, so that of two that cannot both be true the later ends the earlier.

An assertion is a whole English sentence in the first person: a predicate, and whether it holds or of how many.

    I play the guitar; I don't play the guitar anymore, I no longer play ..., I stopped playing ...
    I'm vegetarian; I'm not vegetarian anymore, I'm no longer vegetarian; I eat meat again
    I have two cats; I have three cats, I don't have cats any more
    I work at X; I don't work at X anymore, I quit my job at X, I left X

Two assertions contradict each other only if their predicates have the same words, less articles, and one of them tells
a change ("anymore", "no longer", "again", "stopped") or how many. So "I don't play the piano anymore" ends nothing
that was said of the guitar, nor does a sentence that says more; and "I like tea" and "I don't like tea" are both kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import regex

from memos_vllm.memory import claim_forms, instructions
from memos_vllm.memory.claim_forms import Claim, fold
from memos_vllm.memory.instructions import Instruction

YES, NO, SOME = "yes", "no", "some"


@dataclass(frozen=True, slots=True)
class Assertion:
    predicate: str
    value: str
    """``YES``, ``NO``, or of what one has: ``SOME``, ``NO`` or a number."""

    is_change: bool = True
    """Whether it says that it was otherwise before, or how many there are."""

    implied: tuple[tuple[str, str], ...] = ()
    """Other predicates and their values."""

    ended_subject: str | None = None
    """Of claims that are over, whatever their value."""


def assertion_of(text: str) -> Assertion | None:
    return reading_of(text)[1]


def reading_of(text: str) -> tuple[Claim | None, Assertion | None]:
    """The claim and the assertion that the whole text makes."""
    if len(text) > claim_forms.MAX_CHARS:
        return None, None
    claim, order = claim_forms.claim_of(text), instructions.of(text)
    return claim or (order.claim if order else None), _assertion(text, claim, order)


def _assertion(text: str, claim: Claim | None, order: Instruction | None) -> Assertion | None:
    if order is not None:
        value = YES if order.holds else NO
        return Assertion(order.predicate, value, implied=order.implied) if order.topic else None
    if claim is not None:
        is_of = claim.subject in _OF_SUBJECTS
        return Assertion(f"{claim.subject} {claim.value}", YES, _tells_change(text)) if is_of else None
    if not _FIRST_PERSON.search(text):
        return None
    said = fold(claim_forms.core_of(text)).rstrip(".! ")
    while said.endswith(_ENDINGS):
        said = said.rpartition(" ")[0].removesuffix(" any").removesuffix(" at")
    found = _stated(said) if said.startswith(("i ", "i'", "im ")) else None
    if found is None:
        return None
    return replace(found, is_change=found.predicate.startswith("have ") or _tells_change(text))


def _tells_change(text: str) -> bool:
    return _CHANGE.search(text) is not None


def contradicts(new: Assertion, old: Assertion) -> bool:
    """Whether the later one ends the earlier one; "I have a cat" leaves "I have two cats" alone."""
    values = dict([(new.predicate, new.value), *new.implied])
    value = values.get(old.predicate)
    if value is None or value == old.value or not (new.is_change or old.is_change):
        return False
    return NO in (value, old.value) or value != SOME


_FIRST_PERSON = regex.compile(r"\bim?\b", regex.I)
_OF_SUBJECTS = frozenset({"my residence", "my employer", "my job", "my nickname"})
_BY_VERB = {"live in ": "my residence ", "work at ": "my employer ", "work for ": "my employer ", "work as ": "my job "}
_NOW = r"(?:(?:now|currently|actually|just|recently|finally|only)\ )*"
_ENDINGS = (" anymore", " any more", " any longer", " again", " now", " at all")
_CHANGE = regex.compile(
    r"\b(?:any\ ?more | (?:any|no)\ longer | again|now|stopped|quit|left|lost|resigned|given\ up|gave\ up|started"
    r"|resumed|begun|fired|laid\ off|let\ go | moved)\b",
    regex.I | regex.X,
)
_REST = r"(?P<rest> [^,;:!?()\n\"]{1,80}? )"
_HAVE = r"(?:i(?:'ve|\ have)\ got|i've|i\ (?:\p{L}+\ )??(?:have|own)(?!\ (?:to|been|had)\b))"
_COUNT = (
    r"(?:(?P<count> \d{1,4} | an? | one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve | no | some )\ )?"
    r"(?P<thing> \p{L}+ (?:[\ -]\p{L}+){0,2}? )"
)


_OF_HAVING = regex.compile(r"i've|\b(?:have|own|got)\b")
_QUIT = regex.compile(
    rf"""i(?:'ve|\ have)?\ {_NOW} (?: (?:quit|left|lost|resigned\ from|gave\ up|given\ up)
      | (?:was|got|have\ been|been)\ (?P<fired> fired|laid\ off|let\ go )(?:\ (?:from|by))? )
    (?:\ (?:my|the)\ (?:job|position|work)(?=$|\ (?:at|with|for|today|yesterday|last)\b)
      (?:\ (?:at|with|for))?(?P<job>))?
    (?:\ (?!my\b|the\ (?:job|position|work)\b)(?P<employer> [^,;:!?()\n\"]{{1,60}}? ))?
    (?:\ (?: today|yesterday|recently|this\ (?:week|month) | last\ (?:week|month|year) ))?""",
    regex.X,
)
_DOES_NOT_HAVE = regex.compile(
    r"(?: i\ (?:now\ )?(?:do\ not|don't|dont|no\ longer)\ (?:have|own) | i\ haven't\ got | i\ have\ not\ got )"
    r"\ (?:any\ |an?\ )?(?P<thing> \p{L}+ (?:[\ -]\p{L}+){0,2}? )",
    regex.X,
)
_HAS = regex.compile(rf"{_HAVE}\ {_NOW}{_COUNT}", regex.X)
_STOPPED = regex.compile(
    rf"i(?:'ve|\ have)?\ {_NOW}(?:stopped|quit|given\ up|gave\ up)\ (?P<gerund> \p{{L}}+ing )(?:\ {_REST})?",
    regex.X,
)
_STARTED = regex.compile(
    rf"i(?:'ve|\ have)?\ {_NOW}(?:started|resumed|begun)\ (?P<gerund> \p{{L}}+ing )(?:\ {_REST})?", regex.X
)
_IS_NOT = regex.compile(
    rf"(?: i(?:'m|\ am)|im )\ {_NOW}(?:not|no\ longer|no)\ (?:currently\ )?{_REST} | i\ no\ longer\ am\ {_REST}",
    regex.X,
)
_IS = regex.compile(rf"(?: i(?:'m|\ am)|im )\ {_NOW}{_REST}", regex.X)
_DOES_NOT = regex.compile(rf"i\ {_NOW}(?:do\ not|don't|dont|no\ longer|never)\ {_NOW}(?:ever\ )?{_REST}", regex.X)
_DOES = regex.compile(rf"i\ {_NOW}{_REST}", regex.X)


def _stated(said: str) -> Assertion | None:
    if _CHANGE.search(said):
        if match := _QUIT.fullmatch(said):
            return _quit(match)
        for form, value in ((_STOPPED, NO), (_STARTED, YES)):
            if match := form.fullmatch(said):
                return _does(f"{match['gerund']} {match['rest'] or ''}", value, is_gerund=True)
    if _OF_HAVING.search(said):
        if match := _DOES_NOT_HAVE.fullmatch(said):
            return _has(match["thing"], NO)
        if match := _HAS.fullmatch(said):
            return _has(match["thing"], _number(match["count"]))
    if match := _IS_NOT.fullmatch(said):
        return _is(match["rest"], NO)
    if match := _IS.fullmatch(said):
        return _is(match["rest"], YES)
    if match := _DOES_NOT.fullmatch(said):
        return _does(match["rest"], NO)
    match = _DOES.fullmatch(said)
    return _does(match["rest"], YES) if match else None


def _quit(match: regex.Match[str]) -> Assertion | None:
    employer = match["employer"]
    if employer is not None and not _NO_PREDICATE.search(employer) and not employer.endswith("ing"):
        if regex.match(r"\p{L}+ing ", employer):  # "I quit playing the guitar"
            return _does(employer, NO, is_gerund=True)
        return Assertion(f"my employer {employer}", NO)
    if employer is not None and regex.fullmatch(r"\p{L}+ing", employer):
        return _does(employer, NO, is_gerund=True)
    is_job = employer is None and (match["job"] is not None or match["fired"] is not None)
    return Assertion("have job", NO, ended_subject="my employer") if is_job else None


def _has(thing: str, value: str) -> Assertion | None:
    if _NO_PREDICATE.search(thing) or thing.split()[0] in _NO_VERBS:
        return None
    return Assertion(f"have {_singular(thing)}", value)


def _number(count: str | None) -> str:
    if count in (None, "a", "an", "some"):
        return SOME
    assert count is not None
    return NO if count == "no" else _NUMBERS.get(count, count)


def _is(what: str, value: str) -> Assertion | None:
    first, _, rest = what.partition(" ")
    if first.endswith("ing") and len(first) > 5:  # "I'm learning Greek"
        return _does(f"{first} {rest}", value, is_gerund=True)
    if first in _NO_TRAITS:
        return None
    return _predicate(f"be {what}", value)


def _does(what: str, value: str, is_gerund: bool = False) -> Assertion | None:
    verb, _, rest = what.strip().partition(" ")
    if verb in _NO_VERBS or verb in _HAVING:
        return None
    if verb in ("am", "being"):
        return _is(rest, value)
    for start, subject in _BY_VERB.items():
        if f"{_gerund_stem(verb) if is_gerund else _stem(verb)} {rest}".startswith(f"{_stem(start[:4])} {start[5:]}"):
            what = rest.partition(" ")[2].strip()
            return _predicate(subject + (_ARTICLE.sub("", what) if subject == "my job " else what), value)
    return _predicate(f"{_gerund_stem(verb) if is_gerund else _stem(verb)} {rest}", value)


def _predicate(words: str, value: str) -> Assertion | None:
    if _NO_PREDICATE.search(words):
        return None
    subject = next((subject for subject in _BY_VERB.values() if words.startswith(subject)), "")
    what = words if subject else " ".join(word for word in words.split() if word not in _ARTICLES)
    return Assertion(what, value, implied=_IMPLIED.get(what, ()) if value == YES else ())


def _stem(verb: str) -> str:
    """What an infinitive and its gerund share: "smoke", "smoking"; "run", "running"."""
    verb = verb.removesuffix("e")
    return verb[:-1] if len(verb) > 3 and verb[-1] == verb[-2] else verb


def _gerund_stem(verb: str) -> str:
    return _stem(verb.removesuffix("ing"))


def _singular(thing: str) -> str:
    if thing.endswith("children"):
        return thing.removesuffix("ren")
    if thing.endswith("ies") and len(thing) > 4:
        return thing[:-3] + "y"
    if thing.endswith(("sses", "xes", "ches", "shes")):
        return thing[:-2]
    return thing[:-1] if thing.endswith("s") and not thing.endswith("ss") else thing


_ARTICLE = regex.compile(r"(?:an?|the) ")
_ARTICLES = frozenset("a an the any".split())
_HAVING = frozenset("have own having owning".split())
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten eleven twelve".split(), 1)
}
_NO_VERBS = frozenset(
    """was were had did do does can could will would should shall may might must used been know think mean guess
    understand see get care mind agree remember believe suppose wonder say said don't didn't can't won't also always
    never not no often usually sometimes rarely""".split()
)
"""What one thinks of the conversation, helping verbs, and words that make it another predicate."""

_NO_TRAITS = frozenset("not no sure certain sorry done going about always often sometimes also so too very".split())
_NO_PREDICATE = regex.compile(
    r"""\b(?:and|but|or|because|although|though|while|if|when|unless|until|since|that|which|who|than|except|without
    |too|yet|either|neither|it|this|these|those|them|him|her|there|here|you|your|what|how|why|where|is|are|was)\b""",
    regex.X,
)
_IMPLIED = {
    "eat meat": tuple((f"be {diet}", NO) for diet in ("vegetarian", "vegan", "pescatarian")),
    "be vegetarian": (("eat meat", NO),),
    "be vegan": (("eat meat", NO),),
    "be pescatarian": (("eat meat", NO),),
}
