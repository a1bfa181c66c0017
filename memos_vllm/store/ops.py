"""What the scheduler side tells the worker side to do, and the answer: plain, picklable data.

Operations are not ordered among each other. An operation that needs the outcome of another (a Write
of slots that a Save fills) is submitted after that one's Result has come from every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from memos_vllm.types import BlockKey


@dataclass(frozen=True)
class Save:
    """GPU blocks to host slots."""

    op_id: int
    block_ids: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """Host slots to GPU blocks."""

    op_id: int
    slots: tuple[int, ...]
    block_ids: tuple[int, ...]
    prefetch: bool = False
    """No request waits for it: goes behind those that one waits for."""
    in_groups: bool = False
    """Its request may run when the first layers are there (``layered_load``), where the worker can do that."""


@dataclass(frozen=True)
class Write:
    """Host slots to a new file. ``path`` contains ``{rank}``."""

    op_id: int
    chunk: str
    path: str
    slots: tuple[int, ...]
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True)
class Read:
    """Blocks of a file to GPU blocks, and into host slots where given. ``path`` contains ``{rank}``."""

    op_id: int
    chunk: str
    path: str
    positions: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    block_ids: tuple[int, ...]
    slots: tuple[int, ...] | None
    prefetch: bool = False
    """As in ``Load``."""


Op = Save | Load | Write | Read


@dataclass(frozen=True)
class Result:
    """The end of an operation on one rank: no thread touches its blocks, slots or file any more."""

    op_id: int
    ok: bool
    error: str | None
    failed_blocks: tuple[int, ...]
    """GPU blocks of a Load or Read that did not get their KV; vLLM recomputes them."""
    nbytes: int
    """Bytes that were moved, of pieces that finished."""
    seconds: float
    """From the first piece's start to the end; pieces of operations that overtook it are inside."""
    corrupt: bool = False
    """The file itself is damaged, foreign or gone; otherwise this attempt failed and another may not."""
    checksum_failed: bool = False
    """It is damaged in that a block's checksum does not match."""
    no_space: bool = False
    """It could not be written, since the disk is full."""
    unreadable: bool = False
    """The file system refused to read it; perhaps it will the next time."""


def path_for_rank(path: str, rank: int) -> str:
    """The file of one rank. Not ``str.format``: a directory may have braces in its name."""
    return path.replace("{rank}", str(rank))
