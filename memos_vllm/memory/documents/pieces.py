"""Cutting a document along its structure into pieces that are worth finding on their own.

A paragraph is a piece. Short ones (list items, table rows, single lines) are joined with their neighbours
under the same heading; a long one always stands alone, so that a change somewhere moves no boundary beyond
the next long paragraph, heading or page, and everything else keeps its id. One that is too long is cut at lines,
else at sentences, else at words. Every piece begins with the headings above it: it is read without the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import regex

from memos_vllm.memory import sentences
from memos_vllm.memory.documents.blocks import Block
from memos_vllm.memory.segmentation import UNSPACED

VERSION = 1
"""Of these rules and of how formats are read; another one reads the folders of sources again."""

SHORT_SHARE = 4
"""A block of fewer words than one of this many of the limit is short."""

_WORD = regex.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]{{1,16}}")
"""A letter of a script without spaces counts as a word, and so do 16 characters in a row."""

_MAX_SENTENCE_SCAN_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    """With the headings above it as its first line."""

    path: tuple[str, ...]
    offset: int
    page: int | None


def cut(blocks: Iterable[Block], max_words: int) -> list[Piece]:
    """The pieces in their order, each of at most ``max_words`` words; headings take up to half of them."""
    pieces: list[Piece] = []
    joined: list[Block] = []
    num_words = 0
    for block in _short_enough(blocks, max_words):
        words = count_words(block.text)
        is_long = words * SHORT_SHARE >= max_words
        if joined and (is_long or num_words + words > _room(block, max_words) or not _stand_together(joined[0], block)):
            pieces.append(_piece(joined, max_words))
            joined, num_words = [], 0
        joined.append(block)
        num_words += words
        if is_long:
            pieces.append(_piece(joined, max_words))
            joined, num_words = [], 0
    if joined:
        pieces.append(_piece(joined, max_words))
    return pieces


def count_words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _stand_together(one: Block, other: Block) -> bool:
    return (one.path, one.page) == (other.path, other.page)


def _piece(blocks: list[Block], max_words: int) -> Piece:
    first = blocks[0]
    body = "\n".join(block.text for block in blocks) if len(blocks) > 1 else first.text.removeprefix("- ")
    heading = _heading(first.path, max_words)
    return Piece(f"{heading}\n{body}" if heading else body, first.path, first.offset, first.page)


def _heading(path: tuple[str, ...], max_words: int) -> str:
    """The innermost headings that half of a piece has room for."""
    kept = list(path)
    while kept and count_words(" > ".join(kept)) > max_words // 2:
        kept.pop(0)
    return " > ".join(kept)


def _room(block: Block, max_words: int) -> int:
    return max_words - count_words(_heading(block.path, max_words))


def _short_enough(blocks: Iterable[Block], max_words: int) -> Iterator[Block]:
    for block in blocks:
        for start, text in _parts(block.text, _room(block, max_words)):
            yield Block(text, block.path, block.offset + start, block.page)


def _parts(text: str, max_words: int) -> Iterator[tuple[int, str]]:
    """The text in parts of at most ``max_words``, each with its place."""
    if count_words(text) <= max_words:
        yield 0, text
        return
    units = _units(text)
    if len(units) == 1:
        yield from _at_words(text, max_words)
        return
    start, end, num_words = 0, 0, 0
    for place, unit in units:
        words = count_words(unit)
        if num_words and num_words + words > max_words:
            yield start, text[start:end]
            num_words = 0
        if words > max_words:
            yield from ((place + inner, part) for inner, part in _parts(unit, max_words))
            continue
        start = place if not num_words else start
        end, num_words = place + len(unit), num_words + words
    if num_words:
        yield start, text[start:end]


def _units(text: str) -> list[tuple[int, str]]:
    """Lines; of a single line its sentences."""
    if "\n" in text:
        return [(match.start(), match[0]) for match in regex.finditer(r"[^\n]*\S[^\n]*", text)]
    found, at = [], 0
    if len(text) > _MAX_SENTENCE_SCAN_CHARS:  # the rules for sentences look at all quotes of a text at once
        while at < len(text):
            end = at + _MAX_SENTENCE_SCAN_CHARS
            if end < len(text) and (space := text.rfind(" ", at + 1, end)) > 0:
                end = space
            found.append((at, text[at:end]))
            at = end
        return found
    for sentence in sentences.of_line(text):
        at = text.index(sentence, at)
        found.append((at, sentence))
        at += len(sentence)
    return found


def _at_words(text: str, max_words: int) -> Iterator[tuple[int, str]]:
    words = list(_WORD.finditer(text))
    for first in range(0, len(words), max_words):
        start, end = words[first].start(), words[min(first + max_words, len(words)) - 1].end()
        yield start, text[start:end]
