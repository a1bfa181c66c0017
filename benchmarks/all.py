"""Every benchmark that needs no data from elsewhere, one after another, with results named after the hardware.

    python -m benchmarks.all --preset smoke|cpu|gpu [--results DIR] [--label NAME] [--only NAME ...]

Each runs in a process of its own, so one that fails or hangs takes no other with it; what it printed is in
``DIR/NAME-LABEL.txt`` beside its JSON and its plot. With ``gpu``, the kernels are compared with their references
first, and the two measurements that nothing but a GPU can give, copies and the interference of prefetches with
decoding, come before those that a CPU has given already.

Exits with 1 if any of them did not end well.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks import report
from benchmarks.arguments import directory
from benchmarks.serving import has_gpu

PRESETS = ("smoke", "cpu", "gpu")
STOP_S = 30.0
"""From the request to end to the kill: servers that a benchmark has started stop with it."""


@dataclass(frozen=True)
class Step:
    """One command; ``{preset}`` and ``{device}`` in its flags are filled in."""

    name: str
    module: str
    flags: tuple[str, ...] = ("--preset", "{preset}")
    writes: tuple[str, ...] = ("json",)
    """Options that take a file, which are also the endings of its name."""
    presets: tuple[str, ...] = PRESETS


STEPS = [
    Step("kernel_check", "kernel_check", ("--device", "{device}"), writes=()),
    Step("kv_copy", "kv_copy", writes=("json", "plot")),
    Step("multiuser-interference", "multiuser", ("--preset", "{preset}", "--interference")),
    Step("multiuser", "multiuser", writes=("json", "plot")),
    Step("ttft", "ttft", writes=("json", "plot")),
    Step("adapters", "adapters"),
    Step("fp8_divergence", "fp8_divergence"),
    Step("kernel_report", "kernel_report", ()),
    Step("memory", "memory", presets=("smoke", "cpu")),  # plaintext memory never sees a GPU
]
_ENDINGS = {"json": "json", "plot": "png"}


@dataclass(frozen=True)
class Outcome:
    step: Step
    code: int
    """0: all is well, and so are its figures; negative: it was stopped by a signal."""
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    console = report.console()
    outcomes = []
    for step in arguments.steps:
        command = command_of(step, arguments.preset, Path(arguments.results), arguments.label)
        console.print(f"[bold]{step.name}[/]: {' '.join(command[1:])}", highlight=False)
        log = Path(arguments.results) / f"{step.name}-{arguments.label}.txt"
        began = time.monotonic()
        outcomes.append(Outcome(step, run(command, log, arguments.limit_s), time.monotonic() - began))
        console.print(log.read_text(encoding="utf-8", errors="replace"), highlight=False, markup=False)
    table = Table("benchmark", "ended", "seconds")
    for each in outcomes:
        table.add_row(each.step.name, "well" if each.code == 0 else f"with {each.code}", f"{each.seconds:.0f}")
    console.print(table)
    return int(any(each.code for each in outcomes))


def command_of(step: Step, preset: str, results: Path, label: str) -> list[str]:
    filled = {"preset": preset, "device": "cuda" if preset == "gpu" else "cpu"}
    flags = [flag.format(**filled) for flag in step.flags]
    for option in step.writes:
        flags += [f"--{option}", str(results / f"{step.name}-{label}.{_ENDINGS[option]}")]
    return [sys.executable, "-m", f"benchmarks.{step.module}", *flags]


def run(command: Sequence[str], log: Path, limit_s: float) -> int:
    """Its exit code; what it prints goes to ``log``. After ``limit_s`` seconds it is stopped, with all it started."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return -signal.SIGTERM
            raise


def default_label() -> str:
    """The hardware in letters that a file name takes: ``nvidia-h200``, ``cpu-2core``."""
    machine = report.machine()
    text = machine["gpu"] if machine["gpu"] else f"cpu {machine['cores']}core"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def steps_of(preset: str, only: Iterable[str]) -> list[Step]:
    names = set(only)
    return [step for step in STEPS if preset in step.presets and (not names or step.name in names)]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is one, else cpu")
    parser.add_argument("--results", type=directory, default="benchmarks/results", help="default: %(default)s")
    parser.add_argument("--label", type=_label, help="what the files' names end with; default: the hardware")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], choices=[step.name for step in STEPS])
    parser.add_argument("--limit-s", type=float, default=3600.0, metavar="S", help="for each; default: %(default)s")
    arguments = parser.parse_args(argv)
    arguments.preset = arguments.preset or ("gpu" if has_gpu() else "cpu")
    if arguments.preset == "gpu" and not has_gpu():
        parser.error("the preset gpu needs an NVIDIA GPU and vLLM's CUDA build; take --preset cpu")
    arguments.label = arguments.label or default_label()
    arguments.steps = steps_of(arguments.preset, arguments.only)
    if not arguments.steps:
        parser.error(f"none of these runs with --preset {arguments.preset}")
    return arguments


def _label(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is to be part of a file name: letters, digits, '.', '_' and '-'")
    return text


if __name__ == "__main__":
    sys.exit(main())
