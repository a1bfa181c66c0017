"""Rows of the copy benchmark to a table, a verdict and a plot; the planner's table and choice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memos_vllm.store.copy_planner import CopyPlan, Direction
from memos_vllm.store.pipeline import Method

Row = dict[str, Any]

TARGET_BYTES = 64 * 2**20
TARGET_CPU = 0.8
TARGET_LOAD_GPU = 0.9
TARGET_BOTH_GPU = 1.5
SMALLEST_TARGET_BYTES = 8 * 2**10
TARGET_ITL = 1.05
COLORS = {
    "engine": "#e69f00",
    "staged": "#f0c27a",
    "direct": "#d55e00",
    "dma": "#7f5f00",
    "vllm_dma": "#0072b2",
    "vllm_triton": "#56b4e9",
}


def size_name(size_bytes: int) -> str:
    return f"{size_bytes // 2**20} MiB" if size_bytes >= 2**20 else f"{size_bytes // 2**10} KiB"


def show(console: Console, rows: Sequence[Row], failures: Sequence[str]) -> None:
    copies = [one for one in rows if "fragment_bytes" in one]
    columns = sorted({(one["direction"], one.get("cache", ""), one["arm"]) for one in copies}, key=_order)
    for total in sorted({_size(one) for one in copies}):
        cells = {
            (one["fragment_bytes"], one["direction"], one.get("cache", ""), one["arm"]): one
            for one in copies
            if _size(one) == total
        }
        table = Table(title=f"{size_name(total)} at a time: GB/s (share of the limit)", title_justify="left")
        table.add_column("fragment")
        for direction, cache, arm in columns:
            table.add_column(f"{direction} {cache}\n{arm}", justify="right")
        for size in sorted({key[0] for key in cells}):
            table.add_row(size_name(size), *(_cell(cells.get((size, *column))) for column in columns))
        console.print(table)
    for line in verdict(rows):
        console.print(line, highlight=False)
    for failure in failures:
        console.print("[red]FAILED[/red]", Text(failure), highlight=False)


def _order(column: tuple[str, str, str]) -> tuple[int, str, int]:
    direction, cache, arm = column
    return ("load", "save", "both", "disk", "promote").index(direction), cache, list(COLORS).index(arm)


def _cell(one: Row | None) -> str:
    return "" if one is None else f"{one['gb_per_s']:.2f} ({one['share']:.2f})"


def verdict(rows: Sequence[Row]) -> list[str]:
    """How the targets are met, one line each."""
    engine = [one for one in rows if one["arm"] == "engine" and _size(one) >= TARGET_BYTES]
    if not engine:
        return [f"no targets: they are for {size_name(TARGET_BYTES)} and more at a time"]
    on_gpu = any(one["arm"] != "engine" for one in rows)
    lines = []
    for direction, cache in (("load", None), ("save", None), ("disk", "warm"), ("disk", "cold")):
        cells = [one for one in engine if one["direction"] == direction and one.get("cache") == cache]
        if on_gpu and direction != "disk":
            cells = [one for one in cells if one["fragment_bytes"] >= SMALLEST_TARGET_BYTES]
        if cells:
            target = TARGET_LOAD_GPU if on_gpu and direction == "load" else TARGET_CPU
            lines.append(_against(f"{direction}{' ' + cache if cache else ''}", cells, target))
    if on_gpu:
        cells = [one for one in engine if one["direction"] == "both"]
        lines.append(_against("both ways, against one way", cells, TARGET_BOTH_GPU))
        lines += _against_vllm(rows)
    for one in rows:
        if one["arm"] == "decode":
            text = f"inter-token latency p99 with copies {one['itl_p99_ratio']:.3f} times that without"
            lines.append(f"{_met(one['itl_p99_ratio'] <= TARGET_ITL)}  {text}; target {TARGET_ITL}")
    return lines


def _size(one: Row) -> int:
    return one["fragment_bytes"] * one["fragments"]


def _against(name: str, cells: Sequence[Row], target: float) -> str:
    below = [one for one in cells if one["share"] < target]
    worst = min(cells, key=lambda one: one["share"])
    text = f"{name}: {min(one['share'] for one in cells):.2f} to {max(one['share'] for one in cells):.2f} of the limit"
    if below:
        sizes = ", ".join(map(size_name, sorted({one["fragment_bytes"] for one in below})))
        text += f"; below {target:g} at {sizes}, worst {worst['share']:.2f} at {size_name(worst['fragment_bytes'])}"
    return f"{_met(not below)}  {text}; target {target:g}"


def _against_vllm(rows: Sequence[Row]) -> list[str]:
    """The better of vLLM's two ways at each point, and where it beats ours."""
    points: dict[tuple[str, int, int], dict[str, float]] = {}
    for one in rows:
        if one.get("direction") in ("load", "save"):
            point = (one["direction"], one["fragment_bytes"], one["fragments"])
            points.setdefault(point, {})[one["arm"]] = one["gb_per_s"]
    slower = []
    compared = 0
    lacking = set()
    for (direction, size, count), speeds in points.items():
        theirs = [speeds[arm] for arm in ("vllm_dma", "vllm_triton") if arm in speeds]
        if theirs and "engine" in speeds:
            compared += 1
            lacking |= {"vllm_dma", "vllm_triton"} - speeds.keys()
            if speeds["engine"] < max(theirs):
                slower.append(f"{direction} {size_name(size)} x {count}: {speeds['engine']:.1f} to {max(theirs):.1f}")
    if not compared:
        return [f"{_met(False)}  vLLM's copies could not be measured here"]
    text = f"at least as fast as the better of vLLM's two at {compared - len(slower)} of {compared} points"
    if lacking:
        text += f"; {' and '.join(sorted(lacking))} could not be measured everywhere"
    return [f"{_met(not (slower or lacking))}  {text}", *(f"         slower at {line} GB/s" for line in slower)]


def _met(yes: bool) -> str:
    return "[green]met[/green]   " if yes else "[yellow]missed[/yellow]"


def show_plan(console: Console, plan: CopyPlan) -> None:
    """Prints what the planner measured on this machine and what it takes."""
    if not plan.measured:
        console.print("KV in CPU memory: there is one way to copy, and nothing is measured.")
        return
    from memos_vllm.store.cuda_device import machine_name

    console.print(plan_table(plan, machine_name(torch.device("cuda", 0))))


def plan_table(plan: CopyPlan, machine: str) -> Table:
    table = Table(title=f"{machine}: GB/s", title_justify="left")
    for name in ("direction", "fragment", "fragments"):
        table.add_column(name)
    for method in Method:
        table.add_column(method.value, justify="right")
    table.add_column("taken")
    speeds = {(one.direction, one.fragment_bytes, one.fragments, one.method): one.gb_per_s for one in plan.measured}
    for direction in Direction:
        for size, count in sorted({(one.fragment_bytes, one.fragments) for one in plan.measured}):
            cells = [f"{speeds.get((direction, size, count, method), 0.0):.1f}" for method in Method]
            table.add_row(direction, size_name(size), str(count), *cells, plan.choose(direction, size, count))
    return table


def plot(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes a PNG: speed by fragment size, one panel per direction, the limit dashed; the largest total only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    copies = [one for one in rows if "fragment_bytes" in one]
    total = max(_size(one) for one in copies)
    copies = [one for one in copies if _size(one) == total]
    panels = sorted({(one["direction"], one.get("cache", "")) for one in copies}, key=lambda p: _order((*p, "engine")))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.4 * columns, 0.8 + 3.0 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (direction, cache) in zip(axes.flat, panels, strict=False):
        cells = [one for one in copies if (one["direction"], one.get("cache", "")) == (direction, cache)]
        for arm, color in COLORS.items():
            line = sorted((one["fragment_bytes"], one["gb_per_s"]) for one in cells if one["arm"] == arm)
            if line:
                axis.plot(*zip(*line, strict=True), color=color, marker="o", markersize=4, label=arm)
        limit = sorted((one["fragment_bytes"], one["limit_gb_per_s"]) for one in cells if one["arm"] == "engine")
        axis.plot(*zip(*limit, strict=True), "--", color="#444444", linewidth=1, label="limit")
        axis.set_xscale("log", base=2)
        axis.set_xticks([one[0] for one in limit], [size_name(one[0]) for one in limit], rotation=60, fontsize=7)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(f"{direction} {cache}".strip(), loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes[:, 0]:
        axis.set_ylabel("GB/s")
    figure.suptitle(f"{size_name(total)} at a time, by contiguous bytes on the device", x=0.01, ha="left", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
