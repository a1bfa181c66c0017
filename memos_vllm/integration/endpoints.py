"""The endpoint plugin: attaches our routes to vLLM's application and builds what they share."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import xxhash

from memos_vllm import activation, data_dir
from memos_vllm.adapters.registry import AdapterRegistry
from memos_vllm.config import MemosConfig, load
from memos_vllm.core.lifecycle import Aging
from memos_vllm.integration import embedding, salts
from memos_vllm.integration.adapter_base import base_of
from memos_vllm.integration.adapter_gate import AdapterGate
from memos_vllm.integration.builder import SceneBuilder
from memos_vllm.integration.caretaker import Caretaker
from memos_vllm.integration.event_exchange import EventExchange
from memos_vllm.integration.fitting import check_budgets
from memos_vllm.integration.home_engine import HomeEngines
from memos_vllm.integration.idle import IdleTime, LiveRequests
from memos_vllm.integration.memory_metrics import MemoryMetrics
from memos_vllm.integration.model_identity import fingerprint_of
from memos_vllm.integration.other_routes import RefusesMemory
from memos_vllm.integration.planner import ScenePlanner
from memos_vllm.integration.predictor_file import ForgottenOwners, PredictorFile
from memos_vllm.integration.prompt_format import prompt_format_of
from memos_vllm.integration.refiner import Refiner
from memos_vllm.integration.session_start import SessionStarts
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.opening import open_store
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.sources.opening import open_sources

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

_MAX_TOKEN_COUNTS = 65_536


def routers(*, development: bool) -> list[APIRouter]:
    """All routes of ours; docs/API.md has each.

    Args:
        development: with those of vLLM's development mode.
    """
    from memos_vllm.integration import (
        adapters,
        chat,
        distillations,
        documents,
        forms,
        life,
        memories,
        missing_ids,
        operations,
        portability,
        scenes,
        usage,
        users,
    )

    # Documents, usage and portability first: the path of a memory would match theirs.
    of_memories = (documents, usage, portability, life, memories, missing_ids, forms)
    modules = (chat, *of_memories, distillations, adapters, scenes, operations, users)
    return [module.router for module in modules] + [operations.development_router] * development


class MemosEndpoints:
    """See vLLM's ``EndpointPlugin`` protocol."""

    name = "memos"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        if not activation.is_active():  # named in VLLM_PLUGINS by hand, without our flag
            return
        import vllm.envs as envs

        _remove_route(app, "/v1/chat/completions", "POST")
        for router in routers(development=envs.VLLM_SERVER_DEV_MODE):
            app.include_router(router)
        app.add_middleware(LiveRequests)
        app.add_middleware(RefusesMemory)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        if not activation.is_active() or engine_client is None:
            return
        config = load(activation.config_path())
        check_budgets(config.memory, engine_client.model_config.max_model_len)
        load_format = str(engine_client.vllm_config.load_config.load_format)
        embedder = embedding.build(config.memory.embedder, engine_client.model_config, load_format)
        aging = Aging(config.memory.archive_after_s, config.memory.remove_expired_after_s)
        store = await asyncio.to_thread(open_store, config, aging)
        count_tokens = token_counter(engine_client)
        service = MemoryService(store, config.memory, count_tokens=count_tokens, embedder=embedder)
        sources = open_sources(config, data_dir.sources_dir(config.data_dir), count_tokens, embedder)
        secret = data_dir.secret(config.data_dir)
        metrics = MemoryMetrics()
        serving = partial(getattr, state, "openai_serving_chat", None)  # vLLM makes it later
        adapters = await asyncio.to_thread(open_adapters, engine_client, config, metrics, serving)
        parallel = engine_client.vllm_config.parallel_config
        rank = getattr(parallel, "_api_process_rank", 0)
        num_api_processes = getattr(parallel, "_api_process_count", 1)
        learned = PredictorFile(
            config.data_dir / (f"predictor-{rank}.json" if rank > 0 else "predictor.json"),
            ForgottenOwners(config.data_dir / "forgotten_owners", secret),
        )
        exchange = EventExchange(data_dir.run_dir(config.data_dir), rank, range(num_api_processes))
        planner = ScenePlanner(
            engine_client, config.prediction, learned, on_expected=adapters.expected.prefetch, on_event=exchange.tell
        )
        await exchange.open(planner.hear)
        salt_of = partial(salts.of_user, secret, config.kv.store_dtype)
        prompt_format = prompt_format_of(engine_client.renderer.get_tokenizer(), args)
        homes = HomeEngines(engine_client)
        starts = SessionStarts(engine_client, service, salt_of, adapters, homes, prompt_format)
        idle = IdleTime()
        state.memos = memos = MemosState(
            config=config,
            service=service,
            engine=engine_client,
            homes=homes,
            secret=secret,
            planner=planner,
            builder=SceneBuilder(engine_client, config.prediction.build, planner, starts, idle, adapters),
            metrics=metrics,
            adapters=adapters,
            count_tokens=count_tokens,
            prompt_format=prompt_format,
            sources=sources,
            idle=idle,
        )
        memos.caretaker = Caretaker(memos)
        memos.caretaker.start()
        memos.refiner = Refiner(
            engine_client,
            config.memory.refiner,
            service.refining,
            idle,
            memos.metrics,
            serving=serving,
            is_building=lambda: memos.builder.is_pending,
            salt_of=memos.salt,
            model=f"{engine_client.model_config.served_model_name}@{fingerprint_of(engine_client.vllm_config)}",
        )
        memos.refiner.start()


def open_adapters(
    engine_client: Any, config: MemosConfig, metrics: MemoryMetrics, serving: Callable[[], Any]
) -> AdapterGate:
    """The registry of LoRA adapters, for what this server serves."""
    registry = AdapterRegistry(
        data_dir.adapters_dir(config.data_dir),
        config.adapters,
        base_of(engine_client.vllm_config, config.adapters),
        fingerprint_of(engine_client.vllm_config),
    )
    return AdapterGate(engine_client, registry, config.adapters, metrics, serving)


def _remove_route(app: FastAPI, path: str, method: str) -> None:
    """Takes out vLLM's route that ours replaces.

    vLLM 0.32 would do it itself; 0.26 appends a plugin's routes, where the first match wins.
    """
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if getattr(route, "path", None) != path or method not in (getattr(route, "methods", None) or ())
    ]


def token_counter(engine_client: Any) -> Callable[[str], int]:
    """Counts tokens with the served model's tokenizer.

    Remembers counts by content: a user's pinned documents are counted for every request, and
    tokenising 6,000 tokens takes about as long as all the rest of a recall.
    """
    tokenizer = engine_client.renderer.get_tokenizer()
    counts: OrderedDict[bytes, int] = OrderedDict()

    def count(text: str) -> int:
        key = xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
        if (known := counts.get(key)) is None:
            known = counts[key] = len(tokenizer.encode(text, add_special_tokens=False))
            if len(counts) > _MAX_TOKEN_COUNTS:
                counts.popitem(last=False)
        return known

    return count


def create_plugin() -> MemosEndpoints:
    return MemosEndpoints()
