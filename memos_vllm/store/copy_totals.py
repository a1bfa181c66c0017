"""What copies moved and how long they took, by path and purpose, and what became of the blocks."""

from __future__ import annotations

from dataclasses import dataclass

from memos_vllm.store.ops import Load, Op, Read, Save

Route = tuple[str, str]
"""Path and purpose of a copy."""

ROUTES: tuple[Route, ...] = (
    ("host_to_gpu", "request"),
    ("host_to_gpu", "prefetch"),
    ("disk_to_gpu", "request"),
    ("disk_to_gpu", "prefetch"),
    ("gpu_to_host", "save"),
    ("host_to_disk", "save"),
)


@dataclass(slots=True)
class CopyTotals:
    """Copies of one route that ended, over all ranks."""

    size_bytes: int = 0
    """Also what arrived of copies that failed later."""
    seconds: float = 0.0
    """Sum over the operations, each as long as on its slowest rank. An operation that others overtook
    took longer, and two that ran side by side count twice: bytes / seconds is what one copy gets."""
    failed_ops: int = 0


@dataclass(slots=True)
class TransferTotals:
    """Counters since the start, summed over ranks."""

    saved_blocks: int = 0
    loaded_host_blocks: int = 0
    loaded_disk_blocks: int = 0
    written_blocks: int = 0
    failed_ops: int = 0
    skipped_blocks: int = 0
    """Blocks that were not saved because no tier had room for them."""
    corrupt_files: int = 0
    """Chunks whose file was damaged, foreign or gone on some rank."""
    checksum_failures: int = 0
    """Those of them in which a block's checksum did not match."""


def route_of(operation: Op) -> Route:
    if isinstance(operation, Load | Read):
        path = "host_to_gpu" if isinstance(operation, Load) else "disk_to_gpu"
        return path, "prefetch" if operation.prefetch else "request"
    return ("gpu_to_host" if isinstance(operation, Save) else "host_to_disk"), "save"
