"""Small tables on their way to the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


class Uploads:
    """Copies of tables to a device, for which nobody waits but the kernel that reads them.

    They have a stream of their own. On the kernel's stream a table would follow the chunk that the kernel
    waits for, and stand at the copy engine behind the next chunk; the kernel would be as late.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_of(device) if device.type == "cuda" else None

    def send(self, table: Tensor) -> Tensor:
        """A CPU tensor on the device, ready for what is queued on the current stream from now on."""
        if self._stream is None:
            return table
        # The caching allocators keep the pinned copy until it is read, and the table until the kernel is done.
        with torch.cuda.stream(self._stream):
            sent = table.pin_memory().to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        sent.record_stream(current)
        return sent

    def moves(self, block_ids: Sequence[int], chunk: Tensor, rows: Sequence[int]) -> Tensor:
        """Block ids beside the addresses of their rows, int64 ``[n, 2]``."""
        base, stride = chunk.data_ptr(), chunk.stride(0)
        moves = [(block, base + row * stride) for block, row in zip(block_ids, rows, strict=True)]
        return self.send(torch.tensor(moves, dtype=torch.int64).view(len(moves), 2))


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One per GPU: torch has 32 streams of a priority and gives them out in turn, to vLLM as well. With more of ours, a
    small copy of vLLM's might stand behind a large one of ours."""
    return torch.cuda.Stream(device)
