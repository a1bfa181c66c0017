"""Adapters that requests will probably need: which scene's next one needs which, and bringing them ahead of it.

vLLM evicts the adapter used least recently, and holds what a running request uses, so only the slots in between
are filled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from memos_vllm.adapters.registry import AdapterRegistry, InUse
from memos_vllm.errors import AdapterUnavailable, NotFound
from memos_vllm.integration import engine_channel
from memos_vllm.integration.adapter_loader import AdapterLoader, lora_request
from memos_vllm.types import Principal

logger = logging.getLogger(__name__)

MAX_SCENES = 16_384
"""How many scenes' adapters one process remembers; those used least recently are forgotten first."""
MAX_SCENES_PER_USER = 1_024
"""Of them of one user, so that no user pushes out those of all others."""


class ExpectedAdapters:
    """One per API process, in its event loop."""

    def __init__(self, registry: AdapterRegistry, loader: AdapterLoader) -> None:
        self._registry = registry
        self._loader = loader
        self._scenes: OrderedDict[str, tuple[Principal, str]] = OrderedDict()
        self._of_user: dict[Principal, OrderedDict[str, None]] = {}
        """The same scenes, by whose they are, in the same order."""
        self._brought: list[int] = []
        """By the last ``prefetch``, most valuable first; as far as the engine took them."""

    def expect(self, scene_id: str, who: Principal, reference: str | None) -> None:
        """The next request of a scene will use this adapter; None: no adapter."""
        self._forget(scene_id)
        if reference is None:
            return
        self._scenes[scene_id] = (who, reference)
        own = self._of_user.setdefault(who, OrderedDict())
        own[scene_id] = None
        if len(own) > MAX_SCENES_PER_USER:
            self._forget(next(iter(own)))
        elif len(self._scenes) > MAX_SCENES:
            self._forget(next(iter(self._scenes)))

    def _forget(self, scene_id: str) -> None:
        if (known := self._scenes.pop(scene_id, None)) is None:
            return
        own = self._of_user[known[0]]
        del own[scene_id]
        if not own:
            del self._of_user[known[0]]

    async def hint(self, scene_id: str, who: Principal, named: str | None) -> bool:
        """A request of the scene is announced; whether it will use an adapter.

        Raises:
            NotFound: the user may use no such adapter.
        """
        if named is not None:
            await asyncio.to_thread(self._registry.find, who, named)
            self.expect(scene_id, who, named)
        elif scene_id not in self._scenes:
            self.expect(scene_id, who, await asyncio.to_thread(self._registry.profile, who))
        return scene_id in self._scenes

    async def next_adapter(self, scene_id: str, who: Principal) -> dict[str, Any] | None:
        """The adapter of a scene's next request as far as it is known, and whether the engine has it."""
        known = self._scenes.get(scene_id)
        reference = known[1] if known is not None else await asyncio.to_thread(self._registry.profile, who)
        if reference is None or self._loader.lora_config is None:
            return None
        try:
            adapter, version = await asyncio.to_thread(self._registry.find, who, reference)
        except NotFound:
            return None
        loaded = version.lora_int_id in await self._loader.engine.list_loras()
        return {"name": f"{adapter.name}@{version.version}", "loaded": loaded}

    async def prefetch(self, scene_ids: Sequence[str]) -> None:
        """Loads the adapters of scenes, most valuable first, into the slots that no running request holds.

        Every use counts for vLLM's eviction. So all of them are used once more in the end, the most valuable one
        last; unless they were so the last time, and vLLM has nothing else that was used since.
        """
        if self._loader.lora_config is None or not any(scene_id in self._scenes for scene_id in scene_ids):
            return
        replies = await engine_channel.call(self._loader.engine, "adapters")
        in_use = {number for reply in replies for number in reply.get("in_use", ())}
        wanted = self._wanted(scene_ids, in_use, self._loader.lora_config.max_loras - len(in_use))
        present = set(await self._loader.engine.list_loras())
        if list(wanted) == self._brought and present - in_use == wanted.keys():
            return
        self._brought = []
        with ExitStack() as files:
            brought = [await self._bring(files, who, reference, present) for who, reference in wanted.values()]
            for used in reversed(brought[:-1]):
                if used is not None:
                    with suppress(AdapterUnavailable):
                        await self._loader.load(lora_request(used), used.reference)
        self._brought = [used.version.lora_int_id for used in brought if used is not None]

    def _wanted(self, scene_ids: Sequence[str], in_use: Collection[int], room: int) -> dict[int, tuple[Principal, str]]:
        """The scenes' adapters, by number, without those that are in use, as far as there is room."""
        wanted: dict[int, tuple[Principal, str]] = {}
        for scene_id in scene_ids:
            if len(wanted) >= room:
                break
            if (known := self._scenes.get(scene_id)) is None:
                continue
            try:
                _, version = self._registry.find(*known)
            except NotFound:
                self._forget(scene_id)
                continue
            if version.lora_int_id not in in_use:
                wanted.setdefault(version.lora_int_id, known)
        return wanted

    async def _bring(self, files: ExitStack, who: Principal, reference: str, present: Collection[int]) -> InUse | None:
        """Has the engine load an adapter, or use it where it is ``present``; None if that cannot be."""
        began = time.monotonic()
        try:
            used = await asyncio.to_thread(files.enter_context, self._registry.use(who, reference))
            await self._loader.load(lora_request(used), used.reference)
        except (AdapterUnavailable, NotFound) as error:
            logger.warning("adapter %r of %s is not prefetched: %s", reference, who, error)
            return None
        if used.version.lora_int_id not in present:
            self._loader.prefetched(used, time.monotonic() - began)
        return used
