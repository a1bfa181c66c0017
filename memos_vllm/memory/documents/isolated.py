"""Reading and cutting a document in a process of its own, with bounds on its memory and time.

    python -m memos_vllm.memory.documents.isolated '["application/pdf", null, 120, 10000, 60]' < file.pdf

writes the pieces as JSON. A PDF is a program of a kind, and Markdown may take a time that grows with the square of
its length: what is made to harm must cost its sender a refusal, and not the server its memory or its threads.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from dataclasses import astuple, dataclass
from typing import Any

from memos_vllm.errors import DocumentError
from memos_vllm.memory.documents import formats, pieces
from memos_vllm.memory.documents.formats import HTML, MARKDOWN, TEXT
from memos_vllm.memory.documents.pieces import Piece

MAX_MEMORY_BYTES = 2 * 2**30

IN_PLACE_BYTES = {TEXT: 64 * 2**10, HTML: 16 * 2**10, MARKDOWN: 2 * 2**10}
"""Documents up to this size are read here: the worst that was found of each takes 0.16, 0.06 and 0.11 s, and a
process takes about 0.2 s to start (measured on a shared x86-64 core, Python 3.11)."""


@dataclass(frozen=True, slots=True)
class Limits:
    piece_words: int
    max_pieces: int
    timeout_s: float


def pieces_of(data: bytes, type: str, charset: str | None, limits: Limits) -> list[Piece]:
    """
    Raises:
        DocumentError: see ``formats.read``; or it has more pieces than are taken, or takes too long to be read, or
            more than ``MAX_MEMORY_BYTES``.
    """
    if len(data) <= IN_PLACE_BYTES.get(type, 0):
        return _cut(data, type, charset, limits)
    given = json.dumps([type, charset, *astuple(limits)])
    command = [sys.executable, "-m", __name__, given]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=limits.timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise DocumentError(
            f"the document could not be read within {limits.timeout_s:g} s; split it", status=413
        ) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise DocumentError(f"the document could not be read: {' '.join(said) or done.returncode}") from error
    if "error" in answer:
        raise DocumentError(answer["error"], status=answer["status"])
    return [Piece(text, tuple(path), offset, page) for text, path, offset, page in answer["pieces"]]


def _cut(data: bytes, type: str, charset: str | None, limits: Limits) -> list[Piece]:
    found = pieces.cut(formats.read(data, type, charset), limits.piece_words)
    if len(found) > limits.max_pieces:
        raise DocumentError(
            f"the document has {len(found)} pieces, at most {limits.max_pieces} are taken; split it", status=413
        )
    return found


def main(given: str) -> None:
    type, charset, *rest = json.loads(given)
    limits = Limits(*rest)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limits.timeout_s) + 1,) * 2)  # should nobody wait for it any more
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        answer: dict[str, Any] = {
            "pieces": [astuple(piece) for piece in _cut(sys.stdin.buffer.read(), type, charset, limits)]
        }
    except DocumentError as error:
        answer = {"error": str(error), "status": error.status}
    except MemoryError:
        answer = {
            "error": f"the document takes more than {MAX_MEMORY_BYTES >> 30} GiB to read; split it",
            "status": 413,
        }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
