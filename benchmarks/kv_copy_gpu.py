"""The copy benchmark's arms that need a GPU: the link's limit, vLLM's own copies, each method alone, a decode loop.

vLLM's arms get their best case: pinned memory of their own layout, pointers prepared before the clock runs.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.kv_copy_rig import PLANES, Rig, Row, Shape, WrongBytes, paired, row
from memos_vllm.store.copy_planner import CopyPlan, Direction, Measured
from memos_vllm.store.pipeline import Method

DECODE_LAYERS = 32
DECODE_WIDTH = 4096
DECODE_STEPS = 400
WINDOWS = 6
MOST_DMA_FRAGMENTS = 2**14
"""More take seconds each time; a planner that has measured fewer does not take them."""
COPY_SHAPE = Shape(64 * 2**10, 1024)


class LinkLimit:
    """One pinned copy of all bytes; both ways: half of them each way at a time, on two streams."""

    def __init__(self, size_bytes: int) -> None:
        self._host = torch.empty(2, size_bytes, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(2, size_bytes, dtype=torch.uint8, device="cuda")

    def load(self) -> None:
        self._device[0].copy_(self._host[0], non_blocking=True)
        torch.cuda.synchronize()

    def save(self) -> None:
        self._host[1].copy_(self._device[1], non_blocking=True)
        torch.cuda.synchronize()


def copies(rig: Rig, shape: Shape, repeats: int, plan: CopyPlan) -> Iterator[Row]:
    """The engine with this machine's plan, then each method alone and vLLM's two, all against the same limit.

    Both ways are compared with the engine's own load, so that a share of 1.5 is the target.
    """
    limit = LinkLimit(shape.size_bytes)
    limits = {"load": limit.load, "save": limit.save, "both": rig.load}
    for arm, arm_plan in {"engine": plan, **{method.value: only(method) for method in Method}}.items():
        if arm == Method.DMA and shape.fragments > MOST_DMA_FRAGMENTS:
            continue
        rig.use(arm_plan)
        rig.save()
        rig.verify(rig.load, arm)
        for direction, run in {"load": rig.load, "save": rig.save, "both": rig.both}.items():
            if direction == "both" and (arm != "engine" or shape.num_blocks < 2):
                continue
            yield row(arm, direction, shape, paired(run, limits[direction], repeats, torch.cuda.synchronize))
    rig.use(plan)
    rig.save()
    for arm, runs in _vllm(shape).items():
        for direction, run in runs.items():
            yield row(arm, direction, shape, paired(run, limits[direction], repeats, torch.cuda.synchronize))


def only(method: Method) -> CopyPlan:
    """A plan that always takes one method."""
    speeds = {each: float(each is method) for each in Method}
    return CopyPlan(
        [Measured(direction, each, 1, 1, speed) for direction in Direction for each, speed in speeds.items()]
    )


def _vllm(shape: Shape) -> dict[str, dict[str, Callable[[], None]]]:
    """vLLM's two ways between fragments; empty where this build has none."""
    try:
        from vllm import _custom_ops as ops
        from vllm.v1.kv_offload.cpu import swap_blocks_triton
    except ImportError:
        return {}
    blocks = torch.randperm(2 * shape.num_blocks)[: shape.num_blocks]
    device = [
        torch.zeros(2 * shape.num_blocks, shape.fragment_bytes, dtype=torch.uint8, device="cuda") for _ in range(PLANES)
    ]
    host = torch.randint(0, 256, (PLANES, shape.num_blocks, shape.fragment_bytes), dtype=torch.uint8).pin_memory()
    expected = host.clone()
    here = torch.tensor([host[p, i].data_ptr() for p in range(PLANES) for i in range(shape.num_blocks)])
    there = torch.tensor([device[p][block].data_ptr() for p in range(PLANES) for block in blocks.tolist()])
    sizes = torch.full_like(here, shape.fragment_bytes)
    chunk = min(1 << (shape.fragment_bytes - 1).bit_length(), 8192)

    swaps = {
        "vllm_dma": ops.swap_blocks_batch,
        "vllm_triton": partial(swap_blocks_triton.swap_blocks_batch, bytes_per_chunk=chunk),
    }
    torch.cuda.synchronize()  # what was queued above, on another stream than theirs
    arms: dict[str, dict[str, Callable[[], None]]] = {}
    for arm, swap in swaps.items():
        run = on_its_own_stream(swap)
        runs = {
            "load": partial(run, here, there, sizes, is_src_access_order_any=True),
            "save": partial(run, there, here, sizes, is_src_access_order_any=False),
        }
        try:
            runs["load"]()
            host.zero_()
            runs["save"]()
        except (AttributeError, NotImplementedError) as error:  # this build lacks it; the verdict says so
            print(f"{arm} is left out: {type(error).__name__}: {error}", file=sys.stderr)
            host.copy_(expected)
            continue
        if not torch.equal(host, expected):
            raise WrongBytes(f"{arm}: fragments of {shape.fragment_bytes} bytes differ")
        arms[arm] = runs
    return arms


def on_its_own_stream(swap: Callable[..., None]) -> Callable[..., None]:
    """Also waits. On the default stream, which refuses a batch, vLLM copies the fragments one by one."""
    stream = torch.cuda.Stream()

    def run(*args: Any, **kwargs: Any) -> None:
        with torch.cuda.stream(stream):
            swap(*args, **kwargs)
        torch.cuda.synchronize()

    return run


def interference(plan: CopyPlan) -> Row:
    """Inter-token latency of a decode loop, with and without prefetches beside it, in alternating windows.

    The loop stands for a model of 32 layers of 4096: as many matrix-vector products in one CUDA graph, one
    token after the other, read back to the host. ``benchmarks.multiuser`` measures a real server.
    """
    weights = [
        torch.randn(3 * DECODE_WIDTH, DECODE_WIDTH, dtype=torch.bfloat16, device="cuda") * 0.01
        for _ in range(DECODE_LAYERS)
    ]
    x = torch.randn(1, DECODE_WIDTH, dtype=torch.bfloat16, device="cuda")

    def step() -> torch.Tensor:
        state = x
        for weight in weights:
            state = torch.nn.functional.rms_norm((state @ weight.T)[:, :DECODE_WIDTH], (DECODE_WIDTH,))
        return state

    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def window() -> list[float]:
        gaps = []
        for _ in range(DECODE_STEPS):
            begin = time.perf_counter()
            graph.replay()
            out[0, :1].tolist()
            gaps.append(time.perf_counter() - begin)
        return gaps

    rig = Rig(COPY_SHAPE, torch.device("cuda"), Path(os.devnull), plan)
    gaps: dict[bool, list[float]] = {False: [], True: []}
    try:
        window()
        for number in range(WINDOWS):
            for copying in (False, True) if number % 2 else (True, False):
                stop = threading.Event()
                thread = threading.Thread(target=_prefetch, args=(rig, stop))
                if copying:
                    thread.start()
                gaps[copying] += window()
                stop.set()
                if copying:
                    thread.join()
        rig.verify(rig.load, "prefetch beside a decode loop")
    finally:
        rig.close()
    off, on = (report.percentile(gaps[copying], 0.99) for copying in (False, True))
    return {
        "arm": "decode",
        "direction": "interference",
        "itl_p50_off_s": statistics.median(gaps[False]),
        "itl_p50_on_s": statistics.median(gaps[True]),
        "itl_p99_off_s": off,
        "itl_p99_on_s": on,
        "itl_p99_ratio": on / off,
        "n": len(gaps[True]),
    }


def _prefetch(rig: Rig, stop: threading.Event) -> None:
    while not stop.is_set():
        rig.load(prefetch=True)
