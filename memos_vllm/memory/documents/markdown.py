"""Markdown (CommonMark and tables): what it says stays in its own notation, links and emphasis included."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import regex

from memos_vllm.memory.documents.blocks import Block, Outline

MAX_NESTING = 100
"""Lists and quotes deeper than that are passed over by the parser, whose own limit is 20."""

_FRONT_MATTER = regex.compile(r"---[ \t]*\n(.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", regex.S)


def read(text: str) -> Iterator[Block]:
    from markdown_it import MarkdownIt

    outline = Outline()
    if front := _FRONT_MATTER.match(text):
        yield outline.block(front[1].strip(), front.start(1))
        # The same number of characters and lines, so that places stay right.
        text = regex.sub(r"[^\n]", " ", front[0]) + text[front.end() :]
    starts = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
    cells: list[str] = []
    marker, level, offset = "", 0, 0
    for token in MarkdownIt("commonmark", {"maxNesting": MAX_NESTING}).enable("table").parse(text):
        if token.map:
            offset = starts[token.map[0]]
        if token.type == "heading_open":
            level = int(token.tag[1:])
        elif token.type == "list_item_open":
            marker = f"{token.info}{token.markup} " if token.info else "- "
        elif token.type == "tr_open":
            cells = []
        elif token.type in ("td_open", "th_open"):
            cells.append("")
        elif token.type == "tr_close":
            if any(cells):
                yield outline.block(" | ".join(cells), offset)
            cells = []
        elif token.type == "inline" and level:
            yield from outline.enter(level, token.content, offset)
            level = 0
        elif token.type == "inline" and cells:
            cells[-1] = token.content
        elif token.type in ("inline", "fence", "code_block", "html_block") and token.content.strip():
            content = token.content.replace("\n", " ") if token.type == "inline" else token.content.strip("\n")
            yield outline.block(marker + content, offset)
            marker = ""
    yield from outline.end()
