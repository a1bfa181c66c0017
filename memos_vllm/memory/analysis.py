"""Text into the terms that are indexed and searched.

Unicode words, folded (NFKC, case). Words of ASCII letters are stemmed with the Snowball English
stemmer (Porter 2), word by word, so that a text in two languages and a query in one agree. Scripts
that write without spaces become pairs of characters, and single characters for one-character queries.
"""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import regex
import snowballstemmer

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー々"
_TOKEN = regex.compile(
    rf"(?P<unspaced>[{_UNSPACED}][{_UNSPACED}\p{{M}}]*)|(?:(?![{_UNSPACED}])[\p{{L}}\p{{N}}\p{{M}}_'])+"
)

STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
    it its itself they them their theirs themselves what which who whom this that these those am is are was were be
    been being have has had having do does did doing would should could ought i'm you're he's she's it's we're they're
    i've you've we've they've i'd you'd he'd she'd we'd they'd i'll you'll he'll she'll we'll they'll isn't aren't
    wasn't weren't hasn't haven't hadn't doesn't don't didn't won't wouldn't shan't shouldn't can't cannot couldn't
    mustn't let's that's who's what's here's there's when's where's why's how's a an the and but if or because as
    until while of at by for with about against between into through during before after above below to from up down
    in out on off over under again further then once here there when where why how all any both each few more most
    other some such no nor not only own same so than too very can will""".split()
)
"""Snowball's English list; such words match everything and mean nothing here."""

_stemmer = snowballstemmer.stemmer("english")
_stemmer_lock = threading.Lock()


def terms(text: str) -> Iterator[str]:
    """What to index of a text, with repeats."""
    for token, is_unspaced in _tokens(text):
        if not is_unspaced:
            yield token
        else:
            yield from token
            yield from _pairs(token)


def query_terms(text: str) -> list[str]:
    """What to look for, without repeats: as ``terms``, but no single characters where there are pairs."""
    found: dict[str, None] = {}
    for token, is_unspaced in _tokens(text):
        found.update(dict.fromkeys(_pairs(token) if is_unspaced and len(token) > 1 else [token]))
    return list(found)


def _tokens(text: str) -> Iterator[tuple[str, bool]]:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("’", "'")
    for match in _TOKEN.finditer(folded):
        if match["unspaced"]:
            yield match[0], True
        elif (word := match[0].strip("'_")) and word not in STOP_WORDS:
            yield (_stem(word) if word.isascii() else word), False


def _pairs(token: str) -> Iterator[str]:
    return (token[i : i + 2] for i in range(len(token) - 1))


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    if len(word) > 40:  # no word: a hash, base64
        return word
    with _stemmer_lock:  # the stemmer keeps its state on itself
        return str(_stemmer.stemWord(word))
