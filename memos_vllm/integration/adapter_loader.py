"""Has vLLM's engine load adapters, and counts what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from memos_vllm.adapters.registry import InUse
from memos_vllm.errors import AdapterUnavailable
from memos_vllm.integration.memory_metrics import MemoryMetrics

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


@dataclass(slots=True)
class AdapterTotals:
    """Of this API process, since its start."""

    requests: int = 0
    loads: int = 0
    """Requests that had to wait for their adapter's first load."""
    load_s: float = 0.0
    failures: int = 0
    fallbacks: int = 0
    prefetches: int = 0
    prefetch_s: float = 0.0
    prefetch_used: int = 0
    """Prefetched adapters that a request then used."""


class AdapterLoader:
    """One per API process, in its event loop. Who calls it holds the adapter's files."""

    def __init__(self, engine: EngineClient, metrics: MemoryMetrics) -> None:
        self.engine = engine
        self.lora_config = engine.vllm_config.lora_config
        """None where the server runs without LoRA."""
        self.totals = AdapterTotals()
        self._metrics = metrics
        self._loaded: set[str] = set()
        """Names that the engine took once: it can load them again by itself."""
        self._loading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._prefetched: set[str] = set()

    async def load_first(self, used: InUse) -> None:
        """Has the engine load an adapter that it never had, so that one that does not load fails here."""
        name = used.version.lora_name
        if name in self._loaded:
            return
        async with self._loading[name]:
            if name in self._loaded:
                return
            began = time.monotonic()
            await self.load(lora_request(used), used.reference)
            self.totals.loads += 1
            waited_s = time.monotonic() - began
            self.totals.load_s += waited_s
            self._metrics.adapter_loaded("request", waited_s)
        self._loading.pop(name, None)

    async def load(self, lora: LoRARequest, reference: str) -> None:
        """
        Raises:
            AdapterUnavailable: vLLM refuses it.
        """
        try:
            await self.engine.add_lora(lora)
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM passes on whatever the worker raised, as a plain Exception
            self.totals.failures += 1
            raise AdapterUnavailable(f"adapter {reference!r} cannot be loaded by vLLM: {error}") from error
        self._loaded.add(lora.lora_name)

    def served(self, used: InUse) -> None:
        """A request runs with it."""
        self.totals.requests += 1
        self._metrics.adapter_requested("served")
        if used.version.lora_name in self._prefetched:
            self._prefetched.discard(used.version.lora_name)
            self.totals.prefetch_used += 1
            self._metrics.adapter_prefetch_used()

    def prefetched(self, used: InUse, took_s: float) -> None:
        """The engine has it before any request."""
        self._prefetched.add(used.version.lora_name)
        self._metrics.adapter_loaded("prefetch")
        self.totals.prefetches += 1
        self.totals.prefetch_s += took_s

    def forget(self, lora_name: str) -> None:
        """It is gone."""
        self._loaded.discard(lora_name)
        self._prefetched.discard(lora_name)


def lora_request(used: InUse) -> LoRARequest:
    version = used.version
    return LoRARequest(version.lora_name, version.lora_int_id, str(used.folder))
