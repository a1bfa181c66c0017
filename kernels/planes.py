"""Views of the registered KV caches whose first dimension is vLLM's block id."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Half(NamedTuple):
    """A KV cache tensor, or its K or V half where they lie apart."""

    plane: Tensor  # [num_blocks, k, ...], k kernel blocks per block of the manager
    part: int | None  # 0 for K and 1 for V where they lie apart


def planes_of(kv_caches: Sequence[Tensor], num_blocks: int) -> list[Tensor]:
    """Views of the registered KV caches whose dimension 0 is vLLM's block id.

    Args:
        kv_caches: in the order in which rows of a chunk shall hold them. Understood shapes, under any
            strides: ``[num_blocks * k, ...]`` (``k`` kernel blocks per block of the manager; MLA's
            three dimensions too) and ``[2, num_blocks * k, ...]`` (K and V apart: two planes).
        num_blocks: of vLLM's KV cache manager.

    Returns:
        ``[num_blocks, ...]`` or ``[num_blocks, k, ...]`` per plane, sharing memory with the caches, and with the
        dimensions of a block as ``memory_order`` has them. A view that occurs twice (layers that share their KV)
        is returned once.

    Raises:
        ValueError: no dimension of a cache counts blocks, or two of them could.
    """
    return [plane.permute(0, *memory_order(plane)) for plane in _registered(kv_caches, num_blocks)]


def memory_order(plane: Tensor) -> tuple[int, ...]:
    """The dimensions behind the first as a block lies in memory, where it is one piece; else as they are.

    FlashAttention registers ``[num_blocks, heads, tokens, size]`` and lets tokens lie outside heads: in this order
    such a block is one copy, in that of its shape thousands.
    """
    as_registered = tuple(range(1, plane.dim()))
    outermost_first = tuple(sorted(as_registered, key=plane.stride, reverse=True))
    if plane[0].is_contiguous() or not plane.permute(0, *outermost_first)[0].is_contiguous():
        return as_registered
    return outermost_first


def _registered(kv_caches: Sequence[Tensor], num_blocks: int) -> list[Tensor]:
    """The planes with their dimensions as registered."""
    planes: dict[tuple, Tensor] = {}
    for position, cache in enumerate(kv_caches):
        for half in halves(cache, num_blocks, position):
            plane = half.plane.squeeze(1) if half.plane.shape[1] == 1 else half.plane
            planes.setdefault(memory_of(half.plane), plane)
    return list(planes.values())


def halves(cache: Tensor, num_blocks: int, position: int) -> Iterator[Half]:
    """The cache itself if its first dimension counts blocks; its K and V if the second does."""
    shape = tuple(cache.shape)

    def counts_blocks(dim: int) -> bool:
        return cache.dim() > dim and shape[dim] > 0 and shape[dim] % num_blocks == 0

    blocks_first = num_blocks > 0 and counts_blocks(0)
    kv_first = num_blocks > 0 and cache.dim() > 1 and shape[0] == 2 and counts_blocks(1)
    if blocks_first == kv_first:
        why = "both of the first two dimensions could" if blocks_first else "neither of the first two dimensions can"
        raise ValueError(
            f"KV cache {position} has the shape {shape}: {why} count {num_blocks} blocks; "
            "expected [num_blocks * k, ...] or [2, num_blocks * k, ...]"
        )
    parts = [(cache, None)] if blocks_first else [(cache[0], 0), (cache[1], 1)]
    for tensor, part in parts:
        yield Half(tensor.unflatten(0, (num_blocks, tensor.shape[0] // num_blocks)), part)


def plane_numbers(kv_caches: Sequence[Tensor], num_blocks: int) -> list[tuple[int, ...]]:
    """For each cache which of the views that ``planes_of`` returns for all of them are its own."""
    numbers: dict[tuple, int] = {}
    return [
        tuple(numbers.setdefault(memory_of(half.plane), len(numbers)) for half in halves(cache, num_blocks, position))
        for position, cache in enumerate(kv_caches)
    ]


def memory_of(tensor: Tensor) -> tuple:
    """Equal for two views of the same bytes in the same order."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def plane_bytes(plane: Tensor) -> int:
    """Bytes of one block in ``plane``."""
    return math.prod(plane.shape[1:]) * plane.element_size()


def block_bytes(planes: Sequence[Tensor]) -> int:
    """Bytes of one block over all planes: the length of a row of an exact chunk."""
    return sum(map(plane_bytes, planes))


def describe_planes(kv_caches: Sequence[Tensor], num_blocks: int) -> tuple[str, ...]:
    """What a row of these caches is made of: one block per plane; for ``KVIdentity.layout``.

    Its dtype and its shape as registered, such as ``bfloat16[8,16,128]``, and the order in which its dimensions
    follow in a row where that is another: ``bfloat16[8,16,128] as 1,0,2``.
    """
    return tuple(map(_describe, _registered(kv_caches, num_blocks)))


def _describe(plane: Tensor) -> str:
    text = f"{str(plane.dtype).removeprefix('torch.')}[{','.join(map(str, plane.shape[1:]))}]"
    order = memory_order(plane)
    return text if order == tuple(sorted(order)) else f"{text} as {','.join(str(dim - 1) for dim in order)}"


def byte_view(plane: Tensor) -> Tensor:
    """The plane as uint8, the element's bytes in the last dimension: ``[num_blocks, ..., bytes]``."""
    if plane.dim() > 1 and plane.stride(-1) == 1:
        return plane.view(torch.uint8)
    # A last dimension with a stride cannot be viewed as smaller elements; a new one of length 1 can.
    apart = plane.as_strided((*plane.shape, 1), (*plane.stride(), 1))
    return apart.view(torch.uint8)
