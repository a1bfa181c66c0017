"""Factories for the tests of the KV tiers."""

import os
from collections.abc import Sequence
from dataclasses import fields

import torch

from memos_vllm.store.identity import KVIdentity
from memos_vllm.store.kv_file import ChunkReader, write_chunk_in_pieces
from memos_vllm.types import BlockKey

_DEFAULTS = {
    "format_version": 1,
    "model": "m",
    "model_fingerprint": "f",
    "revision": "r",
    "tokenizer": "t",
    "dtype": "bfloat16",
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "hash_algo": "sha256",
    "effective_config": "00",
    "world": "tp2pp1",
    "layout": ("bfloat16[2,16,64]",),
}
IDENTITY_FIELDS = [field.name for field in fields(KVIdentity)]


def make_identity(**changes) -> KVIdentity:
    return KVIdentity(**_DEFAULTS | changes)


def other_identity(field: str) -> KVIdentity:
    """An identity that differs in one field."""
    value = _DEFAULTS[field]
    changed = value + 1 if isinstance(value, int) else (*value, "x") if isinstance(value, tuple) else value + "x"
    return make_identity(**{field: changed})


def make_key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


def make_keys(*numbers: int) -> tuple[BlockKey, ...]:
    return tuple(map(make_key, numbers))


def random_rows(rows: int, row_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8)


def write_chunk(
    path: str | os.PathLike[str],
    blocks: torch.Tensor | Sequence[torch.Tensor],
    keys: Sequence[BlockKey],
    identity: KVIdentity,
    rank: int,
) -> None:
    """Writes a chunk at once."""
    for _ in write_chunk_in_pieces(path, blocks, keys, identity, rank):
        pass


def read_blocks(
    path: str | os.PathLike[str],
    positions: Sequence[int],
    keys: Sequence[BlockKey],
    out: torch.Tensor | Sequence[torch.Tensor],
    identity: KVIdentity,
    rank: int,
) -> None:
    """Reads the blocks at ``positions`` into the rows of ``out``."""
    with ChunkReader(path, identity, rank) as reader:
        reader.read(positions, keys, [[row.numpy()] for row in out])
