"""HTML: the text that a reader sees, less navigation; of a page with a ``main`` element that alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import regex

from memos_vllm.errors import DocumentError
from memos_vllm.memory.documents.blocks import Block, Outline, clean

_SKIPPED = frozenset("head script style template noscript svg math iframe object nav button select datalist".split())
_BLOCKS = frozenset(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form header hgroup hr html legend li main ol p pre section summary table tbody tfoot thead tr ul "
    "h1 h2 h3 h4 h5 h6".split()
)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_SPACE = regex.compile(r"\s+")


def read(data: bytes) -> Iterator[Block]:
    """
    Args:
        data: in UTF-8, or in the charset that the page itself names.

    Raises:
        DocumentError: it is nested beyond the parser's limit of 2,048 elements, or cannot be read at all.
    """
    from lxml import etree

    charset = "utf-8" if _is_utf8(data) else None
    parser = etree.HTMLParser(encoding=charset, remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        root = etree.fromstring(data, parser)
    except (etree.ParseError, ValueError) as error:
        raise DocumentError(f"the HTML cannot be read: {error}") from error
    for problem in parser.error_log:
        if problem.type_name == "ERR_RESOURCE_LIMIT":  # what follows would be lost in silence
            raise DocumentError(f"the HTML cannot be read whole: {problem.message}")
    if root is None:
        return iter(())
    main = root.findall(".//main")
    return _Reader().read(main[0] if len(main) == 1 else root)


class _Reader:
    """Walks without recursion: pages may be nested deeply."""

    def __init__(self) -> None:
        self._outline = Outline()
        self._text: list[str] = []
        self._marker = ""
        self._in_pre = 0
        self._offset = 0

    def read(self, root: Any) -> Iterator[Block]:
        waiting: list[tuple[Any, bool]] = [(root, False)]
        while waiting:
            element, is_closing = waiting.pop()
            if is_closing:
                yield from self._close(element)
            elif isinstance(element.tag, str) and element.tag not in _SKIPPED and element.get("hidden") is None:
                yield from self._open(element)
                waiting.append((element, True))
                waiting += [(child, False) for child in reversed(element)]
                continue
            if element is not root:
                self._say(element.tail)
        yield from self._flush()
        yield from self._outline.end()

    def _open(self, element: Any) -> Iterator[Block]:
        if element.tag in _BLOCKS:
            yield from self._flush()
        if element.tag == "li":
            self._marker = "- "
        elif element.tag == "br":
            self._text.append("\n")
        elif element.tag in ("td", "th") and "".join(self._text).strip():
            self._text.append(" | ")
        elif element.tag == "img":
            self._say(element.get("alt"))
        self._in_pre += element.tag == "pre"
        self._say(element.text)

    def _close(self, element: Any) -> Iterator[Block]:
        if level := _HEADINGS.get(element.tag):
            title = " ".join("".join(self._text).split())
            self._text.clear()
            yield from self._outline.enter(level, clean(title), self._offset)
            self._offset += len(title) + 1
        elif element.tag in _BLOCKS:
            yield from self._flush()
        self._in_pre -= element.tag == "pre"

    def _say(self, text: str | None) -> None:
        if text:
            self._text.append(text if self._in_pre else _SPACE.sub(" ", text))

    def _flush(self) -> Iterator[Block]:
        text = "".join(self._text)
        self._text.clear()
        if not self._in_pre:
            text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
        if text := clean(text).strip("\n" if self._in_pre else None):
            yield self._outline.block(self._marker + text, self._offset)
            self._offset += len(text) + 1
            self._marker = ""


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
