"""Which formats are read, and how a document's is told."""

from __future__ import annotations

from collections.abc import Iterable
from email.message import Message
from pathlib import PurePath

from memos_vllm.errors import DocumentError
from memos_vllm.memory.documents import charsets, html, markdown, pdf, plain
from memos_vllm.memory.documents.blocks import Block, clean

TEXT, MARKDOWN, HTML, PDF = "text/plain", "text/markdown", "text/html", "application/pdf"
_TYPES = {
    TEXT: TEXT, MARKDOWN: MARKDOWN, "text/x-markdown": MARKDOWN, HTML: HTML, "application/xhtml+xml": HTML, PDF: PDF,
}  # fmt: skip
SUFFIXES = {
    ".txt": TEXT, ".text": TEXT, ".md": MARKDOWN, ".markdown": MARKDOWN, ".html": HTML, ".htm": HTML, ".xhtml": HTML,
    ".pdf": PDF,
}  # fmt: skip
_SAYS_NOTHING = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})
"""What clients send that were not told a type; the name's suffix then tells."""


def content_type(declared: str | None, name: str) -> tuple[str, str | None]:
    """The type of a document, and its charset where that is said.

    Raises:
        DocumentError: it is none that can be read; 415.
    """
    header = Message()
    header["content-type"] = declared or ""
    said = (declared or "").partition(";")[0].strip().lower()
    found = SUFFIXES.get(PurePath(name).suffix.lower()) if said in _SAYS_NOTHING else _TYPES.get(said)
    if found is None:
        types = ", ".join(dict.fromkeys(_TYPES.values()))
        raise DocumentError(
            f"cannot read {name!r} ({said or 'no content type'}); send {types} as the content type, "
            f"or a name that ends in {', '.join(SUFFIXES)}",
            status=415,
        )
    charset = header.get_content_charset()
    return found, charset


def read(data: bytes, type: str, charset: str | None) -> list[Block]:
    """The blocks of a document, at least one. ``isolated`` runs it where data could make it costly.

    Raises:
        DocumentError: it is damaged, encrypted, in another encoding than it says, or has no text.
    """
    if not data.strip():
        raise DocumentError("the document is empty")
    blocks = list(_blocks(data, type, charset))
    if not blocks:
        hint = "; of a scanned PDF, make its text with OCR first" if type == PDF else ""
        raise DocumentError(f"the document has no text{hint}")
    return blocks


def _blocks(data: bytes, type: str, charset: str | None) -> Iterable[Block]:
    if type == PDF:
        return pdf.read(data)
    if type == HTML:
        return html.read(_text(data, charset).encode() if charset else data)
    return (markdown if type == MARKDOWN else plain).read(clean(_text(data, charset)))


def _text(data: bytes, charset: str | None) -> str:
    text = charsets.decode(data, charset)
    if "\0" in text:
        raise DocumentError("the text has NUL bytes, so it is none; send the document in its own content type")
    return text
