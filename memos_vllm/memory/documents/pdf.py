"""PDF: paragraphs of each page, under the bookmarks that lead to it."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import regex

from memos_vllm.errors import DocumentError
from memos_vllm.memory.documents.blocks import Block, Outline, clean

MAX_PAGES = 10_000
_BULLET = regex.compile(r"(?:[-*+•‣◦·–]|\(?\d{1,3}[.)])\s")
_ENDS = regex.compile(r"[.!?:。！？][\"'”’»)\]]*$")
_SHORT_LINE = 0.8
"""Of the page's longest line: a shorter one that ends a sentence ends a paragraph, as no blank line is kept."""


def read(data: bytes) -> Iterator[Block]:
    """
    Raises:
        DocumentError: it is no PDF, is damaged, or needs a password.
    """
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError("the PDF is encrypted; send it without its password")
        if not reader.pages:
            raise DocumentError("the PDF has no pages; it is damaged")
        if len(reader.pages) > MAX_PAGES:
            raise DocumentError(f"the PDF has more than {MAX_PAGES} pages; split it", status=413)
        yield from _blocks(reader)
    except DocumentError:
        raise
    except (PyPdfError, RecursionError, MemoryError) as error:
        raise DocumentError(f"the PDF cannot be read: {_reason(error)}; it is damaged or none") from error
    except Exception as error:  # pypdf meets damaged objects with whatever they cause: KeyError, TypeError, ...
        raise DocumentError(f"the PDF cannot be read: {_reason(error)}; it is damaged") from error


def _blocks(reader: Any) -> Iterator[Block]:
    outline, offset = Outline(), 0
    bookmarks = _bookmarks(reader)
    for number, page in enumerate(reader.pages, 1):
        lines = [line.strip() for line in clean(page.extract_text()).split("\n")]
        waiting = bookmarks[number]
        for level, title in [each for each in waiting if _folded(each[1]) not in map(_folded, lines)]:
            yield from outline.enter(level, title, offset, number)  # its heading is worded otherwise on the page
        headings = {_folded(title): (level, title) for level, title in waiting}
        for paragraph in _paragraphs(lines, headings):
            if heading := headings.pop(_folded(paragraph), None):
                yield from outline.enter(*heading, offset, number)
            else:
                yield outline.block(paragraph, offset, number)
            offset += len(paragraph) + 1
    yield from outline.end()


def _paragraphs(lines: list[str], headings: Iterable[str]) -> Iterator[str]:
    """Lines joined to paragraphs; a heading and a list item begin a new one."""
    longest = max(map(len, lines), default=0)
    paragraph = ""
    for line in lines:
        is_heading = _folded(line) in headings
        if paragraph and (not line or is_heading or _BULLET.match(line)):
            yield paragraph
            paragraph = ""
        if paragraph.endswith("-") and line[:1].islower():
            paragraph = paragraph[:-1] + line
        else:
            paragraph = f"{paragraph} {line}".strip()
        if paragraph and (is_heading or (len(line) < _SHORT_LINE * longest and _ENDS.search(line))):
            yield paragraph
            paragraph = ""
    if paragraph:
        yield paragraph


def _bookmarks(reader: Any) -> dict[int, list[tuple[int, str]]]:
    """Level and title of the bookmarks to each page, from page 1; a damaged one is passed over."""
    found: dict[int, list[tuple[int, str]]] = defaultdict(list)
    waiting = [(1, entry) for entry in reversed(reader.outline)]
    while waiting:
        level, entry = waiting.pop()
        if isinstance(entry, list):
            waiting += [(level + 1, each) for each in reversed(entry)]
            continue
        page = reader.get_destination_page_number(entry)
        if page is not None and page >= 0 and entry.title:
            found[page + 1].append((level, clean(str(entry.title))))
    return found


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
