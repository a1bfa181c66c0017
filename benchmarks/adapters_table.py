"""Rows of the adapter benchmark, of one run or of several on the same machine, to a table and a plot.

python -m benchmarks.adapters_table FILE... [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import report
from benchmarks.arguments import output_file

Row = dict[str, Any]
USES = (("first", ""), ("prefetched", ""), ("resident", ""), ("churn", "zipf"), ("churn", "round_robin"))
COLORS = {"resolver": "#9aa5b1", "memos": "#1f6feb"}


def show(rows: Sequence[Row], problems: Sequence[str]) -> None:
    console = report.console()
    table = Table("adapters", "use", "arm", "TTFT p50 ms", "p95", "ITL p99 ms", "requests/s", "mix-ups", "n")
    for row in sorted(rows, key=lambda row: (row["adapters"], row["use"], row["order"], row["arm"])):
        times = (f"{row[name] * 1000:.1f}" for name in ("ttft_p50_s", "ttft_p95_s", "itl_p99_s"))
        use = f"{row['use']} {row['order']}".strip()
        rate = "" if row["requests_per_s"] is None else f"{row['requests_per_s']:.1f}"
        table.add_row(str(row["adapters"]), use, row["arm"], *times, rate, str(row["mixups"]), str(row["n"]))
    console.print(table)
    for number in sorted({row["adapters"] for row in rows}):
        found = {row["use"]: row["ttft_p50_s"] for row in rows if row["adapters"] == number and row["arm"] == "memos"}
        if {"prefetched", "resident"} <= found.keys():
            ratio = found["prefetched"] / found["resident"]
            console.print(f"{number} adapters: prefetched first use takes {ratio:.2f} times a resident use's TTFT")
    for problem in problems:
        console.print(f"[red]{problem}[/red]")


def plot(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes a PNG: median TTFT of each use, one panel per number of adapters; p95 as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = sorted({row["adapters"] for row in rows})
    figure, axes = pyplot.subplots(1, len(numbers), figsize=(1.2 + 3.0 * len(numbers), 3.6), squeeze=False)
    for axis, number in zip(axes[0], numbers, strict=True):
        for offset, (arm, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
            cell = {(r["use"], r["order"]): r for r in rows if r["adapters"] == number and r["arm"] == arm}
            found = [(place + offset, cell[use]) for place, use in enumerate(USES) if use in cell]
            places = [place for place, _ in found]
            axis.bar(places, [row["ttft_p50_s"] * 1000 for _, row in found], 0.38, color=color, label=arm)
            spans = [(row["ttft_p50_s"] * 1000, row["ttft_p95_s"] * 1000) for _, row in found]
            axis.vlines(places, [low for low, _ in spans], [high for _, high in spans], color="#444444", linewidth=1)
        names = [f"{use} {order}".replace("_", " ").strip() for use, order in USES]
        axis.set_xticks(range(len(USES)), names, rotation=50, ha="right", fontsize=8)
        axis.set_title(f"{number} adapter{'s' if number > 1 else ''}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0, 0].set_ylabel("TTFT, ms")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters_table", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what --json of benchmarks.adapters wrote")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.files]
    if any(run["machine"] != runs[0]["machine"] or run["versions"] != runs[0]["versions"] for run in runs):
        parser.error("the runs are of different machines or versions")
    rows = [row for run in runs for row in run["rows"]]
    show(rows, [problem for run in runs for problem in run["flags"]["problems"]])
    if arguments.plot:
        plot(arguments.plot, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
