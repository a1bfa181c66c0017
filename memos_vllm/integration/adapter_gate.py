"""The way of a LoRA adapter into one request, or into a build, and out again.

vLLM knows adapters by name and lists them to everybody; ours are private. So they never enter vLLM's own
registry: the chosen one stands in a context variable for the time of the call, a wrapper on the serving
object hands it to the engine, and another keeps its name out of the response.

    use        look up with the user's rights, hold the files, have the engine load it, choose it
    coming     what ``use`` will choose, for a prefix that is built before its request
    building   hold the files and have the engine load it, for a build
    expected   have the engine load what the next requests will need, while slots are free (``expected_adapters``)

Only ``use`` before the engine has it can fail, and then nothing of the request has reached the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.lora.request import LoRARequest

from memos_vllm.adapters.records import NAME_PREFIX
from memos_vllm.adapters.registry import AdapterRegistry, InUse, Removed
from memos_vllm.config import AdaptersConfig
from memos_vllm.errors import AdapterError, AdapterUnavailable, NotFound, RequestError
from memos_vllm.integration import engine_channel
from memos_vllm.integration.adapter_loader import AdapterLoader, AdapterTotals, lora_request
from memos_vllm.integration.expected_adapters import ExpectedAdapters
from memos_vllm.integration.memory_metrics import MemoryMetrics
from memos_vllm.integration.scene_builds import lora_arguments
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger(__name__)

MAX_HEADER_CHARS = 200

_T = TypeVar("_T")
_NO_LORA = "this server runs without LoRA"
_chosen: ContextVar[LoRARequest | None] = ContextVar("memos_adapter", default=None)


@dataclass(slots=True)
class Choice:
    """What a request runs with. ``close`` lets go of the adapter's files; it may be called twice."""

    request: LoRARequest | None = None
    reference: str | None = None
    """As it was asked for: what the next request will probably ask for too."""

    name: str = "base"
    """``name@version``, or ``base`` where the adapter could not be loaded."""

    why: str = ""
    """Why it is ``base``."""

    instead_of: frozenset[tuple[str, int]] = frozenset()
    """Id and version of the memories that the adapter stands for, so that their text is left out."""

    _files: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        self._files.close()

    @property
    def header(self) -> str:
        return f"{self.name}; {self.why}" if self.why else self.name

    @contextmanager
    def active(self) -> Iterator[None]:
        """vLLM's serving object gives requests that start in this block the adapter."""
        token = _chosen.set(self.request)
        try:
            yield
        finally:
            _chosen.reset(token)


@dataclass(frozen=True, slots=True)
class Coming:
    """What a request that has not come yet will run with; without ``lora`` the base model."""

    reference: str | None = None
    lora: LoRARequest | None = None
    instead_of: frozenset[tuple[str, int]] = frozenset()
    """As in ``Choice``."""


class AdapterGate:
    """One per API process, in its event loop.

    Args:
        serving: vLLM's object behind the chat endpoint, once there is one; it knows vLLM's own adapters.
    """

    def __init__(
        self,
        engine: EngineClient,
        registry: AdapterRegistry,
        config: AdaptersConfig,
        metrics: MemoryMetrics,
        serving: Callable[[], Any] = lambda: None,
    ) -> None:
        self.registry = registry
        self._loader = AdapterLoader(engine, metrics)
        self.expected = ExpectedAdapters(registry, self._loader)
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._serving = serving
        self._lora_config = self._loader.lora_config

    @property
    def totals(self) -> AdapterTotals:
        return self._loader.totals

    # -- requests -------------------------------------------------------------------------------

    async def use(
        self,
        who: Principal,
        named: str | None,
        serving: Any,
        model: str | None,
        memories: Iterable[MemoryRecord] = (),
    ) -> Choice | None:
        """The adapter of a request; None for the base model without further words.

        Args:
            named: by the request; None: the user's default.
            serving: vLLM's object behind the chat endpoint.
            model: as the request names it; one of vLLM's own adapters leaves no room for ours.
            memories: long-lived ones of its prompt.

        Raises:
            AdapterError, NotFound: it names an adapter that it cannot have.
            AdapterUnavailable: the adapter cannot be loaded, and ``adapters.on_error`` is ``fail``.
        """
        is_vllms = model is not None and model in serving.models.lora_requests
        if named is not None and is_vllms:
            raise AdapterError(
                f"the model {model!r} is an adapter itself; name the base model, or leave 'memos.adapter'"
            )
        reference = named or (None if is_vllms else await asyncio.to_thread(self._unnamed, who, memories))
        if reference is None:
            return None
        if self._lora_config is None:
            if named is None:
                return Choice(why=_NO_LORA)
            raise AdapterError(f"{_NO_LORA}; the operator starts it with --enable-lora", 409)
        choice = Choice(reference=reference)
        try:
            used = await self._hold(choice._files, self.registry.use(who, reference))
            await self._loader.load_first(used)
        except (RequestError, asyncio.CancelledError) as error:
            choice.close()
            # What the request names must exist; only what exists may fail softly.
            refused = named is not None and isinstance(error, (AdapterError, NotFound))
            if isinstance(error, asyncio.CancelledError):
                raise
            if refused or self._config.on_error == "fail":
                self._metrics.adapter_requested("refused")
                raise
            self._metrics.adapter_requested("base")
            self.totals.fallbacks += 1
            logger.warning("adapter %r of %s is not used: %s", reference, who, error)
            return Choice(reference=reference, why=_in_a_header(error))
        _hand_over(serving)
        self._loader.served(used)
        choice.request, choice.name = lora_request(used), used.reference
        choice.instead_of = self._instead_of(used, who)
        return choice

    def _unnamed(self, who: Principal, memories: Iterable[MemoryRecord]) -> str | None:
        """The adapter of a request that names none: the user's default, or what stands for his memories."""
        default = self.registry.profile(who)
        if default is None and self._config.choose == "assembler":
            return self.registry.standing_for(who, {(record.id, record.version) for record in memories})
        return default

    def _instead_of(self, used: InUse, who: Principal) -> frozenset[tuple[str, int]]:
        """Memories whose text stays out of the prompt."""
        leave_out = self._config.distilled_text == "leave_out" and used.adapter.owner == who
        return used.version.memories_of(who) if leave_out else frozenset()

    async def _hold(self, files: ExitStack, holding: AbstractContextManager[_T]) -> _T:
        """Off the loop: the first use in a process reads the whole adapter."""
        held = asyncio.ensure_future(asyncio.to_thread(files.enter_context, holding))
        try:
            return await asyncio.shield(held)
        except asyncio.CancelledError:
            held.add_done_callback(lambda _: files.close())  # the thread goes on, and may hold them only then
            raise

    # -- builds ---------------------------------------------------------------------------------

    def coming(
        self, who: Principal, named: str | None, serving: Any, model: str | None, memories: Iterable[MemoryRecord]
    ) -> Coming:
        """What ``use`` would choose now. Blocks while the adapter's files are read."""
        vllms: LoRARequest | None = serving.models.lora_requests.get(model)
        if vllms is not None or self._lora_config is None:
            return Coming(lora=vllms)
        reference = named or self._unnamed(who, memories)
        if reference is None:
            return Coming()
        try:
            with self.registry.use(who, reference) as used:
                return Coming(reference, lora_request(used), self._instead_of(used, who))
        except (AdapterError, AdapterUnavailable, NotFound) as error:
            logger.info("the next session of %s is prepared without adapter %r: %s", who, reference, error)
            return Coming()

    @asynccontextmanager
    async def building(self, lora: LoRARequest | None) -> AsyncIterator[None]:
        """The engine has the adapter of a build, and its files stay until the end of the block.

        A request whose adapter does not load stops vLLM's engine, so it is loaded by itself first.

        Raises:
            AdapterUnavailable: it is gone, and with it what it computed; or it cannot be loaded now, and what it
                would compute is left until a request has used it.
        """
        if lora is None:
            yield
            return
        named = {"lora_name": lora.lora_name}
        with ExitStack() as files:
            try:
                if lora.lora_name.startswith(NAME_PREFIX):
                    await self._hold(files, self.registry.use_named(lora.lora_name))
                elif not self._is_vllms(lora):
                    raise AdapterUnavailable(f"vLLM's adapter {lora.lora_name!r} is not loaded in this process")
                await self._loader.load(lora, lora.lora_name)
            except NotFound as error:
                await engine_channel.call(self._engine, "forget_adapter", named)
                raise AdapterUnavailable(str(error)) from error
            except AdapterUnavailable:
                await engine_channel.call(self._engine, "give_up_builds", named)
                raise
            self._metrics.adapter_loaded("build")
            yield

    def _is_vllms(self, lora: LoRARequest) -> bool:
        """Whether it is one of vLLM's own that the operator has not unloaded: only its files can be relied on."""
        serving = self._serving()
        known = serving.models.lora_requests.get(lora.lora_name) if serving is not None else None
        return known is not None and lora_arguments(known) == lora_arguments(lora)

    # -- the end of an adapter ------------------------------------------------------------------

    async def remove(self, removed: Removed) -> dict[str, Any]:
        """Removes what was computed with versions that are gone, and contents that nobody has any more.

        Returns:
            For a receipt: what was removed where; ``files_pending`` counts those that a request still uses.
        """
        free = {each.digest: await asyncio.to_thread(self.registry.wait_until_free, each) for each in removed.contents}
        kv = {"gpu_blocks": 0, "host_blocks": 0, "disk_blocks": 0}
        for version in removed.versions:
            self._loader.forget(version.lora_name)
            for reply in await engine_channel.call(self._engine, "forget_adapter", {"lora_name": version.lora_name}):
                kv = {tier: count + reply.get(tier, 0) for tier, count in kv.items()}
        num_removed = 0
        for version in removed.contents:
            if free[version.digest]:
                if self._lora_config is not None:
                    await self._engine.remove_lora(version.lora_int_id)
                num_removed += await asyncio.to_thread(self.registry.remove_files, version)
        return {"contents": num_removed, "files_pending": len(free) - num_removed, "kv": kv}

    async def status(self) -> dict[str, Any]:
        """Slots, what is in host memory, and what came of loads; for the operator."""
        stored = await asyncio.to_thread(self.registry.stats)
        if self._lora_config is None:
            return {"enabled": False, "stored": stored}
        return {
            "enabled": True,
            "slots": self._lora_config.max_loras,
            "host_capacity": self._lora_config.max_cpu_loras,
            "host": len(await self._engine.list_loras()),
            "stored": stored,
            "totals": asdict(self.totals),
        }


def _in_a_header(error: Exception) -> str:
    """One line of ASCII, whatever vLLM and the user's names have put into it."""
    return " ".join(str(error).encode("ascii", "replace").decode().split())[:MAX_HEADER_CHARS]


def _hand_over(serving: Any) -> None:
    """Lets the serving object give a request what was chosen for it, and keep quiet about it. Once per object.

    vLLM has no hook here: it looks for adapters in a public list, by the request's ``model``.
    """
    if "_memos_adapters" in vars(serving):
        return
    find, name_of = serving._maybe_get_adapters, serving.models.model_name

    def _maybe_get_adapters(request: Any, *args: Any, **kwargs: Any) -> LoRARequest | None:
        return _chosen.get() or find(request, *args, **kwargs)

    def model_name(lora: LoRARequest | None = None) -> str:
        return name_of(None if lora is not None and lora is _chosen.get() else lora)

    serving._maybe_get_adapters = _maybe_get_adapters
    serving.models.model_name = model_name
    serving._memos_adapters = True
