"""Text into sentences: by rules, for any script, for what people type into a chat."""

from __future__ import annotations

from collections.abc import Iterator

import regex

_BULLET = regex.compile(r"\s*(?:[-*+•‣◦·–]|\(?\d{1,3}[.)])\s+")
_WRAPPED_LINE_CHARS = 60  # a line this long that ends in mid-sentence was wrapped by an editor

# "." only before a space, so that decimals, versions and addresses stay whole. The full stops of
# Chinese and Japanese need no space after them.
_END = regex.compile(r"(?:[.!?…]+|[।۔؟։])[\"'”’»)\]]*(?=\s|$)|[。！？｡]+[」』”’）\"']*")
_QUOTE = regex.compile(r"\"[^\"]*\"|“[^“”]*”|«[^«»]*»|「[^「」]*」|『[^『』]*』|\([^()]*\)|（[^（）]*）")

_NEAR_CHARS = 100
_STOPS = ".!?…।۔؟։。！？｡"

_TITLES = frozenset(
    "mr mrs ms mx dr prof st sr mt ft gen col capt sgt lt rev hon pres gov vs e.g i.e cf approx ca".split()
)
"""A name or a number follows: never the end."""

_BEFORE_NUMBERS = frozenset("no nos fig figs p pp vol ch sec art eq".split())
_MONTH = regex.compile(
    r"(?:januar|jänner|februar|märz|april|mai|juni|juli|august|september|oktober|november|dezember|december"
    r"|marts|maj|tammi|helmi|maalis|huhti|touko|kesä|heinä|elo|syys|loka|marras|joulu)(?:kuuta)?\b",
    regex.I,
)
"""Of languages that write a day with a full stop behind it: "am 3. Mai"."""

_SHORTENED = frozenset(
    "etc inc ltd co corp jr dept est al a.m p.m am pm u.s u.k e.u u.n d.c ph.d b.sc m.sc "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun ave blvd rd".split()
)
"""The end only before a capital letter."""


def split(text: str) -> list[str]:
    """The sentences of a text, in order, stripped, without bullets; nothing else is left out."""
    return [sentence for unit in _units(text) for sentence in of_line(unit)]


def _units(text: str) -> Iterator[str]:
    """Paragraphs and list items, each on one line; an item carries the line that introduces the list."""
    unit = introduction = ""
    last_line = ""
    for line in text.splitlines():
        bullet = _BULLET.match(line)
        content = (line[bullet.end() :] if bullet else line).strip()
        if content and not bullet and unit and _continues(last_line, content):
            unit = f"{unit} {content}"
        else:
            if unit:
                yield unit
            if bullet:
                unit = f"{introduction} {content}" if introduction and not _is_own(introduction, content) else content
            else:
                introduction = content if content.endswith((":", "：")) else introduction if not content else ""
                unit = "" if introduction else content
        last_line = line
    if unit:
        yield unit


def _is_own(introduction: str, item: str) -> bool:
    """Whether an item is a sentence on the user by itself: below "About me:", "I live in Oslo" needs no more."""
    return bool(_ABOUT_ME.search(introduction) and _IN_FIRST_PERSON.match(item))


_ABOUT_ME = regex.compile(r"\babout (?:me|myself|us)\b", regex.I)
_IN_FIRST_PERSON = regex.compile(r"(?:I|I['’](?:m|ve|d|ll)|[Mm]y|[Ww]e|[Oo]ur)\b")


def _continues(line: str, content: str) -> bool:
    """Whether ``content`` goes on with the sentence of the line before it."""
    if not line.strip():
        return False
    return content[0].islower() or (len(line) >= _WRAPPED_LINE_CHARS and not _END.search(line.rstrip()[-3:]))


def of_line(unit: str) -> Iterator[str]:
    """The sentences of one line, stripped."""
    quotes = [match.span() for match in _QUOTE.finditer(unit)]
    start, quote = 0, 0
    for match in _END.finditer(unit):
        while quote < len(quotes) and quotes[quote][1] <= match.end():
            quote += 1
        if quote < len(quotes) and quotes[quote][0] < match.end():
            continue
        # What is near tells, and looking at all of a long line each time would take its length squared.
        before = unit[max(start, match.start() - _NEAR_CHARS) : match.start()]
        if _ends_sentence(before, match[0], unit[match.end() : match.end() + _NEAR_CHARS].lstrip()):
            yield unit[start : match.end()].strip()
            start = match.end()
    if rest := unit[start:].strip():
        yield rest


def _ends_sentence(before: str, end: str, after: str) -> bool:
    if not after:
        return True
    goes_on = after[0].islower()
    if end[-1] not in _STOPS and goes_on:  # "... it is late," she said
        return False
    if end[0] in "。！？｡" and end[-1] not in _STOPS and after[0].isalpha():  # 「...。」と言った
        return False
    if end.startswith(("..", "…")):
        return not goes_on
    if end[0] != ".":
        return True
    word = regex.search(r"[\p{L}\p{N}.]*$", before)[0].lower()
    if word in _TITLES or (word in _BEFORE_NUMBERS and after[0].isdigit()):
        return False
    if word in _SHORTENED:
        return after[0].isupper()
    if word.isdecimal() and len(word) <= 2 and _MONTH.match(after):
        return False
    if len(word) == 1 and word.isalpha() and word != "i":  # an initial: J. Smith
        return False
    return not (word.isdigit() and before.strip() == word)  # "1." in a line of its own numbering
