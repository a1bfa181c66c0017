"""The memory of blocks, fragment by fragment: where a block lies in one piece in every plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fragment_views(planes: Sequence[Tensor]) -> list[Tensor] | None:
    """Each plane as uint8 ``[num_blocks, bytes]``, one fragment per block and plane, in the order of a chunk's row.

    None if a block is not contiguous in one of them; ``planes_of`` has its dimensions in the order of memory.
    """
    if not all(plane[0].is_contiguous() for plane in planes):
        return None
    flat = (plane.as_strided((plane.shape[0], plane[0].numel()), (plane.stride(0), 1)) for plane in planes)
    return [plane.view(torch.uint8) for plane in flat]
