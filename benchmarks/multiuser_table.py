"""Results of the multi-user benchmark to rows; rows to a table, a verdict and a plot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.multiuser_client import Counters
from benchmarks.multiuser_play import Result, Sample
from benchmarks.report import Series, bar_panels, percentile

COLORS = {
    "direct": "#4d4d4d",
    "prefix_cache": "#8c8c8c",
    "warmup_request": "#cc79a7",
    "example_connector": "#d55e00",
    "reactive": "#e69f00",
    "warm": "#56b4e9",
    "warm_again": "#9ad0f0",
    "predictive": "#009e73",
    "predictive_hints": "#0072b2",
}
LIMIT = "warm"
LIMITS = ("warm", "warm_again")
PREDICTIVE = ("predictive", "predictive_hints")

TARGET_P50, TARGET_P95, TARGET_READY = 1.10, 1.25, 0.95
"""TTFT as a multiple of the limit's; share of turns that find their prefix ready."""

Row = dict[str, Any]


def rows(model: str, pause_s: float, results: Sequence[Result], *, compare: bool = True) -> list[Row]:
    """One flat row per arm; the keys are described in the design, ours come after them.

    Answers are compared with those of the limit, or of the first arm where that did not run. Without ``compare``
    they may differ: how many are equal is reported, and ``equal`` is None.
    """
    by_arm = {result.arm: result for result in results if result.samples}
    if LIMIT not in by_arm and (control := [sample for result in results for sample in result.control]):
        preemptions = sum(result.control_totals.preemptions for result in results)
        by_arm[LIMIT] = Result(LIMIT, control, totals=Counters(preemptions=preemptions))
    against = by_arm.get(LIMIT) or next(iter(by_arm.values()), None)
    order = [arm for arm in COLORS if arm in by_arm]
    return [_row(model, pause_s, by_arm[arm], against, compare) for arm in order]


def _row(model: str, pause_s: float, result: Result, against: Result | None, compare: bool) -> Row:
    first = [sample for sample in result.samples if sample.turn == 0]
    later = [sample for sample in result.samples if sample.turn > 0]
    control = [sample for sample in result.control if sample.turn > 0]
    texts = {(sample.user, sample.turn): sample.answer for sample in against.samples} if against else {}
    same = [
        sample.answer.text == texts[sample.user, sample.turn].text
        and sample.answer.prompt_tokens == texts[sample.user, sample.turn].prompt_tokens
        for sample in result.samples
        if (sample.user, sample.turn) in texts
    ]
    resident = sum(sample.ready for sample in later) / len(later) if later else None
    counted, problem = _ready_by_scenes(result, len(later))
    return {
        "arm": result.arm,
        "ttft_p50_s": _percentile(later, 0.5),
        "ttft_p95_s": _percentile(later, 0.95),
        "cached_tokens": round(percentile([sample.answer.cached_tokens for sample in later], 0.5)) if later else None,
        "ready_share": resident if counted is None else counted,
        "prefetch_forwards": result.forwards,
        "preemptions": result.totals.preemptions,
        "equal": all(same) if same and compare else None,
        "n": len(later),
        "model": model,
        "first_ttft_p50_s": _percentile(first, 0.5),
        "first_ttft_p95_s": _percentile(first, 0.95),
        "resident_share": resident,
        "loaded_tokens": sum(sample.loaded_tokens for sample in later),
        "prompt_tokens": max(sample.answer.prompt_tokens for sample in result.samples),
        "warm_p50_s": _percentile(control, 0.5),
        "warm_p95_s": _percentile(control, 0.95),
        "equal_share": sum(same) / len(same) if same else None,
        "pause_s": pause_s,
        "think_s": percentile([sample.think_s or 0 for sample in later], 0.5) if later else None,
        **{f"scenes_{name}": value for name, value in result.scenes.items()},
        "problem": result.failure or problem,
        "samples_s": [round(sample.answer.ttft_s, 5) for sample in later],
    }


def _ready_by_scenes(result: Result, turns: int) -> tuple[float | None, str | None]:
    """The share as the engine counted it, where prediction is on; and what is wrong with the count."""
    if not result.scenes:
        return None, None
    arrivals = {name: result.scenes.get(name, 0) for name in ("ready", "late", "missed", "other")}
    if sum(arrivals.values()) != turns:
        return None, f"the engine counted {sum(arrivals.values())} arrivals in {turns} turns, so ready_share is ours"
    return arrivals["ready"] / turns if turns else None, None


def _percentile(samples: Sequence[Sample], share: float) -> float | None:
    return percentile([sample.answer.ttft_s for sample in samples], share) if samples else None


def problems(rows: Sequence[Row]) -> list[str]:
    """One sentence per row that is no measurement."""
    out = [f"{row['arm']}: {row['problem']}" for row in rows if row["problem"]]
    for row in rows:
        if row["equal"] is False:
            out.append(f"{row['arm']}: {1 - row['equal_share']:.0%} of the answers differ from the reference's")
    return out


def show(console: Console, rows: Sequence[Row], failures: Sequence[str], heading: str) -> None:
    console.print(f"\n[bold]{heading}[/bold]", highlight=False)
    console.print(_table(rows))
    for line in verdict(rows):
        console.print(line, highlight=False)
    for failure in failures:
        console.print("[red]FAILED[/red]", Text(failure), highlight=False)


def _table(rows: Sequence[Row]) -> Table:
    table = Table()
    headings = (
        "first turn\np50 s", "later turns\np50 s", "\np95 s", "p50\nx warm", "p95\nx warm", "cached\ntokens",
        "ready", "forwards to\nprepare", "preemp-\ntions", "equal", "n",
    )  # fmt: skip
    table.add_column("arm")
    for heading in headings:
        table.add_column(heading, justify="right")
    limit = next((row for row in rows if row["arm"] == LIMIT), None)
    for row in rows:
        style = {LIMIT: "bold"}.get(row["arm"], "green" if row["arm"] in PREDICTIVE else "")
        equal = {True: "yes", False: f"[red]{row['equal_share'] or 0:.0%}[/red]", None: "?"}[row["equal"]]
        table.add_row(
            row["arm"], _s(row["first_ttft_p50_s"]), _s(row["ttft_p50_s"]), _s(row["ttft_p95_s"]),
            _ratio(row, limit, "ttft_p50_s"), _ratio(row, limit, "ttft_p95_s"), _number(row["cached_tokens"]),
            "" if row["ready_share"] is None else f"{row['ready_share']:.0%}", str(row["prefetch_forwards"]),
            str(row["preemptions"]), equal, str(row["n"]), style=style,
        )  # fmt: skip
    return table


def _s(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _ratio(row: Row, limit: Row | None, key: str) -> str:
    ratio = _times(row, limit, key)
    return "" if ratio is None else f"{ratio:.2f}"


def _times(row: Row, limit: Row | None, key: str) -> float | None:
    """As a multiple of the limit, of that which was measured beside the arm if there is one."""
    reference = row[key.replace("ttft", LIMIT)] or (limit and limit[key])
    return row[key] / reference if reference and row[key] is not None else None


def verdict(rows: Sequence[Row]) -> list[str]:
    """The acceptance, one line per criterion and predictive arm."""
    by_arm = {row["arm"]: row for row in rows}
    limit = by_arm.get(LIMIT)
    others = [row for row in rows if row["arm"] not in (*LIMITS, *PREDICTIVE)]
    out = []
    for row in (by_arm[arm] for arm in PREDICTIVE if arm in by_arm):
        for met, text in _judge(row, limit, others):
            out.append(f"{_met(met)}  {row['arm']}: {text}")
    equal = [row["equal"] for row in rows]
    if rows and all(each is None for each in equal):
        out.append("note    answers are compared in float32 only: in 16 bits they depend on the shapes of the passes")
    elif len(rows) > 1:
        share = min(row["equal_share"] or 0 for row in rows)
        out.append(f"{_met(all(equal))}  outputs are equal in all arms ({share:.0%} in the worst)")
    warm_up = by_arm.get("warmup_request")
    if warm_up and warm_up["first_ttft_p50_s"] > warm_up["pause_s"]:
        out.append(
            f"note    a warm-up request takes {warm_up['first_ttft_p50_s']:.1f} s, longer than the pause of "
            f"{warm_up['pause_s']:g} s; a longer --pause-s shows that arm at its best"
        )
    return out


def _judge(row: Row, limit: Row | None, others: Sequence[Row]) -> Iterator[tuple[bool, str]]:
    if row["ttft_p50_s"] is None:
        return
    for key, name, target in (("ttft_p50_s", "p50", TARGET_P50), ("ttft_p95_s", "p95", TARGET_P95)):
        if (ratio := _times(row, limit, key)) is not None:
            yield ratio <= target, f"{name} TTFT is {ratio:.2f} x warm's; target {target:.2f} x"
    ready = row["ready_share"]
    yield ready >= TARGET_READY, f"{ready:.0%} of the turns found their prefix ready; target {TARGET_READY:.0%}"
    yield row["prefetch_forwards"] == 0, f"{row['prefetch_forwards']} forward passes spent on preparing; target 0"
    yield row["preemptions"] == 0, f"{row['preemptions']} preemptions; target 0"
    for key, name in (("ttft_p50_s", "p50"), ("ttft_p95_s", "p95")):
        measured = [other for other in others if other[key] is not None]
        if measured:
            best = min(measured, key=lambda other: other[key])
            text = f"{name} {row[key]:.3f} s; the best other arm under pressure, {best['arm']}, {best[key]:.3f} s"
            yield row[key] < best[key], text


def _met(yes: bool) -> str:
    return "[green]met[/green]   " if yes else "[yellow]missed[/yellow]"


def plot(path: str | os.PathLike[str], rows: Sequence[Row], title: str) -> None:
    """One PNG: TTFT of first and later turns, a bar per arm."""
    keys = ("first_ttft_p50_s", "ttft_p50_s", "ttft_p95_s")
    series = [Series(row["arm"], [row[key] for key in keys], COLORS.get(row["arm"], "#999999")) for row in rows]
    bar_panels(
        path,
        "warm: stock vLLM with room for all, the limit. All others: room for some of the users only.",
        {title: series},
        ("first turn, p50", "later turns, p50", "later turns, p95"),
        x_label="TTFT at the client",
        y_label="TTFT in s",
        format_value=_bar,
    )


def _bar(value_s: float) -> str:
    return f"{value_s:.2f}" if value_s >= 0.1 else f"{value_s:.3f}"
