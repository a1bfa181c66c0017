"""Names of the blocks of requests: what finds a block in a tier again, and what a deletion finds it by."""

from __future__ import annotations

import secrets
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Literal

from memos_vllm.integration import salts
from memos_vllm.integration.model_identity import adapter_digest
from memos_vllm.store.identity import KVIdentity
from memos_vllm.types import BlockKey

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request


class BlockNames:
    """Owned by the engine's loop.

    Args:
        identity: of the model and of the layout of its KV.
        save: ``kv.save`` of the configuration, whose KV may be kept.
    """

    def __init__(self, identity: KVIdentity, save: Literal["memory", "all", "none"]) -> None:
        self.identity = identity
        self._save = save
        self._generation = b""
        self._keys: dict[str, list[BlockKey]] = {}
        self._first_keys: dict[str, frozenset[BlockKey]] = {}
        """Of requests for which they were asked."""
        self._adapters: dict[tuple[int, str], bytes | None] = {}
        self._contents: dict[tuple[str, str], set[bytes | None]] = {}
        """Of adapters by name and path, which is all that vLLM's hashes of blocks tell of them."""

    def __len__(self) -> int:
        """Requests whose names are kept."""
        return len(self._keys)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._keys

    def keys(self, request: Request) -> list[BlockKey]:
        """Of all full blocks so far, until ``drop``; a waiting request is matched in every step, so kept."""
        keys = self._keys.setdefault(request.request_id, [])
        if len(keys) < len(request.block_hashes):
            new = self.of(request.block_hashes[len(keys) :], request.lora_request)
            if new is None:
                return []
            keys += new
        return keys

    def first_keys(self, request: Request, num_blocks: int) -> Set[BlockKey]:
        """Of the first full blocks, without their order; a request that waits asks in every step, so kept too."""
        held = self._first_keys.get(request.request_id)
        if held is None or len(held) != num_blocks:  # a block's hash has those before it in it: no two are equal
            held = self._first_keys[request.request_id] = frozenset(self.keys(request)[:num_blocks])
        return held

    def of(self, block_hashes: Sequence[BlockHash], lora: LoRARequest | None) -> list[BlockKey] | None:
        """None where the adapter's content cannot be named: such blocks are not kept."""
        digest = self._adapter_digest(lora)
        if digest is None:
            return None
        return [self.identity.block_key(bytes(of), digest, self._generation) for of in block_hashes]

    def tag(self, request: Request) -> bytes | None:
        """What a deletion finds the request's KV by; None: the request is not to be saved."""
        if self._save == "none" or (self._save == "memory" and not salts.is_memory_salt(request.cache_salt)):
            return None
        if (lora := request.lora_request) is not None:
            self._adapter_digest(lora)
            if len(self._contents[lora.lora_name, lora.lora_path]) > 1:
                # The GPU's prefix cache cannot tell their blocks apart: one's would be filed as another's.
                return None
        return salts.tag_of(request.cache_salt, lora)

    def drop(self, request_id: str) -> None:
        self._keys.pop(request_id, None)
        self._first_keys.pop(request_id, None)

    def start_generation(self) -> set[str]:
        """From now on nothing has the name that it had; the requests whose KV is of before."""
        self._generation = secrets.token_bytes(16)
        before = set(self._keys)
        self._keys.clear()
        self._first_keys.clear()
        return before

    def _adapter_digest(self, lora: LoRARequest | None) -> bytes | None:
        """Read once per loaded adapter, so that weights that change on disk later do not rename its KV."""
        if lora is None:
            return b""
        loaded = (lora.lora_int_id, lora.lora_path)
        if lora.load_inplace:
            # Id and path stay while the content changes, for later requests too: it cannot be named again.
            self._adapters[loaded] = None
        if loaded not in self._adapters:
            self._adapters[loaded] = adapter_digest(lora)
        self._contents.setdefault((lora.lora_name, lora.lora_path), set()).add(self._adapters[loaded])
        return self._adapters[loaded]
