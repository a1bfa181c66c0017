"""A trace of requests: reading it, and which conversation each request belongs to.

The format is Mooncake's: one JSON object per line with ``timestamp`` in ms, ``input_length``,
``output_length`` and ``hash_ids``, one id per block; equal ids stand for equal prefixes.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512


class TraceError(Exception):
    """The trace cannot be read."""


@dataclass(frozen=True, slots=True)
class Request:
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """From the first on; a block stands for the whole prefix up to it. The last one may be partial."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A request and where it stands.

    The trace names no users. A request continues a conversation if it has that conversation's blocks,
    except perhaps the last, partial one, and if no other conversation has them too. All else starts a new one.
    """

    request: Request
    conversation: int
    number: int
    """From 1 on."""
    new_tokens: int
    num_reusable: int
    """Blocks, from the first on, that an earlier request had."""
    branch: int | None
    """It starts a new conversation behind this block, which others have too; None otherwise."""
    hinted: int | None
    """The conversation that an application would name while the user types this: the one it continues or
    branches off, as it was before. None where there is none."""


def read(path: str | os.PathLike[str]) -> list[Request]:
    """The requests in the order of their arrival.

    Raises:
        TraceError: no such file, or not this format.
    """
    source = Path(path)
    opener = lzma.open if source.suffix == ".xz" else open
    requests = []
    try:
        with opener(source, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    requests.append(_request(line, source, number))
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read the trace {source}: {error}") from error
    if not requests:
        raise TraceError(f"the trace {source} has no requests")
    requests.sort(key=lambda request: request.arrival_s)
    return rekeyed(requests)


def _request(line: str, source: Path, number: int) -> Request:
    try:
        row = json.loads(line)
        blocks = tuple(int(each) for each in row["hash_ids"])
        return Request(float(row["timestamp"]) / 1000.0, int(row["input_length"]), int(row["output_length"]), blocks)
    except (ValueError, KeyError, TypeError) as error:
        keys = "timestamp, input_length, output_length and hash_ids"
        raise TraceError(f"line {number} of {source} is no request with {keys}: {error!r}") from error


def rekeyed(requests: Sequence[Request]) -> list[Request]:
    """Blocks named by their whole prefix, also where a trace names them by their own content only."""
    names: dict[tuple[int, int], int] = {}
    out = []
    for request in requests:
        before, blocks = -1, []
        for block in request.blocks:
            before = names.setdefault((before, block), len(names))
            blocks.append(before)
        out.append(Request(request.arrival_s, request.prompt_tokens, request.output_tokens, tuple(blocks)))
    return out


def turns(requests: Sequence[Request]) -> list[Turn]:
    """Places each request, by what came before it only."""
    through: dict[int, int] = {}  # block -> conversations that have it
    ends: dict[int, int] = {}  # a conversation's last block and the one before -> conversation
    latest: dict[int, int] = {}  # block -> the last conversation that had it
    last: list[Request] = []  # of each conversation
    numbers: list[int] = []
    out = []
    for request in requests:
        blocks = request.blocks
        shared = 0
        while shared < len(blocks) and blocks[shared] in through:
            shared += 1
        behind = blocks[shared - 1] if shared else None
        conversation = ends.get(behind) if behind is not None and through[behind] == 1 else None
        branch = None
        if behind is not None and conversation is None:
            branch = behind
        hinted = conversation if behind is None or conversation is not None else latest[behind]
        if conversation is None:
            conversation = len(last)
            last.append(request)
            numbers.append(1)
            new_tokens = max(0, request.prompt_tokens - shared * BLOCK_TOKENS)
        else:
            before = last[conversation]
            new_tokens = max(0, request.prompt_tokens - before.prompt_tokens - before.output_tokens)
            for block in before.blocks:
                through[block] -= 1
            for block in before.blocks[-2:]:
                if ends.get(block) == conversation:
                    del ends[block]
            last[conversation] = request
            numbers[conversation] += 1
        for block in blocks:
            through[block] = through.get(block, 0) + 1
            latest[block] = conversation
        for block in blocks[-2:]:
            ends[block] = conversation
        out.append(Turn(request, conversation, numbers[conversation], new_tokens, shared, branch, hinted))
    return out
