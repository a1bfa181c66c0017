"""What is read of each format: text, the headings above it, and where it stands."""

from __future__ import annotations

import contextlib
import random

import pytest

from memos_vllm.errors import DocumentError
from memos_vllm.memory.documents import charsets, formats
from memos_vllm.memory.documents.formats import HTML, MARKDOWN, PDF, TEXT
from tests.memory.document_factories import make_pdf, read, shown

GUIDE = """\
---
title: Guide
---
# Guide

Read *this* first, it
has two lines.

## Travel

1. passport
2. charger
   - usb

| city | price |
|---|---|
| Turin | 120 |

```python
x = 1

y = 2
```

## Nothing
## Hotels
Below [120](http://x.y/z) euros.
"""

PAGE = """\
<!doctype html><html><head><title>T</title><style>p {}</style></head><body>
<nav>Menu</nav><h1>Big <b>guide</b></h1>
<div>Some   text<br>of <i>two</i> lines<p>A paragraph.</p>and its tail</div>
<ul><li>usb<li>wall &amp; more</ul><script>alert(1)</script><p hidden>unseen</p>
<table><tr><th>city<th>price</tr><tr><td>Turin<td>120</tr></table>
<h2>Code</h2><pre>
if x:
    y
</pre></body></html>"""


def test_markdown_keeps_its_structure() -> None:
    assert shown(read(GUIDE, MARKDOWN)) == [
        ("", "title: Guide"),
        ("Guide", "Read *this* first, it has two lines."),
        ("Guide > Travel", "1. passport"),
        ("Guide > Travel", "2. charger"),
        ("Guide > Travel", "- usb"),
        ("Guide > Travel", "city | price"),
        ("Guide > Travel", "Turin | 120"),
        ("Guide > Travel", "x = 1\n\ny = 2"),
        ("Guide", "Nothing"),
        ("Guide > Hotels", "Below [120](http://x.y/z) euros."),
    ]


def test_deep_lists_of_markdown_are_read() -> None:
    text = "\n".join("  " * level + f"- item {level}" for level in range(40))
    assert [text for _, text in shown(read(text, MARKDOWN))] == [f"- item {level}" for level in range(40)]


def test_offsets_of_markdown_are_those_of_the_file() -> None:
    blocks = {block.text: block for block in read(GUIDE, MARKDOWN)}
    assert GUIDE[blocks["1. passport"].offset :].startswith("1. passport")
    assert GUIDE[blocks["Below [120](http://x.y/z) euros."].offset :].startswith("Below")
    assert GUIDE[blocks["title: Guide"].offset :].startswith("title")


def test_html_is_what_a_reader_sees() -> None:
    assert shown(read(PAGE, HTML)) == [
        ("Big guide", "Some text\nof two lines"),
        ("Big guide", "A paragraph."),
        ("Big guide", "and its tail"),
        ("Big guide", "- usb"),
        ("Big guide", "- wall & more"),
        ("Big guide", "city | price"),
        ("Big guide", "Turin | 120"),
        ("Big guide > Code", "if x:\n    y"),
    ]


def test_of_a_page_with_a_main_part_that_alone() -> None:
    page = "<body><div>Subscribe!</div><main><p>It matters.</p></main><footer>(c)</footer></body>"
    assert shown(read(page, HTML)) == [("", "It matters.")]


def test_html_says_its_charset_itself() -> None:
    page = '<html><head><meta charset="windows-1252"></head><body><p>Café</p></body></html>'
    assert shown(read(page.encode("windows-1252"), HTML)) == [("", "Café")]
    assert shown(read("<p>Café</p>".encode("latin-1"), HTML, "latin-1")) == [("", "Café")]


def test_a_page_may_be_nested_deeply_but_not_without_end() -> None:
    assert shown(read("<div>" * 2000 + "deep", HTML)) == [("", "deep")]
    with pytest.raises(DocumentError, match="Excessive depth"):
        read("<div>" * 20_000 + "deep", HTML)


def test_text_has_paragraphs() -> None:
    text = "First line\nwrapped.\r\n\r\nThings:\n- one\n- two\n\n\n    code\n      more\n"
    assert shown(read(text, TEXT)) == [
        ("", "First line wrapped."),
        ("", "Things:\n- one\n- two"),
        ("", "    code\n      more"),
    ]


class TestPdf:
    def test_pages_and_bookmarks(self) -> None:
        pages = [
            ["Travel", "We go by train, since trains are", "comfor-", "table.", "- by night"],
            ["Continued.", "Hotels", "Below 120 euros."],
            ["Prices are", "in euros."],
        ]
        blocks = read(make_pdf(pages, [("Travel", 0), ("Hotels", 1), ("Appendix", 2)]), PDF)
        assert [(block.page, *each) for block, each in zip(blocks, shown(blocks), strict=True)] == [
            (1, "Travel", "We go by train, since trains are comfortable."),
            (1, "Travel", "- by night"),
            (2, "Travel", "Continued."),
            (2, "Hotels", "Below 120 euros."),
            (3, "Appendix", "Prices are in euros."),
        ]

    def test_that_asks_for_no_password_is_read(self) -> None:
        assert shown(read(make_pdf([["Open."]], password=""), PDF)) == [("", "Open.")]

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (make_pdf([["Secret."]], password="secret"), "encrypted"),
            (b"no pdf at all", "damaged or none"),
            (make_pdf([["Some text."]])[:200], "damaged"),
            (make_pdf([["Some text."]]).replace(b"/Kids", b"/Kith"), "damaged"),
            (make_pdf([[]]), "OCR"),
        ],
        ids=("encrypted", "garbage", "torn", "without pages", "scanned"),
    )
    def test_that_cannot_be_read_says_why(self, data: bytes, words: str) -> None:
        with pytest.raises(DocumentError, match=words) as caught:
            read(data, PDF)
        assert "\n" not in str(caught.value) and caught.value.status == 400


@pytest.mark.parametrize(
    ("declared", "name", "expected"),
    [
        ("text/markdown; charset=latin-1", "x", (MARKDOWN, "latin-1")),
        ("TEXT/HTML", "x.txt", (HTML, None)),
        ("application/octet-stream", "x.PDF", (PDF, None)),
        (None, "notes.md", (MARKDOWN, None)),
        ("application/x-www-form-urlencoded", "a.b/x.txt", (TEXT, None)),
    ],
)
def test_the_type_is_what_is_declared_else_the_suffix(declared: str | None, name: str, expected: object) -> None:
    assert formats.content_type(declared, name) == expected


@pytest.mark.parametrize(("declared", "name"), [("image/png", "x.txt"), (None, "x.docx"), ("", "x"), ("x", "x")])
def test_an_unknown_type_is_refused(declared: str | None, name: str) -> None:
    with pytest.raises(DocumentError, match="text/markdown") as caught:
        formats.content_type(declared, name)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("data", "type", "charset", "words"),
    [
        (b"", TEXT, None, "empty"),
        (b" \n\t", PDF, None, "empty"),
        (b"<html><body><script>x</script></body></html>", HTML, None, "no text"),
        (b"\xff\xfa", TEXT, None, "not utf-8: byte 0"),
        (b"a\0b", MARKDOWN, None, "NUL"),
        (b"a", TEXT, "klingon", "charset"),
        (b"a", HTML, "klingon", "charset"),
        *(
            (b"a", TEXT, each, "charset")
            for each in ("undefined", "punycode", "idna", "utf-7", "hex", "a\0b", "\ud800")
        ),
    ],
)
def test_what_is_no_text_is_refused(data: bytes, type: str, charset: str | None, words: str) -> None:
    with pytest.raises(DocumentError, match=words):
        read(data, type, charset)


@pytest.mark.parametrize("charset", sorted(charsets.NAMES))
def test_any_bytes_are_text_of_a_charset_or_refused(charset: str) -> None:
    assert charsets.decode("plain".encode(charset), charset) == "plain"
    rng = random.Random(0)
    for length in range(64):
        with contextlib.suppress(DocumentError):
            assert isinstance(charsets.decode(rng.randbytes(length), charset), str)
