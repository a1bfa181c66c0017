"""KV copies through the transfer engine, against the fastest copy of the same bytes.

    python -m benchmarks.kv_copy --preset smoke|cpu|gpu [--json FILE] [--plot FILE.png]
    python -m benchmarks.kv_copy --plan [--data-dir DIRECTORY]

``engine`` is what vLLM's worker calls: queue, threads, host slots, link, checksums. Directions:

    load, save   host slots to blocks and back; the limit is one plain copy of as many bytes (on a
                 GPU one pinned DMA)
    both         half of the bytes each way at a time
    disk         files to blocks, checksums on; the limit is a raw sequential read in the same state of the
                 page cache, `cold` (dropped before each run) or `warm`
    promote      the same, into host slots as well

Arms take turns, a share is the median over pairs of runs. With a GPU also each of the planner's methods alone
(`staged`, `direct`, `dma`), vLLM's own copies (`vllm_dma`, `vllm_triton`), and what copies cost a decode
loop that runs beside them. Bytes are checked before and after; wrong bytes have no speed and end in code 1.
What was measured is written after every cell, since a run may be ended at any time.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import kv_copy_table, report
from benchmarks.arguments import directory, output_file
from benchmarks.kv_copy_rig import (
    PLANES,
    FileRead,
    HostCopy,
    Rig,
    Row,
    Shape,
    WrongBytes,
    drop_from_page_cache,
    paired,
    row,
)
from memos_vllm.store.copy_planner import CopyPlan


@dataclass(frozen=True)
class Options:
    fragment_bytes: tuple[int, ...]
    total_bytes: tuple[int, ...]
    """Per cell; with the fragment's size it gives their count."""
    repeats: int
    gpu: bool = False
    file_bytes: int = 64 * 2**20
    """Cells up to this size read files too: a larger one would take a minute to say the same."""
    file_fragment_bytes: tuple[int, ...] | None = None
    """And with fragments of these sizes; all by default."""


_SIZES = tuple(2**power for power in range(12, 22))
PRESETS = {
    "smoke": Options((4 * 2**10, 64 * 2**10), (4 * 2**20,), 3),
    "cpu": Options(_SIZES, (64 * 2**20,), 15),
    # An estimate: a minute. The most telling cells first, as in the planner.
    "gpu": Options(
        (64 * 2**10, 16 * 2**10, 256 * 2**10, 4 * 2**10, 2**20, 2**21),
        (256 * 2**20, 64 * 2**20),
        7,
        gpu=True,
        file_fragment_bytes=(64 * 2**10,),
    ),
}


def has_gpu() -> bool:
    """Whether torch reaches one. Copies need no vLLM; without its CUDA build only the comparison with it is missing."""
    return torch.cuda.is_available()


def main(argv: Sequence[str] | None = None) -> int:
    # As Ctrl-C: the files are removed on the way out, and what was measured is still shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _parse(argv)
    console = report.console()
    if arguments.plan:
        kv_copy_table.show_plan(console, _machine_plan(arguments) if has_gpu() else CopyPlan())
        return 0
    options: Options = arguments.options
    rows: list[Row] = []
    failures: list[str] = []
    plan = _machine_plan(arguments) if options.gpu else CopyPlan()

    def save() -> None:
        if arguments.json:
            flags = {"preset": arguments.preset, "repeats": options.repeats, "failures": failures}
            report.write_json(arguments.json, "kv_copy", flags, rows)

    try:
        for what, cell in cells(options, plan, arguments.directory):
            try:
                rows += cell()
            except WrongBytes as error:
                failures.append(f"wrong bytes: {error}; this cell has no speed")
            except Exception as error:  # no memory on the GPU, an operation that failed: the others still count
                failures.append(f"{what}: {type(error).__name__}: {error}")
            save()
    except KeyboardInterrupt:
        failures.append("interrupted")
        save()
    if options.gpu:
        kv_copy_table.show_plan(console, plan)
    kv_copy_table.show(console, rows, failures)
    if arguments.plot and any("fragment_bytes" in one for one in rows):
        kv_copy_table.plot(arguments.plot, rows)
    return 1 if failures else 0


def cells(options: Options, plan: CopyPlan, where: str | None) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """What is to be measured, and how; one after another."""
    shapes = [
        Shape(size, max(total // size // PLANES, 1) * PLANES)
        for total in options.total_bytes
        for size in options.fragment_bytes
    ]
    with report.progress("kv_copy", len(shapes)) as advance:
        for number, shape in enumerate(shapes):
            what = f"{shape.fragment_bytes} x {shape.fragments}"
            yield what, partial(measure, shape, options, plan, where)
            advance(what)
            if options.gpu and number == 0:
                from benchmarks import kv_copy_gpu

                yield "interference", lambda: [kv_copy_gpu.interference(plan)]


def _machine_plan(arguments: argparse.Namespace) -> CopyPlan:
    """As a server has it that was started often enough to have measured everything."""
    from memos_vllm.store.cuda_device import plan_of

    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(arguments.data_dir or temporary)
        plan = plan_of(device, directory)
        while not plan.complete and (more := plan_of(device, directory)).measured != plan.measured:
            plan = more
        return plan


def measure(shape: Shape, options: Options, plan: CopyPlan, where: str | None) -> list[Row]:
    """All rows of one cell. Raises WrongBytes, and the cell has no row."""
    device = torch.device("cuda") if options.gpu else torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=where, prefix="kv-copy-") as files:
        rig = Rig(shape, device, Path(files), plan)
        try:
            rows = list(_copies(rig, shape, options, plan))
            sizes = options.file_fragment_bytes
            if shape.size_bytes <= options.file_bytes and (sizes is None or shape.fragment_bytes in sizes):
                rows += _files(rig, shape, options)
            rig.verify(rig.load, "load, after the runs")
            return rows
        finally:
            rig.close()


def _copies(rig: Rig, shape: Shape, options: Options, plan: CopyPlan) -> Iterator[Row]:
    if options.gpu:
        from benchmarks import kv_copy_gpu

        yield from kv_copy_gpu.copies(rig, shape, options.repeats, plan)
        return
    limit = HostCopy(shape.size_bytes)
    runs = {"load": (rig.load, limit.load), "save": (rig.save, limit.save)}
    if shape.num_blocks > 1:
        runs["both"] = (rig.both, limit.load)
    for direction, (run, copy) in runs.items():
        yield row("engine", direction, shape, paired(run, copy, options.repeats, lambda: None))


def _files(rig: Rig, shape: Shape, options: Options) -> Iterator[Row]:
    rig.save()
    rig.write()
    rig.verify(rig.read, "disk")
    limit, files = FileRead(shape.size_bytes), rig.files()
    states = {"warm": lambda: None, "cold": lambda: drop_from_page_cache(files)}
    for cache, before in states.items():
        reads = {"disk": rig.read, "promote": lambda: rig.read(promote=True)}
        for direction, read in reads.items():
            pairs = paired(read, lambda: limit.run(files), options.repeats, before)
            yield row("engine", direction, shape, pairs) | {"cache": cache}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_copy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="default: gpu where there is one, else cpu")
    parser.add_argument("--sizes", nargs="+", type=_size, metavar="BYTES", help="fragment sizes")
    parser.add_argument("--totals", nargs="+", type=_size, metavar="BYTES", help="bytes of a cell")
    parser.add_argument("--repeats", type=_size, metavar="N", help="pairs of runs per row")
    parser.add_argument("--directory", type=directory, help="for the files; default: where temporary files go")
    parser.add_argument("--plan", action="store_true", help="print what the planner measured and what it takes")
    parser.add_argument("--data-dir", type=directory, help="where --plan finds and keeps the plan")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    arguments.preset = arguments.preset or ("gpu" if has_gpu() else "cpu")
    if arguments.preset == "gpu" and not has_gpu():
        parser.error("the preset gpu needs an NVIDIA GPU and a CUDA build of PyTorch; take --preset cpu")
    options = PRESETS[arguments.preset]
    if arguments.sizes:
        options = replace(options, fragment_bytes=tuple(sorted(set(arguments.sizes))))
    if arguments.totals:
        options = replace(options, total_bytes=tuple(sorted(set(arguments.totals), reverse=True)))
    arguments.options = replace(options, repeats=arguments.repeats or options.repeats)
    return arguments


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
