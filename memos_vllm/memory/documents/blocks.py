"""What every format is read into: blocks of text, each under the headings above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_HEADING_CHARS = 200
"""A longer heading is taken as text; it would be repeated in every piece below it."""


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list item, table row or piece of code."""

    text: str
    path: tuple[str, ...]
    """Headings above it, outermost first."""

    offset: int
    """Characters from the start of the document's text to the block's."""

    page: int | None = None
    """From 1; only PDF has pages."""


class Outline:
    """The headings that are open at a place of a document. What they say is never lost: a heading under which
    nothing stands becomes a block of its own."""

    def __init__(self) -> None:
        self._open: list[_Heading] = []

    def enter(self, level: int, title: str, offset: int, page: int | None = None) -> Iterator[Block]:
        """A heading; yields the ones that it ends and under which nothing stood.

        Args:
            level: 1 and up; a heading ends all of its level or deeper.
        """
        yield from self._leave(level)
        title = " ".join(title.split())
        if len(title) > MAX_HEADING_CHARS:
            yield self.block(title, offset, page)
        elif title:
            self._open.append(_Heading(level, title, offset, page))

    def block(self, text: str, offset: int, page: int | None = None) -> Block:
        for heading in self._open:
            heading.is_empty = False
        return Block(text, tuple(heading.title for heading in self._open), offset, page)

    def end(self) -> Iterator[Block]:
        yield from self._leave(0)

    def _leave(self, level: int) -> Iterator[Block]:
        while self._open and self._open[-1].level >= level:
            heading = self._open.pop()
            if heading.is_empty:
                yield self.block(heading.title, heading.offset, heading.page)


@dataclass(slots=True)
class _Heading:
    level: int
    title: str
    offset: int
    page: int | None
    is_empty: bool = True


def clean(text: str) -> str:
    """Without what no store takes: NUL, halves of surrogate pairs, line ends of other systems."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-8", "replace").decode()
