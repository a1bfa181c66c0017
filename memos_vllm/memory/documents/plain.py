"""Plain text: paragraphs between blank lines."""

from __future__ import annotations

from collections.abc import Iterator

import regex

from memos_vllm.memory.documents.blocks import Block

_PARAGRAPH = regex.compile(r"[^\n]*\S[^\n]*(?:\n[^\n]*\S[^\n]*)*")
_KEEPS_LINES = regex.compile(r"^(?:\s|[-*+•‣◦·–]\s|\(?\d{1,3}[.)]\s)|\t", regex.M)


def read(text: str) -> Iterator[Block]:
    """Lines that were wrapped are joined; lists and what is indented keep their lines."""
    for match in _PARAGRAPH.finditer(text):
        lines = match[0].rstrip()
        paragraph = lines if _KEEPS_LINES.search(lines) else lines.replace("\n", " ")
        yield Block(paragraph.strip("\n"), (), match.start())
