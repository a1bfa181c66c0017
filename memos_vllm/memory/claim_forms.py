"""Sentences that give the value of something a person has one of, and how they are recognised.

A claim is a whole sentence: what stands before it may only be a correction ("Actually, ..."), what stands
after it only "now", "instead" and the like, or what it is not (", not Ann"). Whatever says more is no claim,
or the rest would be lost with it. The forms are English:

    My/Ann's favourite ..., name, job, age, ... is X     ``_ATTRIBUTE``, of a fixed list
    I live in X, I moved to X; Ann lives in X            residence
    I am N (years old), I turned N; Ann is N years old   age
    I am called X, my name's X                           name
    Call me X                                            nickname: a person has both
    I work as X; I work at X, I work for X               job; employer

"I am from X" is none: somebody is from a town and from a country. What a person has several of, what was,
what may be and what is asked is no claim either.
"""

from __future__ import annotations

from dataclasses import dataclass

import regex

from memos_vllm.memory.normal_forms import normalised

MAX_CHARS = 200


@dataclass(frozen=True, slots=True)
class Claim:
    subject: str
    value: str


def fold(text: str) -> str:
    """The text without what does not change its meaning: compatibility forms, case, spaces."""
    return " ".join(normalised("NFKC", normalised("NFKC", text).casefold()).split())


def claim_of(text: str) -> Claim | None:
    """The claim that the whole text makes, or None."""
    if len(text) > MAX_CHARS:
        return None
    said = core_of(text)
    return _attribute(fold(said)) or _first_person(said) or _of_others(said)


def core_of(text: str) -> str:
    """The sentence without a correction in front of it, and without "now" and the like at its end."""
    said = " ".join(normalised("NFKC", text).replace("’", "'").split())
    return _TRAILING.sub("", _LEADING.sub("", said, 1), 1)


_LEADING = regex.compile(
    r"""
    \A (?: (?: (?: actually|sorry|correction|wait|in\ fact|nope|no(?!\ (?:one|body)\b)|i\ mean|i\ meant )
            (?: \ *[,;:.!…–—-]+\ * | \  )
          | (?: oops|oh|well|ok|okay|yes|yeah|my\ mistake|my\ bad|to\ be\ precise|and|but|so|now|currently|nowadays
              | these\ days|as\ of\ (?:now|today) ) \ *[,;:.!…–—-]+\ *
          | (?: but|and|now|currently|nowadays|these\ days ) \ (?=(?:i|my|i'[mv]e?)\b) ) )+
    """,
    regex.I | regex.X,
)
_TRAILING = regex.compile(
    r"(?: again|,? (?:now|actually|instead|these days|nowadays)"
    r"|, (?:sorry|though|by the way|please|not [^,;:!?.]{1,40}))(?=[.!]*$)",
    regex.I,
)
_SAYS_MORE = regex.compile(
    r"\b(?:and|but|or|because|although|though|while|if|when|since|my|not|either|is|are|was|than)\b"
)
_VALUE = r"(?P<value> (?: [^,;:!?()\n.] | \.(?=\S) ){1,80}? )"

_SINGLE_VALUED = (
    "name|nickname|surname|birthday|date of birth|birthplace|age|height|weight|(home |work |postal |e-?mail )?address|"
    "e-?mail|((mobile |cell )?phone |telephone |mobile |cell |shoe |lucky )?number|phone|shoe size|job|occupation|"
    "profession|job title|employer|boss|manager|home ?town|home (city|country)|city|country|(zip|postal|post) ?code|"
    "nationality|native language|mother tongue|time ?zone|blood (type|group)|password|pin|star sign|marital status|"
    "gender|pronouns|school|university|office"
)
_ATTRIBUTE = regex.compile(
    rf"""
    (?P<subject>
        (?: my | [\p{{L}}\p{{M}}-]+ (?:\ [\p{{L}}\p{{M}}-]+)? 's ) [ ]
        (?: (?:favou?rite|preferred)\ [\p{{L}}\p{{M}}\ -]{{1,40}}?
          | (?:(?:first|last|full|middle|new|current)\ )? (?:{_SINGLE_VALUED.replace(" ", chr(92) + " ")}) )
    )
    \ (?:is|are)\ (?:(?:now|actually|currently)\ )?
    {_VALUE} [.!]*
    """,
    regex.X,
)
_ADJECTIVES = regex.compile(r"\b(new|current) ")
_MAIL_ADDRESS = regex.compile(r"(?<=\be-?mail) address$")


def _attribute(folded: str) -> Claim | None:
    match = _ATTRIBUTE.fullmatch(folded)
    if match is None or _SAYS_MORE.search(match["value"]):
        return None
    subject = _ADJECTIVES.sub("", match["subject"]).replace("favorite", "favourite")
    return Claim(_MAIL_ADDRESS.sub("", subject), match["value"].strip())


_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_UNITS = "one|two|three|four|five|six|seven|eight|nine"
_AGE = (
    rf"(?P<age> \d{{1,3}} | (?:{_TENS})(?:[\ -](?:{_UNITS}))? | {_UNITS}"
    r"| ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen )"
)
_OLD = r"\ years?\ (?:old|of\ age)"
_ARE = r"i(?:'m|\ am)"
_NOW = r"(?:\ (?:now|currently|still|actually|just|recently))*"
_PARTS = r"(?P<value> (?: [^;:!?()\n.] | \.(?=\S) | (?<=\b(?:st|mt|ft))\. ){1,80}? )"
"""With commas: "Berlin, Germany"."""

_FIRST_PERSON = {
    "residence": rf"(?: i{_NOW}\ (?:live|reside){_NOW}\ in | {_ARE}{_NOW}\ (?:living|based)\ in"
    rf" | i(?:'ve|\ have)?{_NOW}\ (?:moved|relocated)\ to )\ {_PARTS}",
    "age": rf"(?: {_ARE}{_NOW}\ (?: {_AGE}{_OLD} | (?P<age>\d\d) )"
    rf" | i(?:'ve|\ have)?{_NOW}\ turned\ {_AGE}(?:{_OLD})?(?:\ today)? )",
    "name": rf"(?: {_ARE}{_NOW}\ called | my\ name's{_NOW} )\ {_VALUE}",
    "nickname": rf"(?: you\ (?:can|may|should)\ | please\ | just\ )*call\ me\ {_VALUE} (?:\ from\ now\ on)?",
    "job": rf"(?: i{_NOW}\ work{_NOW} | {_ARE}{_NOW}\ working )\ as\ (?:an?\ |the\ )?{_VALUE}",
    "employer": rf"(?: i{_NOW}\ work{_NOW} | {_ARE}{_NOW}\ working )\ (?:at|for)\ {_VALUE}",
}
_NO_HOLDER = (
    "i|you|he|she|it|we|they|one|who|which|that|this|these|those|there|here|what|where|if|when|my|your|his|her|its|our|"
    "their|the|an?|some|any|no|not|nobody|everyone|everybody|someone|somebody|anyone|people|family|man|woman|and|or|but|"
    "maybe|perhaps|probably|now|still|also|always|usually|often|currently|never|sometimes|mostly|actually|just|recently|"
    "has|is|was|all|each|every|many|most|once|then|today|yesterday|tomorrow|formerly|previously|eventually|hopefully|"
    "apparently|later|soon|first|next|meanwhile"
)
_HOLDER = (
    r"(?P<who> my\ (?:mother|father|mum|mom|dad|wife|husband|partner|girlfriend|boyfriend|boss)"
    rf" | (?!(?:{_NO_HOLDER})\b)[\p{{L}}\p{{M}}-]+ (?:\ (?!(?:{_NO_HOLDER})\b)[\p{{L}}\p{{M}}-]+)? )"
)
_OF_OTHERS = {
    "residence": rf"{_HOLDER}(?: {_NOW}\ (?:lives|resides)\ in | \ is{_NOW}\ (?:living|based)\ in"
    rf" | (?:\ has)?{_NOW}\ (?:moved|relocated)\ to )\ {_PARTS}",
    "age": rf"{_HOLDER}(?: \ is{_NOW}\ {_AGE}{_OLD} | (?:\ has)?{_NOW}\ turned\ {_AGE}(?:{_OLD})?(?:\ today)? )",
    "job": rf"{_HOLDER}(?: {_NOW}\ works | \ is{_NOW}\ working )\ as\ (?:an?\ |the\ )?{_VALUE}",
    "employer": rf"{_HOLDER}(?: {_NOW}\ works | \ is{_NOW}\ working )\ (?:at|for)\ {_VALUE}",
}


def _compiled(forms: dict[str, str]) -> list[tuple[str, regex.Pattern[str]]]:
    return [(what, regex.compile(rf"(?:{form}) [.!]*", regex.I | regex.X)) for what, form in forms.items()]


_FIRST_PERSON_FORMS, _OTHERS_FORMS = _compiled(_FIRST_PERSON), _compiled(_OF_OTHERS)
_NAMED = frozenset({"residence", "name", "nickname", "employer"})
"""Whose value is a name; "I live in fear" and "Call me back" are something else."""

_IN_NO_NAME = frozenset(
    """a an my his her our their your with without during in on for at near by from to until till most mostly sometimes
    usually often half part temporarily i you we he she they me him it back later""".split()
)
_IN_NO_JOB = frozenset("with without during in on for at near by from until part sometimes usually often well".split())
_NO_PLACES = frozenset(
    """fear hope peace poverty pain denial luxury silence exile sin christmas easter night home linux ubuntu debian
    windows mac macos android ios python rust go java kotlin typescript kubernetes docker postgres postgresql git github
    gitlab slack teams signal production""".split()
)
"""What people live in, work at or move to that is neither a place nor an employer."""


def _first_person(said: str) -> Claim | None:
    for what, form in _FIRST_PERSON_FORMS:
        if (match := form.fullmatch(said)) and (value := _value(what, match, said)):
            return Claim(f"my {what}", value)
    return None


def _of_others(said: str) -> Claim | None:
    for what, form in _OTHERS_FORMS:
        match = form.fullmatch(said)
        if match is None or not (value := _value(what, match, said)):
            continue
        who = match["who"]
        if " " not in who or fold(who).startswith("my ") or _is_name(who.partition(" ")[2], said):
            return Claim(f"{fold(who)}'s {what}", value)
    return None


def _value(what: str, match: regex.Match[str], said: str) -> str | None:
    """None where the form has something else in the value's place."""
    if what == "age":
        return fold(match["age"]).replace(" ", "-")
    value, folded = match["value"].strip(), fold(match["value"])
    words = set(folded.replace(",", " ").split())
    if _SAYS_MORE.search(folded) or len(words) > 5:
        return None
    if what not in _NAMED:
        return folded if words.isdisjoint(_IN_NO_JOB) else None
    parts = value.split(", ")
    is_name = _is_name(value, said) if len(parts) == 1 else all(_is_capital(part[:1]) for part in parts)
    if what == "nickname":  # "call me back"
        is_name = all(_is_capital(word[:1]) for word in value.split())
    is_none = words & _IN_NO_NAME or (what != "nickname" and folded in _NO_PLACES)
    return folded if is_name and not is_none else None


def _is_name(value: str, said: str) -> bool:
    """By a capital letter, or in a script without them; who writes without capitals is believed."""
    return any(map(_is_capital, (word[:1] for word in value.split()))) or not regex.search(r"\p{Lu}", said)


def _is_capital(letter: str) -> bool:
    return regex.match(r"[\p{Lu}\p{Lt}\p{Lo}]", letter) is not None
