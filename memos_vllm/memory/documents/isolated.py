"""Reading a PDF in a process of its own, with bounds on its memory and time."""

from __future__ import annotations

import json
import subprocess
import sys

from memos_vllm.errors import DocumentError
from memos_vllm.memory.documents.blocks import Block

MAX_MEMORY_BYTES = 2 * 2**30
_MODULE = "memos_vllm.memory.documents.pdf"


def read_pdf(data: bytes, timeout_s: float) -> list[Block]:
    """
    Raises:
        DocumentError: see ``pdf.read``; or it takes too long, or more than ``MAX_MEMORY_BYTES``.
    """
    command = [sys.executable, "-m", _MODULE, str(MAX_MEMORY_BYTES), str(int(timeout_s) + 1)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise DocumentError(f"the PDF could not be read within {timeout_s:g} s; split it", status=413) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise DocumentError(f"the PDF could not be read: {' '.join(said) or done.returncode}") from error
    if "error" in answer:
        raise DocumentError(answer["error"], status=answer["status"])
    return [Block(text, tuple(path), offset, page) for text, path, offset, page in answer["blocks"]]
