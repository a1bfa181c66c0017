"""Names shared by all layers. *Block* is vLLM's KV unit, *chunk* ours off the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

BlockKey = NewType("BlockKey", bytes)
"""32 bytes: what a KV block holds, over processes and restarts (``store.identity``)."""

MemoryId = NewType("MemoryId", str)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request acts for. Both parts come from the credential, see ``integration.identity``."""

    tenant: str
    user: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.user}"
