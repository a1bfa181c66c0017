"""Copies with torch alone, for devices that have no Triton: one indexed copy per plane, through a temporary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .planes import byte_view


class TorchCopy:
    def __init__(self, planes: Sequence[Tensor]) -> None:
        self._views = [byte_view(plane) for plane in planes]
        self._device = planes[0].device

    def warm_up(self) -> None:
        """There is nothing to compile."""

    def gather(self, block_ids: Sequence[int], out: Tensor, rows: Sequence[int], num_programs: int) -> None:
        index, target = self._index(block_ids), self._index(rows)
        begin = 0
        for view in self._views:
            end = begin + math.prod(view.shape[1:])
            out[:, begin:end].index_copy_(0, target, view.index_select(0, index).flatten(1))
            begin = end

    def scatter(self, chunk: Tensor, block_ids: Sequence[int], rows: Sequence[int], num_programs: int) -> None:
        index, source = self._index(block_ids), self._index(rows)
        begin = 0
        for view in self._views:
            end = begin + math.prod(view.shape[1:])
            view.index_copy_(0, index, chunk[:, begin:end].index_select(0, source).unflatten(1, view.shape[1:]))
            begin = end

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
