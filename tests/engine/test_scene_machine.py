"""Any order of events over vLLM's own KV cache manager, block pool and requests, without a model.

The machine is scheduler and workers at once. It knows the bytes: what every rank has in every GPU
block, host slot and file. A copy runs on a rank when that rank reports it, the latest moment there is,
so a block, slot or file that was given away too early shows as wrong KV under a published hash.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import Phase, currently_in_test_context, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memos_vllm.config import MemosConfig
from memos_vllm.core.residency import ResidencyPolicy
from memos_vllm.integration import activation_memory, prefetch_room, salts, scene_loads, scheduler_side
from memos_vllm.integration.messages import MemosHandshake, MemosWorkerMeta
from memos_vllm.integration.prefetch_room import IN_FLIGHT_SHARE
from memos_vllm.integration.scene_builds import BUILD_PARAM, SceneBuilds
from memos_vllm.integration.scene_loads import SceneLoads
from memos_vllm.integration.scene_table import KEEP_SHARE, SCENE_PARAM, SceneTable
from memos_vllm.integration.scheduler_side import COPY_PATIENCE_S, PREFETCH_PATIENCE_S, SchedulerSide
from memos_vllm.store.ops import Load, Op, Read, Result, Save, Write
from tests.store.store_factories import make_identity

NUM_BLOCKS = 29
USABLE = NUM_BLOCKS - 1
"""One is vLLM's null block."""
BLOCK_SIZE = 2
WORLD_SIZE = 2
BLOCK_BYTES = 16
HOST_SLOTS = 12
DISK_BLOCKS = 24
USERS = 2
MAX_REQUESTS = 4
SCENES = [f"scene-{index}" for index in range(4)]
PATHS = [(0, 0, 0), (0, 0, 0, 1, 1), (0, 0, 0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1), (1, 0)]
"""Conversations, one number a block; they share beginnings."""
SOMETIMES = st.integers(0, 4).map(lambda number: number == 3)

Content = tuple[bytes, int]
"""vLLM's hash of what a block holds, and of which weights it is."""


@dataclass(eq=False)
class Live:
    """A request, as the scheduler sees it."""

    request: Any
    state: str = "waiting"
    """waiting, loading, loaded (its copies ended), running, or aborted while loading."""
    block_ids: list[int] = field(default_factory=list)
    ops: set[int] = field(default_factory=set)


@dataclass(eq=False)
class UnderWay:
    operation: Op
    ranks: set[int]
    saved: list[Any]
    """Of a Save: what its blocks held when it was planned."""
    failed: bool = False


def make_kv_cache_manager() -> Any:
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    if not hasattr(kv_cache_utils, "NONE_HASH"):  # once a process: an engine may be in this one
        kv_cache_utils.init_none_hash(hash_function())
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    return KVCacheManager(
        config,
        max_model_len=1024,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        enable_caching=True,
    )


def hash_function() -> Any:
    from vllm.utils.hashing import sha256

    return sha256


def block_hasher() -> Any:
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    return get_request_block_hasher(BLOCK_SIZE, hash_function())


def make_request(
    name: str,
    token_ids: list[int],
    salt: str | None,
    scene: str | None = None,
    build: str | None = None,
    lora: Any = None,
) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = {param: value for param, value in ((SCENE_PARAM, scene), (BUILD_PARAM, build)) if value}
    extra = {"kv_transfer_params": params} if params else None
    return Request(
        name,
        token_ids,
        SamplingParams(max_tokens=1000, extra_args=extra),
        None,
        lora_request=lora,
        cache_salt=salt,
        block_hasher=block_hasher(),
    )


def note_event(what: str) -> None:
    """For ``--hypothesis-show-statistics``: how often the machine gets where it should."""
    if currently_in_test_context():
        event(what)


class SceneMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.now = 0.0
        for module, target, stand_in in (
            (activation_memory, "identity_of", lambda *_: make_identity()),
            (scheduler_side, "engine_channel", SimpleNamespace(serve=lambda _: None)),
            (scheduler_side, "time", SimpleNamespace(monotonic=lambda: self.now)),
        ):
            self.stack.enter_context(mock.patch.object(module, target, stand_in))
        self.kv = make_kv_cache_manager()
        self.pool = self.kv.block_pool
        config = MemosConfig.model_validate(
            {
                "data_dir": folder,
                "kv": {
                    "host_bytes": HOST_SLOTS * BLOCK_BYTES * WORLD_SIZE,
                    "disk_bytes": DISK_BLOCKS * BLOCK_BYTES * WORLD_SIZE,
                    "chunk_bytes": 3 * BLOCK_BYTES,
                    "min_load_tokens": BLOCK_SIZE,
                },
            }
        )
        vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=BLOCK_SIZE, enable_prefix_caching=True),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, long_prefill_token_threshold=0),
            model_config=SimpleNamespace(max_model_len=1024, enable_sleep_mode=False),
            parallel_config=SimpleNamespace(
                data_parallel_rank=0, data_parallel_index=0, decode_context_parallel_size=1, world_size=WORLD_SIZE
            ),
        )
        self.side = SchedulerSide(vllm_config, self.kv.kv_cache_config, config)
        self.side.bind_block_pool(self.pool)
        self.side.open_tiers([MemosHandshake(("x",), BLOCK_BYTES)] * WORLD_SIZE)
        self.scenes: Any = self.side.memory.scenes
        assert self.scenes is not None, "prediction must be on for this test to mean anything"

        self.lives: list[Live] = []
        self.under_way: dict[int, UnderWay] = {}
        self.hurried: list[int] = []
        self.gpu: dict[tuple[int, int], Content | None] = {}  # by rank and block
        self.host: dict[tuple[int, int], Content | None] = {}  # by rank and slot
        self.files: dict[tuple[int, str], list[Content | None]] = {}
        self.weights = 0
        self.epochs = [0] * USERS
        self.forgotten: set[str] = set()
        self.salt_of_hash: dict[bytes, str | None] = {}
        self.num_requests = 0

    @property
    def tiers(self) -> Any:
        return self.side.memory.tiers

    # -- looking --------------------------------------------------------------------------------

    def referenced(self) -> set[int]:
        return {block.block_id for block in self.pool.blocks if block.ref_cnt > 0 and not block.is_null}

    def published(self) -> dict[int, bytes]:
        """By block: the hash under which a request would find it."""
        from vllm.v1.core.kv_cache_utils import get_block_hash

        found = {}
        for block_hash, blocks in self.pool.cached_block_hash_to_block._cache.items():
            for block_id in blocks if isinstance(blocks, dict) else [blocks.block_id]:
                found[block_id] = bytes(get_block_hash(block_hash))
        return found

    def pick(self, data: st.DataObject, *states: str) -> Live:
        return data.draw(st.sampled_from([live for live in self.lives if live.state in states]))

    def any_in(self, *states: str) -> bool:
        return any(live.state in states for live in self.lives)

    # -- the scheduler's part -------------------------------------------------------------------

    def collect(self) -> None:
        """The step's metadata reaches every worker."""
        metadata = self.side.take_metadata(idle=True)
        self.hurried += metadata.hurried
        assert len(set(self.hurried)) == len(self.hurried), "a worker is told once"
        for operation in metadata.operations:
            saved = []
            if isinstance(operation, Save):
                saved = [self.gpu[rank, block] for rank in range(WORLD_SIZE) for block in operation.block_ids]
                assert None not in saved, "a block without KV was saved"
            if isinstance(operation, Load | Read):
                self.poison(operation.block_ids)
            self.under_way[operation.op_id] = UnderWay(operation, set(range(WORLD_SIZE)), saved)
        for live in self.lives:
            if live.request.request_id in metadata.loads:
                assert live.state == "loading"
                assert live.ops == set(metadata.loads[live.request.request_id])

    def poison(self, block_ids: Sequence[int]) -> None:
        for rank in range(WORLD_SIZE):
            self.gpu.update(((rank, block), None) for block in block_ids)

    def compute(self, live: Live, first: int, num_tokens: int) -> None:
        """The forward pass: full blocks from ``first`` on get their KV, and what it reads must be right."""
        hashes = [bytes(block_hash) for block_hash in live.request.block_hashes]
        for index in range(num_tokens // BLOCK_SIZE):
            for rank in range(WORLD_SIZE):
                place, right = (rank, live.block_ids[index]), (hashes[index], self.weights)
                if index >= first:
                    self.gpu[place] = right
                assert self.gpu[place] == right, "a request computes on another block's KV"

    def allocate(
        self, live: Live, num_new_tokens: int, hits: Any = None, num_local: int = 0, num_loaded: int = 0
    ) -> bool:
        """vLLM's own allocation; granted exactly if the plain pool would grant it."""
        request, before = live.request, self.referenced()
        busy = {block for item in self.under_way.values() for block in getattr(item.operation, "block_ids", ())}
        held, kept = len(live.block_ids), set(self.scenes.queue._hash_of)
        total = request.num_computed_tokens + num_local + num_loaded + num_new_tokens
        hit_ids = hits.get_block_ids()[0] if hits is not None else []
        needed = max(0, -(-total // BLOCK_SIZE) - held - len(hit_ids)) + sum(block not in before for block in hit_ids)
        granted = self.kv.allocate_slots(
            request,
            num_new_tokens,
            num_local,
            hits,
            num_external_computed_tokens=num_loaded,
            delay_cache_blocks=num_loaded > 0,
        )
        assert (granted is not None) == (needed <= USABLE - len(before)), "kept blocks are not free for a request"
        if granted is None:
            note_event("an allocation was refused")
            return False
        note_event(f"loaded from our tiers: {num_loaded > 0}")
        live.block_ids = list(self.kv.get_block_ids(request.request_id)[0])
        new = live.block_ids[held + len(hit_ids) :]
        assert not set(new) & (busy | before), "a block in use was handed out"
        if set(new) & kept:
            note_event("a request took kept blocks")
        self.poison(new)
        return True

    @precondition(lambda self: len(self.lives) < MAX_REQUESTS)
    @rule(
        user=st.integers(0, USERS - 1),
        path=st.sampled_from(PATHS),
        scene=st.sampled_from([None, *SCENES]),
    )
    def arrive(self, user: int, path: Sequence[int], scene: str | None) -> None:
        token_ids = [token for index, branch in enumerate(path) for token in (branch, index)]
        self.add([*token_ids, 99], f"memos:user{user}-{self.epochs[user]}", scene)

    @initialize(user=st.integers(0, USERS - 1))
    def two_scenes_off_the_gpu(self, user: int) -> None:
        self.turn(user, PATHS[2], SCENES[0])
        self.turn(user, PATHS[3], SCENES[1])
        self.settle()
        assert self.pool.reset_prefix_cache()

    @precondition(lambda self: len(self.lives) < MAX_REQUESTS)
    @rule(user=st.integers(0, USERS - 1), path=st.sampled_from(PATHS), scene=st.sampled_from(SCENES))
    def turn(self, user: int, path: Sequence[int], scene: str) -> None:
        """A request from its arrival to its end, as far as there is room and nothing to wait for."""
        self.arrive(user, path, scene)
        self.try_schedule(self.lives[-1])
        if self.lives[-1].state == "running":
            self.end(self.lives[-1])

    @precondition(lambda self: len(self.lives) < MAX_REQUESTS)
    @rule(num_blocks=st.integers(1, USABLE))
    def arrive_without_memory(self, num_blocks: int) -> None:
        """Pressure: tokens that nobody had before."""
        self.add([1000 + self.num_requests] * (num_blocks * BLOCK_SIZE - 1), None, None)

    @precondition(lambda self: len(self.lives) < MAX_REQUESTS)
    @rule(share=st.floats(0.3, 1))
    def pressure(self, share: float) -> None:
        """A request that takes a share of what is free, kept blocks too, and ends."""
        num_blocks = int(share * self.pool.get_num_free_blocks())
        if num_blocks:
            self.arrive_without_memory(num_blocks)
            live = self.lives[-1]
            self.try_schedule(live)
            assert live.state == "running", "there was room"
            self.end(live)

    @rule(user=st.integers(0, USERS - 1), path=st.sampled_from(PATHS), scene=st.sampled_from(SCENES))
    def declare(self, user: int, path: Sequence[int], scene: str) -> None:
        """A prefix that perhaps no request had is a scene from now on."""
        token_ids = [token for index, branch in enumerate(path) for token in (branch, index)]
        salt = f"memos:user{user}-{self.epochs[user]}"
        payload = {"scene": scene, "token_ids": token_ids, "salt": salt, "lora": None}
        engine = SimpleNamespace(request_block_hasher=block_hasher())
        assert self.side.handle("declare", payload, engine)["blocks"] == len(path)

    @precondition(lambda self: len(self.lives) < MAX_REQUESTS)
    @rule(planner=st.sampled_from("pq"), num_blocks=st.integers(1, 4))
    def build(self, planner: str, num_blocks: int) -> None:
        """An API process runs the next piece, if there is one now."""
        payload = {"planner": planner, "piece_tokens": num_blocks * BLOCK_SIZE, "declared": []}
        piece = self.side.handle("build", payload)["piece"]
        if piece is None:
            return
        note_event("a piece was built")
        self.add(piece["token_ids"], piece["salt"], build=piece["build"])
        live = self.lives[-1]
        kept = set(self.scenes.queue._hash_of)
        num_resident = self.kv.get_computed_blocks(live.request)[1] // BLOCK_SIZE
        self.try_schedule(live)
        assert live.state == "running", "it was claimed because there is room and nothing to wait for"
        assert not set(live.block_ids[num_resident:]) & kept, "it took a block that is expected"
        assert len(live.block_ids) - num_resident <= num_blocks, "the piece is longer than it may be"

    def add(self, token_ids: list[int], salt: str | None, scene: str | None = None, build: str | None = None) -> None:
        self.num_requests += 1
        self.lives.append(Live(make_request(f"r{self.num_requests}", token_ids, salt, scene, build)))
        self.side.added(self.lives[-1].request)
        self.note_hashes(self.lives[-1])

    def note_hashes(self, live: Live) -> None:
        for block_hash in live.request.block_hashes:
            self.salt_of_hash[bytes(block_hash)] = live.request.cache_salt

    @precondition(lambda self: self.any_in("waiting"))
    @rule(data=st.data())
    def schedule(self, data: st.DataObject) -> None:
        self.try_schedule(self.pick(data, "waiting"))

    def try_schedule(self, live: Live) -> None:
        request = live.request
        hits, num_local, _ = self.kv.get_computed_blocks(request)
        num_loaded, is_async = self.side.match(request, num_local)
        if num_loaded is None:
            return
        builds = self.side.memory.builds
        assert builds is None or not builds.is_build(request) or not builds._live, (
            "a piece shares a step with a live request"
        )
        assert is_async == (num_loaded > 0) and num_local + num_loaded < request.num_tokens
        num_new = 0 if is_async else request.num_tokens - num_local
        if not self.allocate(live, num_new, hits, num_local, num_loaded):
            return
        self.side.plan_load(request, live.block_ids, num_loaded)
        if is_async:
            live.state = "loading"
            live.ops = set(self.side._loads[request.request_id])
            request.num_computed_tokens = num_local + num_loaded
        else:
            live.state = "running"
            request.num_computed_tokens = request.num_tokens
            self.compute(live, num_local // BLOCK_SIZE, request.num_tokens)
        self.collect()

    @precondition(lambda self: self.any_in("loaded"))
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """Its copies ended on every rank: vLLM publishes what arrived, and computes the rest."""
        self.go_on(self.pick(data, "loaded"))

    def go_on(self, live: Live) -> None:
        request = live.request
        if not request.num_computed_tokens:
            self.kv.free(request)
            live.block_ids, live.state = [], "waiting"
            return
        num_arrived = request.num_computed_tokens
        self.kv.cache_blocks(request, num_arrived)
        if self.allocate(live, request.num_tokens - num_arrived):
            live.state = "running"
            request.num_computed_tokens = request.num_tokens
            self.compute(live, num_arrived // BLOCK_SIZE, request.num_tokens)

    @precondition(lambda self: self.any_in("running"))
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        live = self.pick(data, "running")
        before = live.request.num_tokens
        if -(-(before + 1) // BLOCK_SIZE) > USABLE:
            return
        live.request.append_output_token_ids(token)
        self.note_hashes(live)
        if self.allocate(live, 1):
            live.request.num_computed_tokens = live.request.num_tokens
            self.compute(live, before // BLOCK_SIZE, live.request.num_tokens)
        else:
            self.end(live)  # vLLM would preempt somebody

    @precondition(lambda self: self.any_in("running"))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.end(self.pick(data, "running"))

    @precondition(lambda self: self.any_in("waiting", "loading", "loaded"))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = self.pick(data, "waiting", "loading", "loaded")
        if live.state == "loading":
            self.side.plan_save(live.request, live.block_ids)
            live.state = "aborted"  # vLLM frees the blocks when the copies end
        else:
            self.end(live)

    def end(self, live: Live) -> None:
        self.side.plan_save(live.request, live.block_ids)
        self.kv.free(live.request)
        self.lives.remove(live)
        self.collect()

    # -- the workers' part ----------------------------------------------------------------------

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), ok=st.integers(0, 5).map(bool), corrupt=st.booleans(), whole=st.booleans())
    def report(self, data: st.DataObject, ok: bool, corrupt: bool, whole: bool) -> None:
        """One rank ends one copy, or all ranks do."""
        item = self.under_way[data.draw(st.sampled_from(sorted(self.under_way)))]
        ranks = sorted(item.ranks)
        for rank in ranks if whole else [data.draw(st.sampled_from(ranks))]:
            self.end_copy(item, rank, ok, corrupt)

    def end_copy(self, item: UnderWay, rank: int, ok: bool = True, corrupt: bool = False) -> None:
        operation = item.operation
        self.run(item, rank, ok)
        item.ranks.discard(rank)
        item.failed |= not ok
        failed = () if ok or not isinstance(operation, Load | Read) else operation.block_ids[-1:]
        if not item.ranks:
            del self.under_way[operation.op_id]
        before = set(self.published().values())
        answer = Result(operation.op_id, ok, None if ok else "broken", failed, 1, 0.0, corrupt and not ok)
        self.side.complete(MemosWorkerMeta([answer]))
        published = set(self.published().values()) - before
        if published:
            note_event("a prefetch was published")
        assert not published or not (item.ranks or item.failed), "published before every rank had its copy"
        assert all(self.salt_of_hash[block_hash] not in self.forgotten for block_hash in published)
        for live in self.lives:
            if operation.op_id in live.ops:
                for block in failed:  # vLLM counts what arrived before the first failed block
                    arrived = live.block_ids.index(block) * BLOCK_SIZE
                    live.request.num_computed_tokens = min(live.request.num_computed_tokens, arrived)
                if not item.ranks:
                    live.ops.discard(operation.op_id)
        for live in list(self.lives):
            if live.state in ("loading", "aborted") and not live.ops:
                if live.state == "loading":
                    live.state = "loaded"
                else:
                    self.kv.free(live.request)
                    self.lives.remove(live)

    def run(self, item: UnderWay, rank: int, ok: bool) -> None:
        match item.operation:
            case Save() as save:
                now = [self.gpu[rank, block] for block in save.block_ids]
                at = rank * len(now)
                assert now == item.saved[at : at + len(now)], "a block was overwritten while it was saved"
                self.host.update(((rank, slot), kv if ok else None) for slot, kv in zip(save.slots, now, strict=True))
            case Write() as write:
                self.files[rank, write.path] = [self.host[rank, slot] for slot in write.slots] if ok else []
            case Load() as load:
                self.deliver(rank, load, [self.host[rank, slot] for slot in load.slots], ok)
            case Read() as read:
                found = [self.files[rank, read.path][position] for position in read.positions]
                self.deliver(rank, read, found, ok)
                self.host.update(
                    ((rank, slot), kv if ok else None) for slot, kv in zip(read.slots or (), found, strict=False)
                )

    def deliver(self, rank: int, operation: Load | Read, found: list[Content | None], ok: bool) -> None:
        """A copy that fails here misses its last block, and says so."""
        for block, kv in zip(operation.block_ids, found, strict=True):
            self.gpu[rank, block] = kv if ok or block != operation.block_ids[-1] else None

    # -- the API processes' part ----------------------------------------------------------------

    @rule(
        planner=st.sampled_from("pq"),
        scenes=st.permutations(SCENES),
        num=st.integers(0, len(SCENES)),
        num_busy=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def expect(self, planner: str, scenes: list[str], num: int, num_busy: int) -> None:
        told = [(float(num - index), scene) for index, scene in enumerate(["nobody's", *scenes][: num + 1])]
        self.side.handle("expect", {"planner": planner, "scenes": told, "busy": scenes[:num_busy]})
        if self.scenes.num_loading_blocks:
            note_event("a prefetch is under way")

    @rule(scene_id=st.sampled_from(SCENES), before=st.permutations(SCENES), num_before=st.integers(0, len(SCENES)))
    def what_is_expected_comes(self, scene_id: str, before: list[str], num_before: int) -> None:
        """With nothing else to do, every expected block that is anywhere gets onto the GPU, whatever is kept there."""
        self.settle()
        told = [(0.1 / (1 + place), each) for place, each in enumerate(before[:num_before])]
        self.side.handle("expect", {"planner": "p", "scenes": []})
        self.side.handle("expect", {"planner": "q", "scenes": told})
        self.settle()
        # More than what requests left there can be worth, which they may come back for.
        self.side.handle("expect", {"planner": "p", "scenes": [(2.0, scene_id)]})
        self.settle()
        scene = self.scenes.known.get(scene_id)
        if scene is None:
            return
        there = [self.scenes._resident(of) is not None for of in scene.hashes]
        first = there.index(False) if False in there else len(there)
        if first:
            note_event("an expected scene came")
        assert not self.tiers.match(scene.keys[first:]).num_blocks
        kept = set(self.scenes.queue._hash_of.values())
        assert set(scene.hashes[:first]) <= kept

    @rule(user=st.integers(0, USERS - 1), really=SOMETIMES)
    def forget(self, user: int, really: bool) -> None:
        if not really:
            return
        salt = f"memos:user{user}-{self.epochs[user]}"
        held = self.referenced()
        theirs = {of for of, whose in self.salt_of_hash.items() if whose == salt}
        self.side.handle("forget", {"salt": salt})
        self.forgotten.add(salt)
        self.epochs[user] += 1
        assert not theirs & {of for block, of in self.published().items() if block not in held}

    @rule()
    def empty_the_gpu(self) -> None:
        self.settle()
        assert self.pool.reset_prefix_cache()

    @rule(really=SOMETIMES)
    def drop_host(self, really: bool) -> None:
        if not really:
            return
        self.side.handle("drop_host", {})

    @rule(seconds=st.sampled_from([PREFETCH_PATIENCE_S / 2, PREFETCH_PATIENCE_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(new_weights=st.booleans(), really=SOMETIMES)
    def reset(self, new_weights: bool, really: bool) -> None:
        """vLLM refuses while blocks are referenced; kept blocks do not count."""
        assert self.pool.reset_prefix_cache() == (not self.referenced())
        if really and new_weights and not self.referenced():
            self.weights += 1
            self.side.reset_cache()

    @rule(really=SOMETIMES)
    def reset_ours_only(self, really: bool) -> None:
        """The operator's call, with requests and copies under way; the weights are the same."""
        if not really:
            return
        self.side.reset_cache()

    @rule()
    def settle(self) -> None:
        """All copies and requests end; then nothing is held by anyone."""
        self.collect()
        while self.under_way or self.lives:
            while self.under_way:
                item = next(iter(self.under_way.values()))
                self.end_copy(item, min(item.ranks))
                self.collect()
            for live in list(self.lives):
                self.end(live)
        assert not self.referenced() and self.pool.get_num_free_blocks() == USABLE
        assert not self.side.holds_blocks and not self.side.has_work
        assert not self.side._loading and not self.side._matched
        assert not len(self.side.memory.held) and not len(self.side.memory.names)
        counts = self.tiers.slots.check_integrity()
        assert counts.writing == counts.pinned == counts.doomed == 0

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def conservation(self) -> None:
        assert self.side.memory.fault is None
        self.collect()
        self.scenes.check_integrity()
        self.tiers.check_integrity()
        self.tiers.disk.check_integrity()
        queue, free = self.pool.free_block_queue, self.pool.free_block_queue.get_all_free_blocks()
        assert queue is self.scenes.queue
        assert queue.num_plain_blocks + queue.num_kept_blocks == queue.num_free_blocks == len(free)
        assert {block.block_id for block in free} | self.referenced() == set(range(1, NUM_BLOCKS))
        assert self.pool.get_num_free_blocks() == USABLE - len(self.referenced())
        assert self.scenes.num_loading_blocks <= IN_FLIGHT_SHARE * NUM_BLOCKS
        assert all(scene_id in self.scenes.known for scene_id in self.scenes._places)

    @invariant()
    def references_are_those_of_requests_and_copies(self) -> None:
        held = [block for live in self.lives for block in live.block_ids]
        for item in self.under_way.values():
            if isinstance(item.operation, Save) or getattr(item.operation, "prefetch", False):
                held += item.operation.block_ids
        waits = {block.block_id for load in self.scenes.loads for block in load.blocks}
        for block in self.pool.blocks[1:]:
            at_most = held.count(block.block_id) + (block.block_id in waits)
            at_least = held.count(block.block_id)
            assert at_least <= block.ref_cnt <= max(at_most, at_least), block

    @invariant()
    def what_is_published_is_there_on_every_rank(self) -> None:
        for block, block_hash in self.published().items():
            for rank in range(WORLD_SIZE):
                assert self.gpu[rank, block] == (block_hash, self.weights)

    @invariant()
    def a_block_that_is_read_or_written_is_not_free(self) -> None:
        busy = {block for item in self.under_way.values() for block in getattr(item.operation, "block_ids", ())}
        assert busy <= self.referenced()
        written = {
            block
            for item in self.under_way.values()
            if isinstance(item.operation, Load | Read)
            for block in item.operation.block_ids
        }
        assert not written & self.published().keys()

    @invariant()
    def the_forgotten_stay_forgotten(self) -> None:
        assert not {scene.request.cache_salt for scene in self.scenes.known} & self.forgotten
        assert not {content.salt for content in self.side.memory.builds._contents.values()} & self.forgotten
        tags = {salts.tag(salt) for salt in self.forgotten}
        found = {
            self.tiers._host_tags[key] for key in self.tiers._host_tags if self.tiers.slots.lookup(key) is not None
        }
        assert not found & tags

    def teardown(self) -> None:
        try:
            self.settle()
            self.side.shutdown()
            assert not self.side.has_work
            assert self.side.match(make_request("late", [1] * 9, "memos:late"), 0) == (0, False)
        finally:
            if self.side.memory is not None:
                self.side.memory.close()
            self.stack.close()


def test_a_request_that_ends_after_a_deletion_registers_no_scene() -> None:
    """Deleting forgets a user's scenes; one that is still running must not bring them back."""
    machine = SceneMachine()
    try:
        machine.add([1, 2, 3, 4, 5], "memos:user0-0", SCENES[0])
        (live,) = machine.lives
        assert machine.allocate(live, 5)
        live.state, live.request.num_computed_tokens = "running", 5
        machine.compute(live, 0, 5)
        machine.side.handle("forget", {"salt": "memos:user0-0"})
        machine.end(live)
        assert machine.side.handle("scene", {"scene": SCENES[0]})["state"] == "unknown"
    finally:
        machine.teardown()


def expect_more_than_may_be_kept(machine: SceneMachine) -> tuple[list[tuple[float, str]], int]:
    """All scenes are on the GPU and expected, the first most; what was told, and how many blocks they have."""
    asked = [(0, PATHS[2]), (0, PATHS[3]), (1, PATHS[2]), (1, PATHS[3])]
    for scene_id, (user, path) in zip(SCENES, asked, strict=True):
        machine.turn(user, path, scene_id)
    machine.settle()
    told = [(1.0 / (1 + index), scene_id) for index, scene_id in enumerate(SCENES)]
    machine.side.handle("expect", {"planner": "p", "scenes": told})
    return told, sum(len(path) for _, path in asked)


def test_blocks_beyond_the_share_that_may_be_kept_come_back_once_there_is_room() -> None:
    machine = SceneMachine()
    try:
        told, num_asked = expect_more_than_may_be_kept(machine)
        assert machine.scenes.queue.num_kept_blocks == int(KEEP_SHARE * NUM_BLOCKS) < num_asked
        machine.side.handle("expect", {"planner": "p", "scenes": told[-1:]})
        assert machine.scenes.queue.num_kept_blocks == machine.scenes.known.get(SCENES[-1]).num_blocks
    finally:
        machine.teardown()


def test_blocks_that_were_given_up_and_are_still_there_stay_when_they_become_valuable() -> None:
    machine = SceneMachine()
    try:
        told, _ = expect_more_than_may_be_kept(machine)
        last = machine.scenes.known.get(SCENES[-1])
        kept = machine.scenes.queue._kept
        assert not kept.keys() >= set(last.hashes), "there is room for all, and the test means nothing"
        machine.side.handle("expect", {"planner": "p", "scenes": [(10.0, SCENES[-1]), *told[:-1]]})
        assert not machine.scenes.num_loading_blocks, "what is there is not copied again"
        assert kept.keys() >= set(last.hashes)
        assert len(kept) == machine.scenes.budget_blocks
        machine.conservation()
    finally:
        machine.teardown()


def test_a_valuable_scene_takes_the_place_of_less_valuable_blocks() -> None:
    machine = SceneMachine()
    try:
        machine.turn(1, PATHS[3], SCENES[3])
        machine.empty_the_gpu()
        for scene_id, (user, path) in zip(SCENES, [(0, PATHS[2]), (0, PATHS[3]), (1, PATHS[2])], strict=False):
            machine.turn(user, path, scene_id)
        machine.settle()
        told = [(0.2, SCENES[0]), (0.15, SCENES[1]), (0.1, SCENES[2])]
        machine.side.handle("expect", {"planner": "p", "scenes": told})
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[3]), *told]})
        machine.settle()
        states = {each: machine.side.handle("scene", {"scene": each})["state"] for each in SCENES}
        assert states == dict.fromkeys([SCENES[0], SCENES[1], SCENES[3]], "ready") | {SCENES[2]: "stored"}
        assert machine.side.handle("scene", {"scene": SCENES[2]})["prefetch"] == "deferred"
        machine.conservation()
    finally:
        machine.teardown()


def test_a_request_has_its_prefetches_hurried_and_loads_none_of_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits as long as one after the other ends; what it asks for in each step is put together once."""
    machine = SceneMachine()
    try:
        machine.turn(0, PATHS[1], SCENES[0])
        machine.turn(1, PATHS[1], SCENES[1])
        machine.empty_the_gpu()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0]), (0.9, SCENES[1])]})
        machine.collect()
        own = set(machine.scenes.known.get(SCENES[0]).keys)
        keys_of = {op_id: machine.tiers._in_flight._pending[op_id].keys for op_id in machine.under_way}
        ours = [op_id for op_id, keys in keys_of.items() if own & set(keys)]
        assert 2 <= len(ours) < len(keys_of)
        asked, looked_up = [], []
        hurry, match = machine.tiers.hurry, machine.tiers.match
        monkeypatch.setattr(machine.tiers, "hurry", lambda keys: (asked.append(keys), hurry(keys))[1])
        monkeypatch.setattr(machine.tiers, "match", lambda keys: (looked_up.append(len(keys)), match(keys))[1])
        machine.arrive(0, PATHS[1], SCENES[0])
        (live,) = machine.lives
        for op_id in ours:
            for _ in range(2):
                machine.try_schedule(live)
                machine.collect()
                assert live.state == "waiting" and machine.hurried == ours
            machine.now += PREFETCH_PATIENCE_S * 0.9
            machine.try_schedule(live)
            assert live.state == "waiting"
            for rank in range(WORLD_SIZE):
                machine.end_copy(machine.under_way[op_id], rank)
        assert len(asked) > 2 and all(keys is asked[0] for keys in asked)
        assert max(looked_up, default=0) <= 1, "what it would find is not counted while it waits"
        monkeypatch.undo()
        machine.try_schedule(live)
        assert live.state in ("running", "loading")
        again = {key for op_id in live.ops for key in machine.tiers._in_flight._pending[op_id].keys}
        assert again.isdisjoint(key for op_id in ours for key in keys_of[op_id])
    finally:
        machine.teardown()


def test_prefetches_are_paced_while_requests_run_and_none_waits_for_them() -> None:
    machine = SceneMachine()
    try:
        machine.turn(0, PATHS[0], SCENES[0])
        machine.empty_the_gpu()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
        machine.collect()
        assert machine.side.take_metadata(idle=False).paced and not machine.side.take_metadata(idle=True).paced
        machine.arrive(0, PATHS[0], SCENES[0])
        assert machine.side.match(machine.lives[0].request, 0) == (None, False)
        assert not machine.side.take_metadata(idle=False).paced
        assert machine.side.take_metadata(idle=False).paced, "it did not ask again"
        assert machine.side.will_free_blocks() and not machine.side.take_metadata(idle=False).paced
        machine.settle()
        assert not machine.side.will_free_blocks() and machine.side.take_metadata(idle=False).paced
    finally:
        machine.teardown()


def ready_to_come(machine: SceneMachine, *scene_ids: str) -> None:
    """Scenes off the GPU; the planner tells of them once more than one copy is needed."""
    for user, scene_id in enumerate(scene_ids):
        machine.turn(user % USERS, PATHS[2 + user // USERS], scene_id)
    machine.empty_the_gpu()


def test_nothing_is_started_for_others_while_a_request_has_no_blocks() -> None:
    machine = SceneMachine()
    try:
        ready_to_come(machine, SCENES[0], SCENES[1])
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
        machine.collect()
        under_way = list(machine.under_way.values())
        machine.arrive_without_memory(USABLE)  # more than is free while a prefetch holds blocks
        machine.try_schedule(machine.lives[-1])
        assert machine.lives[-1].state == "waiting"
        machine.collect()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0]), (0.9, SCENES[1])]})
        for item in under_way:
            for rank in range(WORLD_SIZE):
                machine.end_copy(item, rank)
        machine.collect()
        assert not machine.under_way and not machine.scenes.num_loading_blocks
        machine.try_schedule(machine.lives[-1])
        assert machine.lives[-1].state == "running", "live requests win"
        machine.end(machine.lives[-1])
        machine.side.handle("expect", {"planner": "p", "scenes": [(2.0, SCENES[1])]})
        assert machine.scenes.num_loading_blocks, "and prediction goes on"
    finally:
        machine.teardown()


def test_a_request_does_not_wait_for_copies_that_get_nowhere() -> None:
    machine = SceneMachine()
    try:
        ready_to_come(machine, SCENES[0])
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
        machine.now += 1000.0  # nothing was under way meanwhile
        machine.collect()
        assert machine.side.will_free_blocks()
        machine.now += COPY_PATIENCE_S / 2
        assert machine.side.will_free_blocks()
        item = next(iter(machine.under_way.values()))
        machine.end_copy(item, 0)
        machine.now += COPY_PATIENCE_S * 0.9
        assert machine.side.will_free_blocks(), "one rank has its copy"
        machine.now += COPY_PATIENCE_S * 0.2
        assert machine.side.holds_blocks and not machine.side.will_free_blocks()
    finally:
        machine.teardown()


def test_what_prefetches_hold_arrives_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SceneMachine()
    try:
        monkeypatch.setattr(prefetch_room, "IN_FLIGHT_SHARE", 1.0)
        machine.scenes.chunk_blocks = machine.scenes.room._chunk_blocks = 1
        ready_to_come(machine, SCENES[0], SCENES[1])
        copies = machine.tiers.copies["host_to_gpu", "prefetch"]
        for blocks_per_s, expected in ((10.0, 2), (40.0, 4), (1e6, 11)):
            copies.size_bytes, copies.seconds = int(blocks_per_s * machine.tiers.block_bytes), 1.0
            machine.scenes.room.new_step(is_starved=False)
            machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, each) for each in SCENES[:2]]})
            assert machine.scenes.num_loading_blocks == expected
            machine.settle()
            machine.empty_the_gpu()
    finally:
        machine.teardown()


def test_one_step_starts_so_many_blocks_however_often_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_room, "STARTED_BLOCKS", 3)
    machine = SceneMachine()
    try:
        ready_to_come(machine, SCENES[0], SCENES[1])
        for planner in "pqr":
            machine.side.handle("expect", {"planner": planner, "scenes": [(1.0, each) for each in SCENES[:2]]})
            assert machine.scenes.num_loading_blocks == 3
        machine.collect()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, each) for each in SCENES[:2]]})
        assert machine.scenes.num_loading_blocks == 6
    finally:
        machine.teardown()


def test_scenes_in_use_cost_a_plan_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SceneMachine()
    try:
        ready_to_come(machine, *SCENES)
        looked: list[Any] = []
        find = scene_loads.Places.find
        monkeypatch.setattr(scene_loads.Places, "find", lambda self, of: looked.append(of) or find(self, of))
        machine.side.handle("expect", {"planner": "p", "scenes": [], "busy": SCENES[1:]})
        assert not looked and not machine.scenes.num_loading_blocks
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])], "busy": SCENES[1:]})
        assert looked and set(looked) <= set(machine.scenes.known.get(SCENES[0]).hashes)
        assert machine.scenes.num_loading_blocks
        machine.settle()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[1])], "busy": []})
        assert machine.scenes.num_loading_blocks, "it is brought once no request has it"
    finally:
        machine.teardown()


def test_an_aborted_prefill_does_not_cut_its_scene_short() -> None:
    machine = SceneMachine()
    try:
        machine.turn(0, PATHS[2], SCENES[0])
        machine.settle()
        size = machine.scenes.known.get(SCENES[0]).num_blocks
        for path, is_whole, expected in (
            (PATHS[2], False, size),  # the client was gone after the first chunk
            (PATHS[2], True, size),
            (PATHS[3], False, 1),  # the conversation was changed, and this much of it is known
        ):
            machine.arrive(0, path, SCENES[0])
            live = machine.lives[-1]
            machine.try_schedule(live)
            if not is_whole:
                live.request.num_computed_tokens = BLOCK_SIZE + 1
            machine.end(live)
            assert machine.scenes.known.get(SCENES[0]).num_blocks == expected
    finally:
        machine.teardown()


def test_a_tail_that_no_later_request_has_is_left_out() -> None:
    """What is recalled for one question stands before it, and is gone in the next turn's history."""
    machine = SceneMachine()
    try:
        shown = []
        for path in ([5, 5, 5, 1, 1], [5, 5, 5, 2, 2, 2], [5, 5, 5, 3, 3], [5, 5, 5, 3, 3, 4], [5, 5, 5, 3, 3, 4, 4]):
            machine.turn(0, path, SCENES[0])
            shown.append(machine.scenes.known.get(SCENES[0]).num_blocks)
            machine.settle()
        assert shown == [5, 6, 5 - 2, 6, 7], "of two turns the shorter tail; none once a request had all of it"
        for branch in (6, 7, 8, 9):
            machine.turn(0, [branch] * 5, SCENES[1])
            assert machine.scenes.known.get(SCENES[1]).num_blocks == 5, "about something else each time"
            machine.settle()

        for path in ([5, 5, 1, 1, 1], [5, 5, 2, 2, 2], [5, 5, 3, 3, 3]):
            machine.turn(0, path, SCENES[0])
        machine.empty_the_gpu()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
        machine.settle()
        state = machine.side.handle("scene", {"scene": SCENES[0]})
        assert (state["state"], state["blocks"]) == ("ready", 2)
        before = machine.side.handle("status", {})["prediction"]
        machine.turn(0, [5, 5, 4, 4], SCENES[0])
        assert machine.side.handle("status", {})["prediction"]["ready"] == before["ready"] + 1
        machine.empty_the_gpu()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
        machine.settle()
        turn_from_the_tiers(machine, [5, 5, 4, 4, 4], SCENES[0])
        after = machine.side.handle("status", {})["prediction"]
        assert after["ready"] == before["ready"] + 1, "it shared more than was brought, and is not counted as ready"
    finally:
        machine.teardown()


@pytest.mark.parametrize(
    ("value", "waited_s", "comes"), [(1e-6, 0, False), (0.01, 0, False), (0.01, 3600, True), (0.9, 60, True)]
)
def test_what_ordinary_requests_use_again_and_again_is_not_given_up_for_what_hardly_comes(
    value: float, waited_s: float, comes: bool
) -> None:
    machine = SceneMachine()
    try:
        ready_to_come(machine, SCENES[0])
        prefix = [1000] * ((USABLE - 2) * BLOCK_SIZE)
        for _ in range(3):  # a client without memory, whose prompts begin alike
            machine.add([*prefix, machine.num_requests], None)
            machine.try_schedule(machine.lives[-1])
            machine.end(machine.lives[-1])
        hot = {bytes(of) for of in make_request("x", prefix, None).block_hashes}
        assert hot <= set(machine.published().values()) and machine.scenes.queue.plain.reuse > 0.9
        machine.scenes.queue.plain._now = lambda: time.monotonic() + waited_s
        for _ in range(5):
            machine.scenes.room.new_step(is_starved=False)
            machine.side.handle("expect", {"planner": "p", "scenes": [(value, SCENES[0])]})
            machine.settle()
        assert (hot <= set(machine.published().values())) != comes
        assert (machine.side.handle("scene", {"scene": SCENES[0]})["state"] == "ready") == comes
    finally:
        machine.teardown()


def test_what_failed_to_load_is_loaded_when_it_is_expected_again() -> None:
    machine = SceneMachine()
    try:
        machine.turn(0, PATHS[0], SCENES[0])
        machine.empty_the_gpu()
        for ok in (False, True):
            machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
            machine.collect()
            (item,) = machine.under_way.values()
            for rank in range(WORLD_SIZE):
                machine.end_copy(item, rank, ok)
            machine.collect()
            assert not machine.under_way, "a load that failed is not repeated unasked"
        assert machine.side.handle("scene", {"scene": SCENES[0]})["state"] == "ready"
    finally:
        machine.teardown()


def test_kv_of_an_adapters_old_weights_is_not_filed_under_its_new_ones(tmp_path: Path) -> None:
    """Saved anew under the same name and path, which is all that vLLM hashes: it finds the old blocks on the GPU."""
    from vllm.lora.request import LoRARequest

    machine = SceneMachine()
    (tmp_path / "adapter_config.json").write_text("{}")
    keys = []
    try:
        for lora_id, weights in ((1, "old"), (2, "new"), (3, "old")):
            (tmp_path / "adapter_model.safetensors").write_text(weights)
            machine.add([1, 2, 3, 4, 5], "memos:user0-0")
            live = machine.lives[-1]
            adapter = LoRARequest("sql", lora_id, str(tmp_path))
            live.request = make_request(live.request.request_id, [1, 2, 3, 4, 5], "memos:user0-0", lora=adapter)
            machine.note_hashes(live)
            machine.try_schedule(live)
            keys.append(machine.side.memory.names.keys(live.request))
            machine.end(live)
            machine.settle()
        assert keys[0] == keys[2] != keys[1]
        assert [machine.tiers.match(each).num_blocks for each in keys[:2]] == [2, 0]
    finally:
        machine.teardown()


def in_tiers(machine: SceneMachine, scene_id: str) -> tuple[int, int]:
    """How many blocks of a scene are in host memory, and how many on disk."""
    keys = machine.scenes.known.get(scene_id).keys
    on_disk = [machine.tiers.disk.lookup(key) for key in keys]
    return sum(machine.tiers.slots.lookup(key) is not None for key in keys), sum(map(bool, on_disk))


def turn_from_the_tiers(machine: SceneMachine, path: Sequence[int], scene_id: str) -> None:
    """A request that loads what it can, from its arrival to its end."""
    machine.arrive(0, path, scene_id)
    live = machine.lives[-1]
    machine.try_schedule(live)
    while live.state == "loading":
        item = next(iter(machine.under_way.values()))
        machine.end_copy(item, min(item.ranks))
    if live.state == "loaded":
        machine.go_on(live)
    machine.end(live)
    machine.settle()


def test_what_is_always_served_from_the_host_keeps_its_file() -> None:
    machine = SceneMachine()
    try:
        turn_from_the_tiers(machine, [5] * 6, SCENES[0])
        for other in range(4):
            turn_from_the_tiers(machine, [10 + other] * 6, SCENES[1])
            machine.empty_the_gpu()
            turn_from_the_tiers(machine, [5] * 6, SCENES[0])
        assert machine.tiers.totals.saved_blocks > machine.tiers.slots.num_slots, "some were evicted"
        assert in_tiers(machine, SCENES[0]) == (6, 6)
    finally:
        machine.teardown()


def test_prefetches_that_are_planned_together_take_no_host_copy_from_each_other() -> None:
    """A read from disk makes room for its blocks in the host; what is to go there may be the next of the plan."""
    machine = SceneMachine()
    try:
        for scene_id, number in zip(SCENES, (10, 5, 11), strict=False):
            turn_from_the_tiers(machine, [number] * 6, scene_id)
        machine.empty_the_gpu()
        for key in machine.scenes.known.get(SCENES[1]).keys:  # its files are gone, as after a failed write
            if (location := machine.tiers.disk.lookup(key)) is not None:
                machine.tiers.disk.drop(location.chunk)
        assert [in_tiers(machine, each) for each in SCENES[:3]] == [(0, 6), (6, 0), (6, 6)]
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0]), (0.5, SCENES[1])]})
        machine.settle()
        resident = [machine.side.handle("scene", {"scene": each})["resident_blocks"] for each in SCENES[:2]]
        assert resident[0] == 6 and resident[1] >= 1, "what was planned came"
        machine.conservation()
    finally:
        machine.teardown()


def test_a_prefetch_that_fails_leaves_alone_what_a_request_brought_meanwhile() -> None:
    machine = SceneMachine()
    try:
        machine.turn(0, PATHS[2], SCENES[0])
        machine.empty_the_gpu()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
        machine.collect()
        prefetches = list(machine.under_way.values())
        machine.arrive(0, PATHS[2], SCENES[0])
        (live,) = machine.lives
        machine.try_schedule(live)
        assert live.state == "waiting", "for the prefetch"
        machine.now += PREFETCH_PATIENCE_S
        machine.try_schedule(live)
        while live.state == "loading":
            item = next(each for each in machine.under_way.values() if each not in prefetches)
            machine.end_copy(item, min(item.ranks))
        machine.go_on(live)
        machine.end(live)
        kept = machine.scenes.queue.num_kept_blocks
        assert kept
        for item in prefetches:
            for rank in range(WORLD_SIZE):
                machine.end_copy(item, rank, ok=False)
        assert machine.scenes.queue.num_kept_blocks == kept
        machine.conservation()
        machine.settle()
        machine.pressure(1.0)
    finally:
        machine.teardown()


@pytest.mark.parametrize("broken", ["plan", "absent", "evict", "publish", "update"])
def test_an_error_in_prediction_ends_prediction_and_nothing_else(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = SceneMachine()
    scenes = machine.scenes

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("a slip")

    try:
        machine.turn(0, PATHS[2], SCENES[0])
        machine.turn(0, PATHS[3], SCENES[1])
        machine.empty_the_gpu()
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
        machine.collect()
        prefetches = list(machine.under_way.values())
        assert prefetches and machine.side.holds_blocks
        if broken == "publish":
            monkeypatch.setattr(SceneLoads, "publish", fail)
        else:
            monkeypatch.setattr(ResidencyPolicy, broken, (lambda *_: None) if broken == "evict" else fail)
        for item in prefetches:
            for rank in range(WORLD_SIZE):
                machine.end_copy(item, rank, ok=broken != "absent")
        machine.side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[1])]})
        if broken == "evict":
            machine.settle()
            assert machine.scenes.queue.num_kept_blocks
            machine.pressure(1.0)
            assert "does not know" in caplog.text and machine.side.memory.fault is None
            machine.conservation()
            return
        assert "a slip" in machine.side.memory.fault and machine.side.memory.scenes is None
        monkeypatch.undo()  # it stays off
        assert machine.side.handle("status", {})["prediction"] == {"enabled": False, "fault": "KeyError: 'a slip'"}
        assert machine.side.handle("expect", {"planner": "p", "scenes": []}) == {"enabled": False}
        machine.settle()
        assert not scenes.queue.num_kept_blocks and scenes.queue.num_plain_blocks == USABLE
        turn_from_the_tiers(machine, PATHS[2], SCENES[0])
        assert machine.pool.reset_prefix_cache()
        machine.tiers.check_integrity()
    finally:
        monkeypatch.undo()
        machine.teardown()


@pytest.mark.parametrize("owner, broken", [
    *((SceneBuilds, name) for name in ("added", "must_wait", "is_build", "scheduled", "finished", "show", "used")),
    *((SceneBuilds, name) for name in ("claim", "unknown", "give_up", "forget", "clear")),
    *((SceneTable, name) for name in ("use", "count_wasted", "state", "expected_blocks", "register", "closest")),
])  # fmt: skip
def test_an_error_anywhere_in_prediction_or_building_ends_no_request(
    owner: type, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = SceneMachine()

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("a slip")

    try:
        machine.turn(0, PATHS[2], SCENES[0])
        side = machine.side
        monkeypatch.setattr(owner, broken, fail)
        machine.turn(0, PATHS[2], SCENES[0])
        side.handle("expect", {"planner": "p", "scenes": [(1.0, SCENES[0])]})
        side.handle("scene", {"scene": SCENES[0]})
        side.handle("build", {"planner": "p", "piece_tokens": 64, "declared": [SCENES[0]]})
        side.handle("give_up_builds", {"lora_name": "style"})
        side.handle("forget", {"salt": "memos:of nobody"}).result()
        side.reset_cache()
        stats = side.take_stats()
        machine.settle()
        machine.empty_the_gpu()
        assert stats is not None and "a slip" in side.memory.fault
        gauges = stats.data["gauges"]
        assert gauges["memos:prediction_failed"] == 1 and gauges["memos:tier_used_bytes|gpu"] == 0
        monkeypatch.undo()
        turn_from_the_tiers(machine, PATHS[2], SCENES[0])
        machine.tiers.check_integrity()
    finally:
        monkeypatch.undo()
        machine.teardown()


TestSceneMachine = SceneMachine.TestCase
TestSceneMachine.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # Phase.explain takes minutes here
)
