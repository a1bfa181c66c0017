"""Reading a document in a process of its own: when, with which result, and with which end."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from memos_vllm.errors import DocumentError
from memos_vllm.memory.documents import formats, isolated, pieces
from memos_vllm.memory.documents.formats import HTML, MARKDOWN, PDF, TEXT
from memos_vllm.memory.documents.isolated import IN_PLACE_BYTES, Limits
from tests.memory.document_factories import make_pdf, markdown, paragraph

LIMITS = Limits(piece_words=60, max_pieces=500, timeout_s=60)
LARGE = {
    TEXT: "\n\n".join(paragraph(f"café {number}") for number in range(400)).encode("utf-16"),
    MARKDOWN: markdown(*(f"café {number}" for number in range(30))),
    HTML: b"".join(b"<h2>%d</h2><p>Room %d costs 120 euros.</p>" % (number, number) for number in range(450)),
    PDF: make_pdf([["Rooms cost 120 euros."], ["Rooms are large."]], [("Rooms", 0)]),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The content types for which a process was started."""
    types: list[str] = []
    run = subprocess.run

    def count(command: Sequence[str], **options: Any) -> Any:
        types.append(command[-1].split('"')[1])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", count)
    return types


@pytest.mark.parametrize("type", LARGE)
def test_a_process_cuts_as_this_one_would(started: list[str], type: str) -> None:
    charset = "utf-16" if type == TEXT else None
    found = isolated.pieces_of(LARGE[type], type, charset, LIMITS)
    assert found == pieces.cut(formats.read(LARGE[type], type, charset), LIMITS.piece_words)
    assert started == [type]


def test_only_a_small_document_is_read_here(started: list[str]) -> None:
    for type, size in IN_PLACE_BYTES.items():
        isolated.pieces_of(b"a" * size, type, None, LIMITS)
    assert started == []
    for type, size in IN_PLACE_BYTES.items():
        isolated.pieces_of(b"a" * (size + 1), type, None, LIMITS)
    assert started == list(IN_PLACE_BYTES)


@pytest.mark.parametrize(("data", "type"), [(make_pdf([["Slow."]]), PDF), (b"[" * 400_000, MARKDOWN)])
def test_what_takes_too_long_is_given_up(data: bytes, type: str) -> None:
    timeout_s = 0.001 if type == PDF else 1.0
    with pytest.raises(DocumentError, match=f"within {timeout_s:g} s") as caught:
        isolated.pieces_of(data, type, None, Limits(60, 500, timeout_s))
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("data", "type", "charset", "words", "status"),
    [
        (make_pdf([["Secret."]], password="secret"), PDF, None, "encrypted", 400),
        (b"a" * 100_000, TEXT, "klingon", "charset", 400),
        (b"\xff" * 100_000, TEXT, "utf-8", "not utf-8: byte 0", 400),
        (
            b"".join(b"# %d\n\nb\n\n" % number for number in range(1000)),
            MARKDOWN,
            None,
            "1000 pieces, at most 500",
            413,
        ),
    ],
)
def test_a_refusal_comes_back(data: bytes, type: str, charset: str | None, words: str, status: int) -> None:
    with pytest.raises(DocumentError, match=words) as caught:
        isolated.pieces_of(data, type, charset, LIMITS)
    assert caught.value.status == status
