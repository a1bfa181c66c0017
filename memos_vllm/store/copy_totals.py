"""What copies moved and how long they took, by path and purpose."""

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


def route_of(operation: Op) -> Route:
    if isinstance(operation, Load | Read):
        path = "host_to_gpu" if isinstance(operation, Load) else "disk_to_gpu"
        return path, "prefetch" if operation.prefetch else "request"
    return ("gpu_to_host" if isinstance(operation, Save) else "host_to_disk"), "save"
