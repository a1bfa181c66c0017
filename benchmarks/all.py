"""Every benchmark that needs no data from elsewhere, one after another, with results named after the hardware.

    python -m benchmarks.all --preset smoke|cpu|gpu [--results DIR] [--label NAME] [--only NAME ...] [--within-s S]

Each runs in a process of its own, so one that fails or hangs takes no other with it; what it printed is in
``DIR/NAME-LABEL.txt`` beside its JSON and its plot, and its servers' logs are in ``DIR/server-logs``. With ``gpu``,
the kernels are compared with their references first, and the two measurements that nothing but a GPU can give,
copies and the interference of prefetches with decoding, come before those that a CPU has given already; servers
run a first selection of arms and lengths, and each benchmark by itself (``python -m benchmarks.ttft --preset gpu``)
has the rest.

With ``--within-s`` a step for which too little time is left is skipped, with a line. The one that runs when the time
is up is told to end, and writes what it has; that takes up to 30 s more.

Exits with 1 if any of them did not end well.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.arguments import directory
from benchmarks.serving import LOG_DIRECTORY, has_gpu

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
    gpu_flags: tuple[str, ...] = ()
    """Further ones with the preset gpu."""
    least_s: float = 0.0
    """With less time left it is not begun: until its first figures, on a GPU. Estimates."""
    beside: bool = False
    """It runs beside the next one, and the one after that waits for both."""


STEPS = [
    Step("models", "models", ("Qwen3-8B",), writes=(), presets=("gpu",), beside=True),
    Step("kernel_check", "kernel_check", ("--device", "{device}"), least_s=20),
    Step("kv_copy", "kv_copy", writes=("json", "plot"), least_s=20),
    Step("multiuser-interference", "multiuser", ("--preset", "{preset}", "--interference"), least_s=75),
    Step(
        "multiuser",
        "multiuser",
        writes=("json", "plot"),
        gpu_flags=("--arms", "prefix_cache,reactive,warm,predictive"),
        least_s=120,
    ),
    Step(
        "ttft",
        "ttft",
        writes=("json", "plot"),
        gpu_flags=(
            *("--model", "Qwen3-8B", "--contexts", "2773,6064", "--queries", "167"),
            *("--repeats", "3", "--hits", "2", "--no-restart"),
        ),
        least_s=90,
    ),
    Step("layer_groups", "layer_groups", least_s=90),
    Step("fp8_divergence", "fp8_divergence", least_s=60),
    Step("adapters", "adapters", least_s=120),
    Step("kernel_report", "kernel_report", (), least_s=60),
    Step("memory", "memory", presets=("smoke", "cpu")),  # plaintext memory never sees a GPU
]
_ENDINGS = {"json": "json", "plot": "png"}


@dataclass(frozen=True)
class Outcome:
    step: Step
    code: int | None
    """0: all is well, and so are its figures; negative: it was stopped by a signal; None: it was skipped."""
    seconds: float

    @property
    def text(self) -> str:
        if self.code is None:
            return "skipped"
        return "well" if self.code == 0 else f"with {self.code}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    console = report.console()
    outcomes = outcomes_of(arguments, console)
    table = Table("benchmark", "ended", "seconds")
    for each in outcomes:
        table.add_row(each.step.name, each.text, f"{each.seconds:.0f}")
    console.print(table)
    return int(any(each.code for each in outcomes))


def outcomes_of(arguments: argparse.Namespace, console: Console) -> list[Outcome]:
    """Runs the steps; each is named when it begins, and what it printed is printed when it has ended."""
    outcomes: list[Outcome] = []
    results = Path(arguments.results)
    environment = {**os.environ, LOG_DIRECTORY: str(results.resolve() / "server-logs")}
    deadline = time.monotonic() + arguments.within_s
    with ExitStack() as stack:
        running: list[tuple[Step, float, Process]] = []
        for step in arguments.steps:
            left_s = deadline - time.monotonic()
            if left_s <= step.least_s:
                line = f"{step.name}: skipped; {max(0.0, left_s):.0f} s are left, and it needs {step.least_s:.0f}"
                console.print(line, highlight=False)
                outcomes.append(Outcome(step, None, 0.0))
                continue
            command = command_of(step, arguments.preset, results, arguments.label)
            console.print(f"[bold]{step.name}[/]: {' '.join(command[1:])}", highlight=False)
            log = results / f"{step.name}-{arguments.label}.txt"
            process = Process(command, log, min(arguments.limit_s, left_s), environment)
            stack.callback(process.stop)
            running.append((step, time.monotonic(), process))
            if not step.beside:
                outcomes += _ended(running, console)
        return outcomes + _ended(running, console)


def _ended(running: list[tuple[Step, float, Process]], console: Console) -> list[Outcome]:
    """Waits for them, shows what they printed, and empties the list."""
    outcomes = []
    for step, began, process in running:
        outcomes.append(Outcome(step, process.wait(), time.monotonic() - began))
        console.print(process.log.read_text(encoding="utf-8", errors="replace"), highlight=False, markup=False)
    running.clear()
    return outcomes


class Process:
    """One that runs; what it prints goes to ``log``."""

    def __init__(
        self, command: Sequence[str], log: Path, limit_s: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self._ends_at = time.monotonic() + limit_s
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )

    def wait(self) -> int:
        """Its exit code. When its time is up it is stopped, with all it started."""
        try:
            return self._process.wait(max(0.0, self._ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            return -signal.SIGTERM

    def stop(self) -> None:
        """Does nothing to one that has ended."""
        if self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run(command: Sequence[str], log: Path, limit_s: float) -> int:
    return Process(command, log, limit_s).wait()


def command_of(step: Step, preset: str, results: Path, label: str) -> list[str]:
    filled = {"preset": preset, "device": "cuda" if preset == "gpu" else "cpu"}
    flags = [flag.format(**filled) for flag in (*step.flags, *(step.gpu_flags if preset == "gpu" else ()))]
    for option in step.writes:
        flags += [f"--{option}", str(results / f"{step.name}-{label}.{_ENDINGS[option]}")]
    return [sys.executable, "-m", f"benchmarks.{step.module}", *flags]


def default_label() -> str:
    """The hardware in letters that a file name takes: ``nvidia-h200``, ``cpu-2core``."""
    machine = report.machine()
    text = machine["gpu"] or ("gpu" if has_gpu() else f"cpu {machine['cores']}core")
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
    parser.add_argument("--limit-s", type=_seconds, default=3600.0, metavar="S", help="for each; default: %(default)s")
    parser.add_argument("--within-s", type=_seconds, default=math.inf, metavar="S", help="for all; default: no limit")
    arguments = parser.parse_args(argv)
    arguments.preset = arguments.preset or ("gpu" if has_gpu() else "cpu")
    if arguments.preset == "gpu" and not has_gpu():
        parser.error("the preset gpu needs an NVIDIA GPU and vLLM's CUDA build; take --preset cpu")
    arguments.label = arguments.label or default_label()
    arguments.steps = steps_of(arguments.preset, arguments.only)
    if not arguments.steps:
        parser.error(f"none of these runs with --preset {arguments.preset}")
    return arguments


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _label(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is to be part of a file name: letters, digits, '.', '_' and '-'")
    return text


if __name__ == "__main__":
    sys.exit(main())
