"""A transfer worker over planes of its own, driven as vLLM's worker drives it; and copies to compare it with."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.store.copy_planner import CopyPlan
from memos_vllm.store.host_memory import HostMemory
from memos_vllm.store.identity import FORMAT_VERSION, KVIdentity
from memos_vllm.store.kv_file import PIECE_BYTES
from memos_vllm.store.link import link_for
from memos_vllm.store.ops import Load, Op, Read, Save, Write, path_for_rank
from memos_vllm.store.transfer import TransferWorker
from memos_vllm.types import BlockKey

Row = dict[str, Any]

PLANES = 16
"""K and V of eight layers."""
CHUNK_BYTES = 32 * 2**20
"""``kv.chunk_bytes``: the largest operation that the scheduler side gives."""
IO_THREADS = 2
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Shape:
    """``fragments`` contiguous pieces of ``fragment_bytes`` on the device."""

    fragment_bytes: int
    fragments: int

    @property
    def num_blocks(self) -> int:
        return self.fragments // PLANES

    @property
    def block_bytes(self) -> int:
        return self.fragment_bytes * PLANES

    @property
    def size_bytes(self) -> int:
        return self.fragment_bytes * self.fragments


class WrongBytes(Exception):
    """What arrived is not what was sent: there is no speed to print."""


class Rig:
    """Blocks in random order among as many others, host slots in order, operations of at most a chunk.

    Args:
        directory: for files.
        plan: of the link; by default everything is staged.
    """

    def __init__(self, shape: Shape, device: torch.device, directory: Path, plan: CopyPlan | None = None) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator().manual_seed(shape.fragment_bytes)
        total = 2 * shape.num_blocks
        fill = torch.Generator(device).manual_seed(shape.fragment_bytes)
        self.planes = [
            torch.randint(0, 256, (total, shape.fragment_bytes), dtype=torch.uint8, generator=fill, device=device)
            for _ in range(PLANES)
        ]
        self._expected = [plane.clone() for plane in self.planes]
        self._blocks = torch.randperm(total, generator=generator)[: shape.num_blocks].tolist()
        self._worker = self._start(plan or CopyPlan())
        self._path = str(directory / f"{shape.fragment_bytes}-{shape.fragments}-{{part}}.r{{rank}}")
        step = max(1, CHUNK_BYTES // shape.block_bytes)
        starts = range(0, shape.num_blocks, step)
        self._parts = [range(start, min(start + step, shape.num_blocks)) for start in starts]
        self.save()  # touches the pages of the slots, as a server's warm pool has them
        self._zero()
        self.load()
        self._check("save and load")

    def _start(self, plan: CopyPlan) -> TransferWorker:
        link = link_for(BlockCopier(self.planes), self.planes, plan)
        on_gpu = self.device.type == "cuda"
        return TransferWorker(link, 2 * self.shape.num_blocks, _identity(self.shape), 0, IO_THREADS, on_gpu)

    def use(self, plan: CopyPlan) -> None:
        """Goes on with another plan, and empty host slots."""
        self.close()
        self._worker = self._start(plan)

    def close(self) -> None:
        self._worker.shutdown(0.0)

    def save(self) -> None:
        self._run([Save(i, self._ids(part), tuple(part)) for i, part in enumerate(self._parts)])

    def load(self, prefetch: bool = False) -> None:
        self._run([Load(i, tuple(part), self._ids(part), prefetch) for i, part in enumerate(self._parts)])

    def both(self) -> None:
        """Half of the blocks is loaded while the other half is saved."""
        half = self.shape.num_blocks // 2
        blocks, spare = self._blocks, self.shape.num_blocks
        self._run(
            [
                Save(1, tuple(blocks[half:]), tuple(range(spare, spare + len(blocks) - half))),
                Load(2, tuple(range(half)), tuple(blocks[:half])),
            ]
        )

    def write(self) -> None:
        """The host slots to files."""
        self._run(
            [Write(i, str(i), self._file(i), tuple(part), self._keys(part)) for i, part in enumerate(self._parts)]
        )

    def read(self, promote: bool = False) -> None:
        """Files to blocks; with ``promote`` into host slots as well."""
        self._run(
            [
                Read(
                    i, str(i), self._file(i), tuple(range(len(part))), self._keys(part), self._ids(part),
                    tuple(part) if promote else None,
                )
                for i, part in enumerate(self._parts)
            ]
        )  # fmt: skip

    def files(self) -> list[str]:
        return [path_for_rank(self._file(i), 0) for i in range(len(self._parts))]

    def verify(self, run: Callable[[], None], what: str) -> None:
        """Raises WrongBytes unless ``run`` brings every byte into zeroed blocks, and only there."""
        self._zero()
        run()
        self._check(what)

    def _zero(self) -> None:
        for plane in self.planes:
            plane[self._blocks] = 0
        self._synchronize()

    def _check(self, what: str) -> None:
        self._synchronize()
        if not all(map(torch.equal, self.planes, self._expected)):
            raise WrongBytes(f"{what}: blocks of {self.shape.fragment_bytes} x {PLANES} bytes differ")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _run(self, ops: Sequence[Op]) -> None:
        after = None
        if self.device.type == "cuda":
            after = torch.cuda.Event()
            after.record()
        self._worker.submit(ops, after)
        left = len(ops)
        while left:
            if not self._worker.wait(PATIENCE_S):
                raise RuntimeError(f"no operation ended within {PATIENCE_S:g} s")
            for result in self._worker.drain():
                if not result.ok:
                    raise RuntimeError(f"an operation failed: {result.error}")
                left -= 1

    def _ids(self, part: range) -> tuple[int, ...]:
        return tuple(self._blocks[part.start : part.stop])

    @staticmethod
    def _keys(part: range) -> tuple[BlockKey, ...]:
        return tuple(BlockKey(position.to_bytes(32, "big")) for position in part)

    def _file(self, index: int) -> str:
        return self._path.replace("{part}", str(index))


class HostCopy:
    """The limit in CPU memory: one memcpy of as many bytes, one thread, between memory of the same two kinds.

    Blocks lie in torch's memory, in pages of 4 KiB; host slots in huge pages. Both were touched before.
    """

    def __init__(self, size_bytes: int) -> None:
        self._blocks = torch.ones(size_bytes, dtype=torch.uint8).numpy()
        (group,) = HostMemory(1, size_bytes, False, torch.device("cpu")).groups([0])
        self._slots = group.matrix[0].numpy()
        self._slots.fill(1)

    def load(self) -> None:
        np.copyto(self._blocks, self._slots)

    def save(self) -> None:
        np.copyto(self._slots, self._blocks)


class FileRead:
    """The limit for files: sequential reads of 8 MiB, one thread, no checksum, into memory that was touched before.

    It begins at a cache line, as blocks do: 16 bytes behind one, where numpy's begins, the read may take twice as long.
    """

    def __init__(self, size_bytes: int) -> None:
        self._target = memoryview(torch.ones(size_bytes + 2**20, dtype=torch.uint8).numpy())

    def run(self, paths: Sequence[str]) -> None:
        filled = 0
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                while count := os.readv(fd, [self._target[filled : filled + PIECE_BYTES]]):
                    filled += count
            finally:
                os.close(fd)


def drop_from_page_cache(paths: Sequence[str]) -> None:
    """So that the next read comes from the disk; the files must be synced."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Pairs:
    """Two arms, run in turn: medians, and the median of the ratios within a pair (1: as fast as the limit)."""

    seconds: float
    limit_seconds: float
    share: float


def paired(run: Callable[[], None], limit: Callable[[], None], repeats: int, before: Callable[[], None]) -> Pairs:
    """``before`` runs ahead of each of the two, untimed; who begins a pair alternates."""
    times: list[tuple[float, float]] = []
    for repeat in range(repeats):
        order = (run, limit) if repeat % 2 else (limit, run)
        took = {}
        for arm in order:
            before()
            begin = time.perf_counter()
            arm()
            took[arm] = time.perf_counter() - begin
        times.append((took[run], took[limit]))
    ours, limits = zip(*times, strict=True)
    share = statistics.median(limit / own for own, limit in times)
    return Pairs(statistics.median(ours), statistics.median(limits), share)


def _identity(shape: Shape) -> KVIdentity:
    return KVIdentity(
        FORMAT_VERSION, "benchmark", "", "", "", "uint8", "auto", 16, "sha256", "", "tp1pp1",
        (f"uint8[{shape.fragment_bytes}]",) * PLANES,
    )  # fmt: skip


def row(arm: str, direction: str, shape: Shape, pairs: Pairs) -> Row:
    return {
        "arm": arm,
        "direction": direction,
        "fragment_bytes": shape.fragment_bytes,
        "fragments": shape.fragments,
        "gb_per_s": shape.size_bytes / pairs.seconds / 1e9,
        "limit_gb_per_s": shape.size_bytes / pairs.limit_seconds / 1e9,
        "share": pairs.share,
    }
