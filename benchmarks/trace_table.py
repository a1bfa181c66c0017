"""Outcomes of the trace benchmark to rows; rows to a table, a verdict and a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.trace_replay import Outcome

POLICIES = {
    "lru": "LRU",
    "s3fifo": "S3-FIFO",
    "arc": "ARC",
    "ours_evict": "Memos, no prefetch",
    "ours": "Memos",
    "ours_hint": "Memos, typing hint",
    "ours_trained": "Memos, trained on this trace",
    "ours_returns": "Memos, knows who returns",
    "belady": "Belady",
    "oracle": "oracle, prefetch",
}
"""Names in rows, and in the table and the plot."""

BOUNDS = ("ours_trained", "ours_returns")

COLORS = {
    "lru": "#999999",
    "s3fifo": "#56b4e9",
    "arc": "#0072b2",
    "ours_evict": "#f0c27a",
    "ours": "#e69f00",
    "ours_hint": "#d55e00",
    "ours_trained": "#b8860b",
    "ours_returns": "#7f5f00",
    "belady": "#009e73",
    "oracle": "#cc79a7",
}

BASELINES = ("lru", "s3fifo", "arc")
GAP_CAPACITIES = (3000, 6000)
GAP_TARGET = 0.40
HINT_TARGET = 0.95

Row = dict[str, Any]


def row(trace: str, policy: str, capacity: int, outcome: Outcome, block_bytes: int, wall_s: float) -> Row:
    """``bytes_moved`` is all that a lower tier gave: early, and on demand. ``gap_closed`` follows in ``with_gaps``."""
    moved = outcome.prefetched + outcome.on_demand
    return {
        "trace": trace,
        "policy": policy,
        "capacity_blocks": capacity,
        "ready_share": outcome.ready_share,
        "bytes_moved": moved * block_bytes,
        "bytes_wasted": outcome.wasted * block_bytes,
        "gap_closed": None,
        "bytes_prefetched": outcome.prefetched * block_bytes,
        "bytes_on_demand": outcome.on_demand * block_bytes,
        "reusable_blocks": outcome.reusable,
        "ready_blocks": outcome.ready,
        "late_blocks": outcome.late,
        "replay_s": round(wall_s, 3),
    }


def with_gaps(rows: Sequence[Row]) -> list[Row]:
    """Adds the share of the way from LRU to Belady; None where both are the same."""
    share = {(one["capacity_blocks"], one["policy"]): one["ready_share"] for one in rows}
    out = []
    for one in rows:
        lru, belady = (share.get((one["capacity_blocks"], policy)) for policy in ("lru", "belady"))
        gap = None
        if lru is not None and belady is not None and belady > lru:
            gap = (one["ready_share"] - lru) / (belady - lru)
        out.append(one | {"gap_closed": gap})
    return out


def show(console: Console, rows: Sequence[Row], title: str) -> None:
    capacities = sorted({one["capacity_blocks"] for one in rows})
    table = Table(title=title, title_justify="left")
    table.add_column("capacity in blocks")
    for capacity in capacities:
        table.add_column(f"{capacity:,}", justify="right")
    for policy, name in POLICIES.items():
        cells = {one["capacity_blocks"]: one for one in rows if one["policy"] == policy}
        if cells:
            table.add_row(name, *(_cell(cells.get(capacity)) for capacity in capacities))
    console.print(table)
    console.print(
        "Each cell: share of the reusable blocks that were ready at arrival, share of the gap from LRU to Belady that "
        "is closed; TB moved from the lower tier (of which moved for nothing).",
        highlight=False,
    )
    for line in verdict(rows):
        console.print(line, highlight=False)


def _cell(one: Row | None) -> str:
    if one is None:
        return ""
    gap = "" if one["gap_closed"] is None else f"  {100 * one['gap_closed']:.0f} %"
    moved = f"{one['bytes_moved'] / 1e12:.1f}"
    wasted = f" ({one['bytes_wasted'] / 1e12:.1f})" if one["bytes_wasted"] else ""
    return f"{one['ready_share']:.3f}{gap}\n{moved}{wasted}"


def verdict(rows: Sequence[Row]) -> list[str]:
    """How the targets are met, one line each."""
    cells: Mapping[tuple[int, str], Row] = {(one["capacity_blocks"], one["policy"]): one for one in rows}
    out = []
    for capacity in sorted({one["capacity_blocks"] for one in rows}):
        ours = cells.get((capacity, "ours"))
        others = [cells[capacity, policy] for policy in BASELINES if (capacity, policy) in cells]
        if ours is not None and others:
            best = max(others, key=lambda one: one["ready_share"])
            ahead = ours["ready_share"] > best["ready_share"]
            name = POLICIES[best["policy"]]
            out.append(
                f"{_met(ahead)}  {capacity:,}: Memos {ours['ready_share']:.3f}, {name} {best['ready_share']:.3f}"
            )
        if ours is not None and capacity in GAP_CAPACITIES and ours["gap_closed"] is not None:
            closed = ours["gap_closed"]
            out.append(
                f"{_met(closed >= GAP_TARGET)}  {capacity:,}: {100 * closed:.0f} % of the gap from LRU to Belady "
                f"closed; target {100 * GAP_TARGET:.0f} %"
            )
        hinted = cells.get((capacity, "ours_hint"))
        if hinted is not None:
            share = hinted["ready_share"]
            out.append(
                f"{_met(share >= HINT_TARGET)}  {capacity:,}: {100 * share:.1f} % ready with hints; "
                f"target {100 * HINT_TARGET:.0f} %"
            )
    return out


def _met(yes: bool) -> str:
    return "[green]met[/green]   " if yes else "[yellow]missed[/yellow]"


def plot(path: str | os.PathLike[str], rows: Sequence[Row], title: str) -> None:
    """Writes a PNG: what is ready, and what it cost to move, by capacity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    capacities = sorted({one["capacity_blocks"] for one in rows})
    figure, (ready, moved) = pyplot.subplots(1, 2, figsize=(12, 5))
    for policy, name in POLICIES.items():
        cells = sorted((one for one in rows if one["policy"] == policy), key=lambda one: one["capacity_blocks"])
        if not cells:
            continue
        x = [one["capacity_blocks"] for one in cells]
        style = "--" if policy in ("belady", "oracle", *BOUNDS) else "-"
        width = 2.4 if policy.startswith("ours") and policy not in BOUNDS else 1.5
        for axis, values in (
            (ready, [one["ready_share"] for one in cells]),
            (moved, [one["bytes_moved"] / 1e12 for one in cells]),
        ):
            axis.plot(x, values, style, color=COLORS[policy], linewidth=width, marker="o", markersize=4, label=name)
    for axis, label in ((ready, "share of reusable blocks ready at arrival"), (moved, "TB moved from the lower tier")):
        axis.set_xscale("log")
        axis.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
        axis.minorticks_off()
        axis.set_xlabel("capacity in blocks")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
    ready.set_ylim(0, 1.03)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles, labels = ready.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
