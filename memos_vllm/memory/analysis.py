"""Text into the terms that are indexed and searched.

Words by Unicode's rules for word boundaries (UAX 29), folded (NFKC, case, no accents), less the commonest
function words of their language, stemmed by it (``languages``); scripts that write without spaces by
``segmentation``. Texts and queries take the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

import regex

from memos_vllm.memory import languages, segmentation
from memos_vllm.memory.normal_forms import normalised

_UNSPACED = segmentation.UNSPACED
_TOKEN = regex.compile(
    rf"(?w)(?P<unspaced>[{_UNSPACED}][{_UNSPACED}\p{{M}}]*)|\b(?![{_UNSPACED}])[\p{{L}}\p{{N}}_](?:(?![{_UNSPACED}])\S)*?\b"
)


def terms(text: str) -> Iterator[str]:
    """What to index of a text, with repeats."""
    runs, found = _analyse(text)
    yield from found
    for run in runs:
        if len(run) > 1:
            yield from segmentation.characters(run)


def query_terms(text: str) -> list[str]:
    """What to look for, without repeats."""
    return list(dict.fromkeys(_analyse(text)[1]))


def without_stop_words(text: str) -> str:
    """The text's own words, unstemmed, less those that ``terms`` leaves out; texts without spaces as they are."""
    found = [(match[0].strip("'_"), match["unspaced"] is not None) for match in _TOKEN.finditer(text.replace("’", "'"))]
    language = languages.of([word.casefold() for word, is_unspaced in found if not is_unspaced])
    return " ".join(
        word for word, is_unspaced in found if is_unspaced or not languages.is_stop_word(word.casefold(), language)
    )


def _analyse(text: str) -> tuple[list[str], list[str]]:
    """Unspaced runs, and all terms in their order."""
    folded = normalised("NFKC", normalised("NFKC", text).casefold()).replace("’", "'")
    tokens = [(match[0], match["unspaced"] is not None) for match in _TOKEN.finditer(folded)]
    language = languages.of([token for token, is_unspaced in tokens if not is_unspaced])
    japanese = segmentation.is_japanese(folded)
    runs: list[str] = []
    found: list[str] = []
    for token, is_unspaced in tokens:
        if is_unspaced:
            runs.append(token)
            found += segmentation.words(token, japanese)
        elif (word := token.strip("'_")) and not languages.is_stop_word(word, language):
            found += languages.stems(word, language)
    return runs, found
