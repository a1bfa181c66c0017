"""KV caches in every layout that vLLM registers, filled with anything; poisoned destinations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memos_vllm.kernels.heads import HeadShape

BLOCKS = 11
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]
VALUE_DTYPES = DTYPES[:3]
ID_LISTS = [[], [0], [10], [3, 4, 5, 6], [7, 6, 5], [9, 1, 2, 0, 8, 7, 3]]
POISON = 0xA5


def filled(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random bits, NaNs among them: a copy must not look at values."""
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * width), dtype=torch.uint8).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def poisoned(rows: int, row_bytes: int, gap: int = 0) -> Tensor:
    """Rows of a larger matrix, ``gap`` bytes apart."""
    return torch.full((rows, row_bytes + gap), POISON, dtype=torch.uint8)[:, :row_bytes]


class Layout(NamedTuple):
    caches: Callable[[Callable[..., Tensor], int, int, int], list[Tensor]]  # of make, tokens, heads, head_size
    order: str


# name -> KV caches of two layers, as vLLM registers them; 2 and 4 kernel blocks per block where they are small
LAYOUTS = {
    "kv_apart_nhd": Layout(lambda make, n, h, d: [make(2, BLOCKS, n, h, d) for _ in range(2)], "NHD"),
    "kv_apart_hnd": Layout(lambda make, n, h, d: [make(2, BLOCKS, h, n, d) for _ in range(2)], "HND"),
    "hnd_seen_as_nhd": Layout(
        lambda make, n, h, d: [make(BLOCKS, 2, h, n, d).transpose(2, 3) for _ in range(2)], "NHD"
    ),
    "kv_in_one_head": Layout(lambda make, n, h, d: [make(BLOCKS, h, n, 2 * d) for _ in range(2)], "HND"),
    "kv_in_one_head_tokens_outside": Layout(
        lambda make, n, h, d: [make(BLOCKS, n, h, 2 * d).transpose(1, 2) for _ in range(2)], "HND"
    ),
    "layers_interleaved": Layout(lambda make, n, h, d: list(make(BLOCKS, 2, h, n, 2 * d).unbind(1)), "HND"),
    "heads_outside_layers": Layout(
        lambda make, n, h, d: list(make(BLOCKS, h, 2, n, 2 * d).transpose(1, 2).unbind(1)), "HND"
    ),
    "small_kernel_blocks": Layout(lambda make, n, h, d: [make(BLOCKS * 4, 2, n, h, d) for _ in range(2)], "NHD"),
    "kv_apart_small_kernel_blocks": Layout(
        lambda make, n, h, d: [make(2, BLOCKS * 2, n, h, d) for _ in range(2)], "NHD"
    ),
}
MLA = Layout(lambda make, n, _, d: [make(BLOCKS * 2, n, d) for _ in range(2)], "NHD")

# What only a plain copy has to understand.
ODD_LAYOUTS = {
    "last_dimension_strided": lambda make: [make(BLOCKS, 16, 5).transpose(1, 2) for _ in range(3)],
    "odd": lambda make: [make(BLOCKS, 3, 7), make(BLOCKS, 1, 1)],
    "many_dimensions": lambda make: [make(BLOCKS, 2, 3, 2, 2, 8).permute(0, 5, 2, 4, 1, 3)],
}


def shape_of(layout: Layout, num_heads: int, head_size: int) -> HeadShape:
    return HeadShape(num_heads, head_size, layout.order)
