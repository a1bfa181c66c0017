"""A model's layers in groups, as planes of the KV cache and as columns of a row off the GPU.

A row holds the planes of a block in the order of the layers, so a group of layers is a range of its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from memos_vllm.kernels.kv_copy import plane_bytes


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
