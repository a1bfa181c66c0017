"""Loads in groups of layers: a forward pass may begin when the first layers' KV is there.

A row of host memory holds the planes of a block in the order of the layers, so a group of layers is a range of its
columns. A load copies the first group of all its blocks, then the second. Everything of it is in host memory from the
beginning, and was verified there if it came from a file: what is left to go wrong is the device itself.

The pass asks for a group before its first layer that needs it: ``LayeredLoad.wait`` gives the events that the stream
of the pass has to wait for, once all copies of the group have been issued.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from memos_vllm.kernels.kv_copy import plane_bytes
from memos_vllm.store.pipeline import Event, Landed


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The same layers, as planes and as columns of a row."""

    planes: slice
    columns: slice
    """In bytes."""

    @property
    def row_bytes(self) -> int:
        return self.columns.stop - self.columns.start

    @property
    def num_planes(self) -> int:
        return self.planes.stop - self.planes.start


def layer_groups(planes: Sequence[Tensor], num_groups: int) -> list[LayerGroup]:
    """Cuts the planes, in the order of the layers, into at most ``num_groups`` groups of about as many bytes.

    Without any for 0.
    """
    if not num_groups:
        return []
    sizes = [plane_bytes(plane) for plane in planes]
    total, num_groups = sum(sizes), min(num_groups, len(sizes))
    groups: list[LayerGroup] = []
    first = begin = end = 0
    for number, size in enumerate(sizes, 1):
        end += size
        planes_left, groups_left = len(sizes) - number, num_groups - len(groups) - 1
        if planes_left == groups_left or (groups_left and end * num_groups >= total * (len(groups) + 1)):
            groups.append(LayerGroup(slice(first, number), slice(begin, end)))
            first, begin = number, end
    if first < len(sizes):
        groups.append(LayerGroup(slice(first, len(sizes)), slice(begin, end)))
    return groups


class LayeredLoad:
    """How far one Load is, group by group. Thread-safe.

    Args:
        first_landed: called once, from any thread, when the first group is in all blocks.
    """

    def __init__(self, num_groups: int, first_landed: Callable[[], None]) -> None:
        self._changed = threading.Condition()
        self._issued = [False] * num_groups
        self._events: list[list[Event]] = [[] for _ in range(num_groups)]
        self._pieces = 1  # of the first group that have not landed, and its task
        self._failed = False
        self._first_landed = first_landed

    def piece(self, group: int, landed: Landed) -> Landed:
        """A piece of a group is about to be issued; what is returned is called in the place of ``landed``."""
        if group:
            return landed
        with self._changed:
            self._pieces += 1

        def first(error: Exception | None) -> None:
            landed(error)
            self._end_part(failed=error is not None)

        return first

    def issued(self, group: int, event: Event | None) -> None:
        """A piece was given to the device, and is in its blocks behind the event; None: it is there."""
        if event is not None:
            with self._changed:
                self._events[group].append(event)

    def end(self, group: int, failed: bool) -> None:
        """No more pieces of the group are issued."""
        with self._changed:
            self._issued[group] = True
            self._changed.notify_all()
        if not group:
            self._end_part(failed=failed)

    def wait(self, group: int) -> list[Event]:
        """Blocks until the copies of a group have been issued; the events behind them."""
        with self._changed:
            self._changed.wait_for(lambda: self._issued[group])
            return self._events[group]

    def _end_part(self, *, failed: bool) -> None:
        with self._changed:
            self._pieces -= 1
            self._failed |= failed
            landed = not self._pieces and not self._failed
        if landed:
            self._first_landed()
