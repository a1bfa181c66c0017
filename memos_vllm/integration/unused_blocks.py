"""Prefetched blocks that no request was given yet: what came of them says what a prediction was good for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request


class UnusedBlocks:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._hashes: dict[bytes, None] = {}
        """Those looked at last are at the end."""
        self._num_gone_before = 0
        """Found gone since the last ``take_gone``, without a look."""

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, hashes: Iterable[bytes]) -> None:
        """These were not on the GPU, and are: one that was brought before has gone meanwhile, unused."""
        for block_hash in hashes:
            self._num_gone_before += block_hash in self._hashes
            self._hashes[block_hash] = None

    def use(self, request: Request, num_blocks: int) -> int:
        """A request was given its leading blocks on the GPU; how many of them were unused until then."""
        num_used = 0
        for block_hash in request.block_hashes[:num_blocks] if self._hashes else ():
            key = make_block_hash_with_group_id(block_hash, 0)
            if key in self._hashes:
                del self._hashes[key]
                num_used += 1
        return num_used

    def take_gone(self, limit: int | None = None) -> int:
        """Looks which are no longer on the GPU, of all or of the next ``limit``; how many left it, each time."""
        num_gone, self._num_gone_before = self._num_gone_before, 0
        for block_hash in list(itertools.islice(self._hashes, limit)):
            del self._hashes[block_hash]
            if self._pool.cached_block_hash_to_block.get_one_block(block_hash) is None:
                num_gone += 1
            else:
                self._hashes[block_hash] = None
        return num_gone
