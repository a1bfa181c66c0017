"""Instructions that stand: commands on how the assistant is to answer, in every conversation to come.

"Always answer in German", "Never use emojis", "From now on keep answers short" stand; "Answer in German" is for the
moment. Words such as "from now on" make any command one that stands. "Always" and "never" do so only with what is
known here as a way to answer, for "Always look on the bright side" is none, and so does a permission that takes an
earlier one back ("You can use emojis again"). English here, other languages in ``instructions_elsewhere``.
"""

from __future__ import annotations

from dataclasses import dataclass

import regex

from memos_vllm.memory import instructions_elsewhere
from memos_vllm.memory.claim_forms import MAX_CHARS, Claim, fold

NICKNAME = "my nickname"


@dataclass(frozen=True, slots=True)
class Instruction:
    topic: str = ""
    """What it is about: ``answers: language``, of which there is one, or ``use`` of some device; "" if not known."""

    value: str = ""
    holds: bool = True
    """False: what is not to be done, or need not be any more."""

    implied: tuple[tuple[str, str], ...] = ()
    """Other predicates that hold ("yes") or do not ("no"), see ``assertions``."""

    is_for_good: bool = False
    """Said with words such as "from now on", and not with "always" or "never" alone."""

    @property
    def claim(self) -> Claim | None:
        """If it is about something that has one value: the language, the length, ..."""
        has_one = self.topic.startswith("answers: ") or self.topic == NICKNAME
        return Claim(self.topic, self.value) if self.holds and has_one else None

    @property
    def predicate(self) -> str:
        return f"{self.topic} {self.value}"


def of(text: str) -> Instruction | None:
    """The instruction that the whole text is, if it is one that stands."""
    if len(text) > MAX_CHARS:
        return None
    if not _HINT.search(text) or "?" in text:
        return None
    plain = fold(text).replace("’", "'")
    found = _english(plain.rstrip(".! "), text)
    if found is None and (elsewhere := instructions_elsewhere.of(plain.rstrip(".! "))):
        return Instruction(*elsewhere)
    return found


_HINT = regex.compile(
    rf"\b(?:always|never|ever|from (?:now|here) on|going forward|henceforth|future|again|any ?more|any longer|now"
    rf"|no longer|you can stop|in all|{instructions_elsewhere.MARKS})\b",
    regex.I,
)
_ANSWERS = (
    r"(?:(?:your|the|all|my|future|our|every|each|any|of)\ )*"
    r"(?:answer|repl(?:y|ie)|response|message|chat|conversation)s?"
)
_FOR_GOOD = (
    r"(?: from\ now\ on | from\ here\ on | going\ forward | henceforth | in\ (?:the\ )?future"
    rf" | in\ (?:all|every)\ {_ANSWERS} )"
)
_START = regex.compile(
    rf"""(?: (?P<good> {_FOR_GOOD} ) (?=[,:\ ]) [,:\ ]+
      | (?: (?:ok|okay|so|and|also|but|then|please|pls|kindly|just) [,\ ]+
        | (?: i(?:'d|\ would)?\ (?:want|like|need)\ you\ to | you\ (?:should|must|have\ to|need\ to)
          | (?:please\ )? (?: make\ sure\ (?:to|you|that\ you) | be\ sure\ to | remember\ to ) )\ ) )""",
    regex.X,
)
_FINISH = regex.compile(
    rf"[,\ ]+ (?: (?P<good> {_FOR_GOOD.replace('(?:the', '(?:(?!)the')} ) | please | pls | thanks )", regex.X
)
_ADVERB = regex.compile(
    r"(?: (?P<soft_not> never(?:\ again|\ ever)? | (?:do\ not|don't|dont)\ ever(?:\ again)? )"
    r" | (?P<soft> always ) | (?P<not> do\ not|don't|dont | i\ (?:do\ not|don't)\ want\ you\ to ) )\ (?:please\ )?",
    regex.X,
)
_ALLOWED = regex.compile(
    r"""(?:please\ )? (?:
        (?: you\ (?:can|may)(?:\ now)? | it(?:'s|\ is)\ (?:ok|okay|fine)\ to ) (?!\ (?:now\ )?stop\b)
            \ (?P<can> .+? )\ (?: again | now | in\ (?:your\ )?answers\ again )
      | (?: you\ (?:do\ not|don't|dont|no\ longer)\ (?:have|need)\ to | you\ needn't )\ (?P<need> .+? )
            (?:\ (?: any\ ?more|any\ longer ))?
      | you\ (?:can|may)\ (?:now\ )?stop\ (?P<stop> .+? ) (?:\ now)?
      | you\ (?:can|may)\ now\ (?P<now> .+ ) )""",
    regex.X,
)
_NO_MORE = (" anymore", " any more", " any longer", " again")
_INFINITIVES = {
    "using": "use", "answering": "answer", "replying": "reply", "responding": "respond", "speaking": "speak",
    "writing": "write", "adding": "add", "including": "include", "keeping": "keep", "calling": "call", "being": "be",
    "giving": "give", "talking": "talk",
}  # fmt: skip


def _english(plain: str, text: str) -> Instruction | None:
    if match := _ALLOWED.fullmatch(plain):
        body = match["can"] or match["need"] or match["stop"] or match["now"]
        if match["need"] and not match[0].endswith(("more", "longer")) and "no longer" not in match[0]:
            return None
        if match["stop"]:
            first, _, rest = body.partition(" ")
            body = f"{_INFINITIVES.get(first, first)} {rest}"
        return _topic(body, match["need"] is None and match["stop"] is None, text)
    body, is_for_good = _without_marks(plain)
    adverb = _ADVERB.match(body)
    if adverb:
        body, more = _without_marks(body[adverb.end() :])
        is_for_good |= more
    is_soft = adverb is not None and adverb["not"] is None
    if adverb and not adverb["soft"] and body.endswith(_NO_MORE):  # "Don't use emojis anymore"
        body, is_soft = body.rpartition(" ")[0].removesuffix(" any"), True
    if not (is_for_good or is_soft):
        return None
    holds = adverb is None or adverb["soft"] is not None
    if found := _topic(body, holds, text):
        return found if not is_for_good else _for_good(found)
    is_manner = is_soft and _MANNER.fullmatch(body) and not _OF_A_TASK.search(body)
    return Instruction() if is_manner else None


def _for_good(found: Instruction) -> Instruction:
    return Instruction(found.topic, found.value, found.holds, found.implied, is_for_good=True)


def _without_marks(body: str) -> tuple[str, bool]:
    is_for_good = False
    while match := _START.match(body):
        body, is_for_good = body[match.end() :], is_for_good or match["good"] is not None
    while match := _FINISH.search(body):
        if match.end() != len(body):
            match = _FINISH.search(body, match.start() + 1)
            if match is None or match.end() != len(body):
                break
        body, is_for_good = body[: match.start()], is_for_good or match["good"] is not None
    return body, is_for_good


_LANGUAGE = rf"(?P<language> {'|'.join(instructions_elsewhere.ENGLISH_NAMES)} )"
_SAY = r"(?:answer|reply|respond|write|speak|talk|communicate|chat)"
_TO_ME = r"(?:\ (?:to\ me|with\ me|me|back|only|everything|please|my\ questions))*"
_IN_ANSWERS = rf"(?:\ (?: in\ {_ANSWERS} | with\ me | to\ me | when\ you\ (?:answer|reply|write) ))?"
_DEVICE = (
    r"(?P<device> emojis?|emoticons?|smileys?|bullet\ ?points?|bullets|(?:bulleted\ |numbered\ )?lists|tables|markdown"
    r"|headings?|headers?|bold(?:\ text)?|italics|code\ ?blocks?|code\ comments|comments"
    r"|exclamation\ (?:marks|points)|jargon|slang|swear\ ?words|profanity|em[\ -]?dashes|dashes|disclaimers?|footnotes?"
    r"|hashtags?|latex|abbreviations?|acronyms|filler(?:\ words|\ phrases)?|flattery|citations?|sources?|references"
    r"|examples|semicolons?|rhymes )"
)
_SHORT = r"(?:short|brief|concise|terse|succinct|to\ the\ point|briefly|concisely|tersely|succinctly)"
_LONG = r"(?:long|detailed|thorough|verbose|in\ detail|at\ length|thoroughly|extensively)"
_LENGTH = rf"(?:(?:very|more|as|quite)\ )*(?:(?P<short> {_SHORT} )|(?P<long> {_LONG} ))(?:\ as\ possible)?"
_FORMS = {
    "language": rf"""{_SAY}{_TO_ME}\ (?:in\ )?{_LANGUAGE}{_TO_ME} | use\ {_LANGUAGE}{_IN_ANSWERS}
        | (?:give|write)\ (?:me\ )?{_ANSWERS}\ in\ {_LANGUAGE}""",
    "units": rf"use\ (?:the\ )?(?P<units> metric|imperial|si )(?:\ (?:units?|system|measurements?))*{_IN_ANSWERS}",
    "temperature": r"(?: use | (?:give|show)\ (?:me\ )?temperatures\ in )"
    rf"\ (?P<degrees> celsius|fahrenheit|kelvin ){_IN_ANSWERS}",
    "spelling": r"(?: use | write\ (?:in|with) )"
    rf"\ (?P<spelling> british|american|us|uk )\ (?:english|spelling){_IN_ANSWERS}",
    "length": rf"""keep\ (?: it | things | {_ANSWERS} )\ {_LENGTH} | be\ {_LENGTH}{_IN_ANSWERS}
        | {_SAY}{_TO_ME}\ {_LENGTH}
        | give\ (?:me\ )?{_LENGTH}\ (?:answers|replies|responses)
        | {_SAY}\ with\ {_LENGTH}\ (?:answers|sentences)""",
    "use": rf"""(?:use|include|add|put|insert|write(?:\ with)?|{_SAY}(?:\ to\ me|\ me)?\ with|give\ me|give|cite)
            \ (?:(?:any|the|so\ many|too\ many|more|your|in)\ )*{_DEVICE}{_IN_ANSWERS}""",
    "no use": rf"""(?: {_SAY}(?:\ to\ me|\ me)?\ without | avoid | leave\ out | omit | skip | stop | no )
            \ (?:using\ |any\ |all\ )*{_DEVICE}{_IN_ANSWERS}""",
    "name": r"(?:call|address)\ me\ (?:as\ )?(?P<name> [^,;:.!?]{1,40}? )"
    r"(?: (?:[,;]|\ -|\ –)\ ?(?:but\ |just\ |please\ |always\ )*(?:call\ me\ )?(?P<other> [^,;:.!?]{1,40}? ) )?",
}
_COMPILED = {name: regex.compile(rf"(?: {form} )", regex.X) for name, form in _FORMS.items()}
_MANNER = regex.compile(
    rf"""(?: (?:answer|reply|respond)
        \ (?:in|with|as|like|without|using|only|from|honestly|directly|politely|me|to\ me)\b.*
      | (?:cite|name|give|list|mention|show)\ (?:me\ )?(?:(?:your|the|all)\ )?
        (?:sources?|references?|steps?|working|work|links?)\b.*
      | explain\ (?:your|each|every|things|step|why|to\ me|code|everything)\b.*
      | (?:start|begin|end|format)\ (?:{_ANSWERS}|dates|numbers|code)\b.* | apologi[sz]e\b.* | tell\ me\ the\ truth
      | lecture\ me | ask\ me\ (?:first|before)\b.* | think\ step\ by\ step | (?:address|greet)\ me\b.*
      | (?:use|say|write)\ the\ (?:word|phrase|expression)s?\ .* | write\ (?:code|numbers|dates)\b.*
      | be\ (?:(?:more|very|so)\ )*(?:honest|direct|polite|formal|informal|casual|friendly|critical
        |precise|blunt|professional)
        (?:\ (?:with|to)\ me)?{_IN_ANSWERS} )""",
    regex.X,
)
_OF_A_TASK = regex.compile(
    r"\b(?:this|these|that|those|here|below|above|following|said|says|told|he|she|they|was|is|phone|door)\b"
)
_NO_NAMES = frozenset("again back later names at on before after when if a an the so that it".split())


def _topic(body: str, holds: bool, text: str) -> Instruction | None:
    for name, form in _COMPILED.items():
        match = form.fullmatch(body)
        if match is None:
            continue
        if name == "name":
            return _named(match, holds, text)
        if name in ("use", "no use"):
            return Instruction("use", _device(match["device"]), holds == (name == "use"))
        groups = match.groupdict()
        if name == "length":
            value = "short" if groups["short"] else "long"
        else:
            value = next(each for each in groups.values() if each)
        return Instruction(f"answers: {name}", value, holds)
    return None


def _device(name: str) -> str:
    name = {"smileys": "emojis", "smiley": "emojis", "emoticons": "emojis", "bullets": "bullet points"}.get(name, name)
    return name.replace("bulletpoint", "bullet point").removesuffix("s")


def _named(match: regex.Match[str], holds: bool, text: str) -> Instruction | None:
    """ "Never call me Bob, call me Rob": not the first name, and the other one from now on."""
    name, other = match["name"], match["other"]
    if not all(_is_name(each, text) for each in (name, other) if each):
        return None
    if other is None:
        return Instruction(NICKNAME, name, holds)
    return Instruction(NICKNAME, other, True, ((f"{NICKNAME} {name}", "no"),)) if not holds else None


def _is_name(name: str, text: str) -> bool:
    """By capital letters, where the text has any besides its first."""
    if not _NO_NAMES.isdisjoint(name.split()) or len(name.split()) > 3:
        return False
    if not regex.search(r"\p{Lu}", text[1:]):
        return not regex.search(r"\p{Lu}", text)
    start = fold(text).find(f"me {name}")
    said = text[start + 3 : start + 3 + len(name)] if start >= 0 else name
    return all(not word[0].islower() for word in said.split())
