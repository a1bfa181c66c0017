"""Every kernel against its plain-torch reference on the GPU that is there: one command, pass or fail.

    python -m benchmarks.kernel_check [--device cuda] [--jobs N] [--json FILE]

Copies and fp8 must be equal bit for bit; a shift must stay within the bound that kernels/rotary.py
derives. All layouts, dtypes and options are run, with rows in the GPU's memory and in page-locked host
memory, with one program and many, and with a block that lies more than 4 GiB behind the first. What
would be overwritten by a wrong address is filled beforehand and compared as well.

Nearly all of its time goes into compiling, so several processes share the cases; those with a kernel in common stay
together. Needs neither Hypothesis nor pytest. ``--device cpu`` checks the loops for CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.arguments import output_file
from memos_vllm.kernels import rotary
from memos_vllm.kernels.heads import HeadShape, HeadView, heads_of
from memos_vllm.kernels.kv_copy import BlockCopier, block_bytes, planes_of
from memos_vllm.kernels.reference import (
    gather_fp8_reference,
    gather_reference,
    rotate,
    scatter_heads_reference,
    scatter_reference,
)
from memos_vllm.kernels.rotary import RotaryShift
from memos_vllm.store.host_memory import HostMemory, RowGroup
from tests.kernels.kernel_factories import BLOCKS, DTYPES, LAYOUTS, MLA, ODD_LAYOUTS, POISON, VALUE_DTYPES, bits

TOKENS, HEADS = 16, 4
IDS = [9, 1, 2, 0, 8, 7, 3]
FAR_BLOCKS = 2**20 + 1
ROTATED = [(80, 80, 0), (128, 128, 0), (128, 32, 8)]  # head size, rotated elements, the first of them


MOST_JOBS = 12
"""Each has a CUDA context, half a gigabyte, and imports torch and Triton."""


@dataclass(frozen=True)
class Case:
    name: str
    kernel: str
    """Cases of one text compile the same kernels."""
    run: Callable[[], float]
    """The largest error as a share of the bound: 0 where all is equal, infinite where it had to be and is not."""


@dataclass(frozen=True)
class Verdict:
    case: str
    share: float | None
    """As ``Case.run`` has it; None if it could not run."""
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.share is not None and self.share <= 1

    @property
    def text(self) -> str:
        if self.share is None:
            return f"FAILED {self.case}: {self.error}"
        if not self.ok:
            return f"FAILED {self.case}: error is {self.share:.3g} of the bound"
        return f"ok     {self.case}: error is {self.share:.3f} of the bound"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("kernel_check: there is no GPU; --device cpu checks the loops for CPU", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}", flush=True)
    verdicts: list[Verdict] = []
    for found in _checked(device, arguments.jobs):
        verdicts += found
        for verdict in found:
            if verdict.share != 0:
                print(verdict.text, flush=True)
        if arguments.json:
            rows = [
                {"case": one.case, "ok": one.ok, "error_of_bound": one.share if one.ok else None, "error": one.error}
                for one in verdicts
            ]
            report.write_json(arguments.json, "kernel_check", {"device": device, "jobs": arguments.jobs}, rows)
    failed = sum(not verdict.ok for verdict in verdicts)
    print(f"{len(verdicts)} cases, {failed} failed")
    return 1 if failed else 0


def _checked(device: str, jobs: int) -> Iterator[list[Verdict]]:
    """Verdicts as they come."""
    if jobs == 1:
        torch.manual_seed(0)
        yield from ([check(case, device)] for case in cases(device))
        return
    kernels = list(dict.fromkeys(case.kernel for case in cases(device)))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(check_kernel, device, kernel): kernel for kernel in kernels}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool as error:  # a kernel that ends its process, with all that wait
                yield [Verdict(f"all cases of {futures[future]}", None, str(error))]


def check_kernel(device: str, kernel: str) -> list[Verdict]:
    torch.manual_seed(0)
    return [check(case, device) for case in cases(device) if case.kernel == kernel]


_ended_by: list[str] = []
"""The case of this process whose error was the GPU's: after an illegal access CUDA answers nothing but that error."""


def check(case: Case, device: str) -> Verdict:
    if _ended_by:
        return Verdict(case.name, None, f"not run: {_ended_by[0]!r} ended this process's use of the GPU")
    try:
        share = case.run()
        _wait(device)
    except Exception as error:  # a case that cannot run says nothing about the others
        try:
            _wait(device)
        except Exception:
            _ended_by.append(case.name)
        return Verdict(case.name, None, f"{type(error).__name__}: {error}")
    return Verdict(case.name, share)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--jobs", type=_count, metavar="N", help="processes; default: one per core with a GPU, else 1")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    arguments = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments.jobs = arguments.jobs or (min(MOST_JOBS, cores) if arguments.device == "cuda" else 1)
    return arguments


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def cases(device: str) -> Iterator[Case]:
    memories = ["device", "pinned"] if device == "cuda" else ["device"]
    layouts = {**LAYOUTS, "mla": MLA}
    for memory in memories:
        for name in [*layouts, *ODD_LAYOUTS]:
            for dtype in DTYPES:
                run = partial(_copy, device, name, dtype, memory)
                yield Case(f"copy, {name}, {dtype}, {memory}", f"copy of {name}", run)
        for name in layouts:
            for dtype in VALUE_DTYPES:
                for size in [576] if name == "mla" else [64, 80, 128, 256]:
                    yield Case(
                        f"fp8, {name}, heads of {size}, {dtype}, {memory}",
                        f"fp8, {size}, {dtype}",
                        partial(_fp8, device, name, dtype, size, memory),
                    )
    for name in layouts:
        for dtype in VALUE_DTYPES:
            for size, rotary_dim, first in [(576, 64, 512)] if name == "mla" else ROTATED:
                for style in ("neox", "gptj"):
                    for fp8 in (False, True):
                        shift = RotaryShift.by(-1234, _frequencies(rotary_dim), style, first)
                        yield Case(
                            f"{style} shift of {rotary_dim}, {name}, heads of {size}, {dtype}{', fp8' * fp8}",
                            f"{style} shift, {size}, {rotary_dim}, {dtype}, {fp8}",
                            partial(_shift, device, name, dtype, size, shift, fp8),
                        )
    yield Case("copy to and from the host pool", "copy", partial(_host_pool, device))
    yield Case("copy of a block behind 4 GiB", "copy", partial(_far, device))


def _copy(device: str, name: str, dtype: torch.dtype, memory: str) -> float:
    def make(*shape: int) -> Tensor:
        return _anything(*shape, dtype=dtype, device=device)

    layouts = {**LAYOUTS, "mla": MLA}
    caches = layouts[name].caches(make, TOKENS, HEADS, 24) if name in layouts else ODD_LAYOUTS[name](make)
    planes = planes_of(caches, BLOCKS)
    copier = BlockCopier(planes)
    share = 0.0
    for gap, programs in [(0, 8), (16, 1), (13, 1000)]:
        rows = _rows(len(IDS), copier.row_bytes + gap, device, memory)
        expected = rows.clone()
        copier.gather(IDS, rows[:, : copier.row_bytes], num_programs=programs)
        _wait(device)
        gather_reference(planes, IDS, expected[:, : copier.row_bytes])
        share = max(share, _differs(rows, expected))

        chunk = rows[:, : copier.row_bytes]
        chunk.copy_(_anything(*chunk.shape, dtype=torch.uint8, device="cpu"))
        before = [plane.clone() for plane in planes]
        copier.scatter(chunk, IDS, num_programs=programs)
        found = [plane.clone() for plane in planes]
        for plane, old in zip(planes, before, strict=True):
            plane.copy_(old)
        scatter_reference(chunk.to(device), planes, IDS)
        share = max([share, *(_differs(plane, new) for plane, new in zip(planes, found, strict=True))])
    return share


def _fp8(device: str, name: str, dtype: torch.dtype, head_size: int, memory: str) -> float:
    caches, heads, copier = _store(device, name, head_size, dtype, True, _anything)
    rows = _rows(len(IDS), copier.row_bytes, device, memory)
    expected = rows.clone()
    copier.gather(IDS, rows)
    _wait(device)
    gather_fp8_reference(heads, copier.layout, IDS, expected)
    share = _differs(rows, expected)

    before = [cache.clone() for cache in caches]
    copier.scatter(rows, IDS)
    found = [cache.clone() for cache in caches]
    for cache, old in zip(caches, before, strict=True):
        cache.copy_(old)
    scatter_heads_reference(rows.to(device), heads, copier.layout, IDS)
    for cache, new in zip(caches, found, strict=True):
        share = max(share, _differs(cache.isnan(), new.isnan()), _differs(cache.nan_to_num(0), new.nan_to_num(0)))
    return share


def _shift(device: str, name: str, dtype: torch.dtype, head_size: int, shift: RotaryShift, fp8: bool) -> float:
    _, heads, copier = _store(device, name, head_size, dtype, fp8, _normal)
    rows = _rows(len(IDS), copier.row_bytes, device, "device")
    copier.gather(IDS, rows)
    copier.scatter(rows, IDS)  # fp8: from here on another round trip changes nothing
    plain = [head.view.clone() for head in heads]
    copier.scatter(rows, IDS, shift=shift)
    share = 0.0
    for head, old in zip(heads, plain, strict=True):
        if not head.is_key:
            share = max(share, _differs(head.view, old))
            continue
        exact, limit = old.double(), torch.zeros_like(old, dtype=torch.float64)
        exact[IDS] = rotate(exact[IDS], shift)
        parts = zip(shift.pairs(exact[IDS]), shift.pairs(limit), strict=True)
        first, second = shift.pairs(old[IDS].double())
        for result, part in parts:
            part[IDS] = rotary.error_bound(first, second, result, dtype)
        off = (head.view.double() - exact).abs()
        share = max(share, float(torch.where(off == 0, 0.0, off / limit).max()))
    return share


def _host_pool(device: str) -> float:
    """Slots in any order, where the transfer engine keeps KV; on a GPU the kernel reaches them over the link."""
    cache = _anything(2, BLOCKS, TOKENS, HEADS, 64, dtype=torch.bfloat16, device=device)
    planes = planes_of([cache], BLOCKS)
    copier = BlockCopier(planes)
    host = HostMemory(64, copier.row_bytes, True, torch.device(device))
    slots = [40, 3, 4, 63, 0, 17, 18]
    [group] = host.groups(slots)
    reachable(group, device)
    copier.gather(IDS, group.matrix, group.rows)
    _wait(device)
    expected = _rows(len(IDS), copier.row_bytes, device, "device")
    gather_reference(planes, IDS, expected)
    share = _differs(group.matrix[slots], expected)
    before = cache.clone()
    cache[:, IDS] = 0
    copier.scatter(group.matrix, IDS, group.rows)
    _wait(device)
    host.close()
    return max(share, _differs(cache, before))


def reachable(group: RowGroup, device: str) -> None:
    """Raises RuntimeError where a kernel may not use the rows: it would end the process's use of the GPU."""
    if device == "cuda" and not group.pinned:
        raise RuntimeError(
            "cudaHostRegister failed, so no kernel can read host memory here, and all copies are slow; raise the limit "
            "of locked memory (ulimit -l). Kernels themselves are not wrong for it"
        )


def _far(device: str) -> float:
    planes = planes_of([torch.empty(FAR_BLOCKS, 4096, dtype=torch.uint8, device=device)], FAR_BLOCKS)
    copier = BlockCopier(planes)
    chunk = _anything(1, copier.row_bytes, dtype=torch.uint8, device=device)
    copier.scatter(chunk, [FAR_BLOCKS - 1])
    rows = _rows(1, block_bytes(planes), device, "device")
    copier.gather([FAR_BLOCKS - 1], rows)
    return max(_differs(rows, chunk), _differs(planes[0][FAR_BLOCKS - 1], chunk[0]))


def _store(
    device: str, name: str, head_size: int, dtype: torch.dtype, fp8: bool, make: Callable[..., Tensor]
) -> tuple[list[Tensor], list[HeadView], BlockCopier]:
    layout = {**LAYOUTS, "mla": MLA}[name]
    num_heads = 1 if name == "mla" else HEADS
    caches = layout.caches(lambda *shape: make(*shape, dtype=dtype, device=device), TOKENS, num_heads, head_size)
    planes = planes_of(caches, BLOCKS)
    heads = heads_of(caches, BLOCKS, HeadShape(num_heads, head_size, layout.order))
    return caches, heads, BlockCopier(planes, heads, fp8)


def _anything(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random bits."""
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * width), dtype=torch.uint8).view(dtype).to(device)


def _normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(device)


def _rows(num_rows: int, row_bytes: int, device: str, memory: str) -> Tensor:
    if memory == "pinned":
        return torch.full((num_rows, row_bytes), POISON, dtype=torch.uint8).pin_memory()
    return torch.full((num_rows, row_bytes), POISON, dtype=torch.uint8, device=device)


def _frequencies(rotary_dim: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def _differs(found: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(bits(found).cpu(), bits(expected).cpu()) else float("inf")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
