"""Small documents, and folders of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from memos_vllm.memory.documents import formats
from memos_vllm.memory.documents.blocks import Block

LONG = "with so many words that it stands alone among the others and is not joined to any of them because it is long"


def paragraph(subject: str) -> str:
    return f"The {subject} is described in this paragraph {LONG}, as every paragraph here is about something else."


def markdown(*subjects: str, heading: str = "Guide") -> bytes:
    return "\n\n".join([f"# {heading}", *map(paragraph, subjects)]).encode()


def make_pdf(
    pages: Sequence[Sequence[str]], bookmarks: Sequence[tuple[str, int]] = (), password: str | None = None
) -> bytes:
    """Lines in Helvetica; bookmarks name a page from 0; a password of "" asks nothing of a reader."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    font = DictionaryObject({
        NameObject("/Type"): NameObject("/Font"),
        NameObject("/Subtype"): NameObject("/Type1"),
        NameObject("/BaseFont"): NameObject("/Helvetica"),
    })  # fmt: skip
    for lines in pages:
        page = writer.add_blank_page(612, 792)
        shown = " ".join(f"({line}) Tj T*" for line in lines)
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 14 TL 72 720 Td {shown} ET".encode("latin-1"))
        page[NameObject("/Contents")] = writer._add_object(stream)
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    for title, number in bookmarks:
        writer.add_outline_item(title=title, page_number=number)
    if password is not None:
        writer.encrypt(password, "owner", algorithm="AES-256")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def read(text: str | bytes, type: str, charset: str | None = None) -> list[Block]:
    return formats.read(text.encode() if isinstance(text, str) else text, type, charset)


def shown(blocks: Sequence[Any]) -> list[tuple[str, str]]:
    """Headings and text of each."""
    return [(" > ".join(block.path), block.text) for block in blocks]
