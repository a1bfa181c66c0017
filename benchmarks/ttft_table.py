"""Samples of the TTFT benchmark to rows; rows to a table, a verdict and a plot."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.arms import Sample
from benchmarks.report import Series, bar_panels, percentile

COLUMNS = (
    ("stock", "direct"),
    ("stock", "evicted"),
    ("stock", "restart"),
    ("stock", "warm"),
    ("memos", "gpu"),
    ("memos", "host"),
    ("memos", "disk"),
    ("memos", "restart"),
)
COLORS = {
    ("stock", "direct"): "#4d4d4d",
    ("stock", "evicted"): "#8c8c8c",
    ("stock", "restart"): "#bfbfbf",
    ("stock", "warm"): "#56b4e9",
    ("memos", "gpu"): "#009e73",
    ("memos", "host"): "#e69f00",
    ("memos", "disk"): "#d55e00",
    ("memos", "restart"): "#cc79a7",
}
LONG_CONTEXT = 6064
"""Tokens from which on a context is judged; in a shorter one the fixed costs of a request hide the rest."""

TARGETS = {"gpu": 1.10, "host": 1.50}
"""Median TTFT as a multiple of the warm local hit, at the longest context."""

TARGET_SPEEDUP = 0.90
"""Over direct, at the longest context and the shortest query, as a share."""

Row = dict[str, Any]


def rows(model: str, samples: Sequence[Sample], *, compare: bool = True) -> list[Row]:
    """One flat row per cell, arm and source; the keys are described in the design, ours come after them.

    Args:
        compare: False for a model whose answers say nothing; ``equal`` is None then.
    """
    by_cell: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_cell[sample.trial.cell].append(sample)
    out = []
    for (context, query), of_cell in sorted(by_cell.items()):
        group: dict[tuple[str, str], list[Sample]] = defaultdict(list)
        for sample in of_cell:
            group[sample.arm, sample.source].append(sample)
        build = group.get(("memos", "build"), [])
        build_s = percentile([sample.answer.ttft_s for sample in build], 0.5) if build else None
        save_s = percentile([sample.save_s for sample in build if sample.save_s is not None], 0.5) if build else None
        direct = [sample.answer.ttft_s for sample in group.get(("stock", "direct"), [])]
        direct_s = percentile(direct, 0.5) if direct else None
        for arm, source in COLUMNS:
            if (arm, source) not in group:
                continue
            row = {
                "model": model,
                "context_tokens": context,
                "query_tokens": query,
                "source": source,
                "build_s": build_s,
            }
            row |= _row(arm, source, group)
            row["equal"] = row["equal"] if compare else None
            sound = not row["problem"] and row["equal"] is not False
            row["speedup"] = 1 - row["ttft_p50_s"] / direct_s if direct_s and sound else None
            row["save_s"] = save_s
            out.append(row)
    return out


def _row(arm: str, source: str, group: Mapping[tuple[str, str], list[Sample]]) -> Row:
    samples = group[arm, source]
    ttft_s = [sample.answer.ttft_s for sample in samples]
    warm = {_question(sample): sample for sample in group.get(("stock", "warm"), [])}
    pairs = [(sample, warm[_question(sample)]) for sample in samples if _question(sample) in warm]
    same = [sample.answer.text == other.answer.text for sample, other in pairs]
    differences = [
        abs(one - other)
        for sample, reference in pairs
        for one, other in zip(sample.answer.logprobs, reference.answer.logprobs, strict=False)
    ]
    # A cold answer is computed in other shapes than a warm one, so bf16 may round it differently.
    # It must equal the other arm's cold answer; how often it equals the warm one is only reported.
    cold = arm == "stock" and source in ("direct", "evicted", "restart")
    equal: bool | None
    if source == "direct":
        build = {_question(sample): sample for sample in group.get(("memos", "build"), [])}
        against = [(sample, build[_question(sample)]) for sample in samples if _question(sample) in build]
        equal = all(sample.answer.text == other.answer.text for sample, other in against) if against else None
    elif source == "warm":
        equal = True
    else:
        equal = None if cold or not same else all(same)
    ratios = [sample.answer.ttft_s / reference.answer.ttft_s for sample, reference in pairs]
    problems = [sample.problem for sample in samples if sample.problem]
    if source in ("direct", "gpu"):  # the first request of a user belongs to the row that it was compared with
        problems += [sample.problem for sample in group.get(("memos", "build"), []) if sample.problem]
    return {
        "ttft_p50_s": percentile(ttft_s, 0.5),
        "ttft_p95_s": percentile(ttft_s, 0.95),
        "cached_tokens": min(sample.answer.cached_tokens for sample in samples),
        "n": len(samples),
        "equal": equal,
        "arm": arm,
        "equal_cold": sum(same) / len(same) if cold and same else None,
        "logprob_difference": max(differences) if differences and source != "warm" else None,
        "ratio_to_warm": percentile(ttft_s, 0.5) / percentile([s.answer.ttft_s for s in warm.values()], 0.5)
        if warm
        else None,
        "paired_ratio_to_warm": percentile(ratios, 0.5) if ratios else None,
        "problem": problems[0] if problems else None,
        "samples_s": [round(value, 5) for value in ttft_s],
    }


def _question(sample: Sample) -> tuple[str, str]:
    return sample.trial.user, sample.query


def problems(rows: Sequence[Row]) -> list[str]:
    """One sentence per row that is no measurement."""
    out = []
    for row in rows:
        where = f"{row['model']}, {row['context_tokens']} + {row['query_tokens']} tokens, {row['arm']} {row['source']}"
        if row["problem"]:
            out.append(f"{where}: {row['problem']}")
        if row["equal"] is False:
            other = "Memos' first answer" if row["source"] == "direct" else "the warm answer"
            out.append(f"{where}: the answer differs from {other}")
    return out


def show(console: Console, rows: Sequence[Row], failures: Sequence[str]) -> None:
    """The table per model, the verdict at the longest context, and what went wrong."""
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        console.print(f"\n[bold]{model}[/bold]: median TTFT in s, and how much less than direct", highlight=False)
        console.print(_table(of_model))
        for line in verdict(of_model):
            console.print(line, highlight=False)
    for failure in failures:
        console.print("[red]FAILED[/red]", Text(failure), highlight=False)


def _table(rows: Sequence[Row]) -> Table:
    present = [column for column in COLUMNS if any((row["arm"], row["source"]) == column for row in rows)]
    table = Table(show_lines=True)
    table.add_column("context\n+ query", justify="right")
    if any(row["build_s"] is not None for row in rows):
        table.add_column("Build s\n+ save", justify="right")
    for arm, source in present:
        table.add_column(f"{arm}\n{source}", justify="right", style="bold" if source == "warm" else "")
    for cell in dict.fromkeys((row["context_tokens"], row["query_tokens"]) for row in rows):
        of_cell = {
            (row["arm"], row["source"]): row for row in rows if (row["context_tokens"], row["query_tokens"]) == cell
        }
        line = [f"{cell[0]:,}\n+ {cell[1]:,}"]
        some = next(iter(of_cell.values()))
        if len(table.columns) > len(present) + 1:
            line.append(f"{some['build_s']:.3f}\n+ {some['save_s']:.3f}")
        line += [_cell(of_cell.get(column)) for column in present]
        table.add_row(*line)
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["problem"]:
        return "[red]failed[/red]"
    time_s = f"{row['ttft_p50_s']:.3f}"
    if row["equal"] is False:
        return f"{time_s}\n[red]unequal[/red]"
    computes = row["arm"] == "stock" and row["source"] != "warm"
    if computes or row["speedup"] is None:
        return time_s
    return f"{time_s}\n{100 * row['speedup']:.1f} %"


def verdict(rows: Sequence[Row]) -> list[str]:
    """How the targets are met at the longest context, if it is long; nothing without both arms."""
    longest = max(row["context_tokens"] for row in rows)
    if longest < LONG_CONTEXT:
        return []
    shortest = min(row["query_tokens"] for row in rows)
    judged = [
        row for row in rows if row["arm"] == "memos" and row["source"] in TARGETS and row["context_tokens"] == longest
    ]
    out = []
    for row in sorted(judged, key=lambda row: (list(TARGETS).index(row["source"]), row["query_tokens"])):
        source, target = row["source"], TARGETS[row["source"]]
        where = f"{longest:,} + {row['query_tokens']:,} tokens: {source}"
        ratio, paired, speedup = row["ratio_to_warm"], row["paired_ratio_to_warm"], row["speedup"]
        if row["problem"] or row["equal"] is False:
            out.append(f"[red]failed[/red]  {where}")
            continue
        if ratio is not None:
            found = f"{ratio:.2f} x warm (medians), {paired:.2f} x (median of pairs)"
            out.append(f"{_met(ratio <= target)}  {where} takes {found}; target {target:.2f} x")
        if speedup is not None and row["query_tokens"] == shortest:
            found = f"{100 * speedup:.1f} % less than direct"
            out.append(f"{_met(speedup >= TARGET_SPEEDUP)}  {where} takes {found}; target {100 * TARGET_SPEEDUP:.0f} %")
    return out


def _met(yes: bool) -> str:
    return "[green]met[/green]   " if yes else "[yellow]missed[/yellow]"


def plot(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """One PNG: a panel per model and query length, a group of bars per context length."""
    panels: dict[str, list[Series]] = {}
    contexts = sorted({row["context_tokens"] for row in rows})
    present = [column for column in COLUMNS if any((row["arm"], row["source"]) == column for row in rows)]
    for model in dict.fromkeys(row["model"] for row in rows):
        for query in sorted({row["query_tokens"] for row in rows if row["model"] == model}):
            value = {
                (row["arm"], row["source"], row["context_tokens"]): row["ttft_p50_s"]
                for row in rows
                if row["model"] == model
                and row["query_tokens"] == query
                and not row["problem"]
                and row["equal"] is not False
            }
            panels[f"{model}, query of {query:,} tokens"] = [
                Series(
                    f"{arm} {source}", [value.get((arm, source, context)) for context in contexts], COLORS[arm, source]
                )
                for arm, source in present
            ]
    bar_panels(
        path,
        "Median TTFT at the client. warm: vLLM's own prefix cache. gpu, host, disk: Memos, by where the KV is.",
        panels,
        [f"{context:,}" for context in contexts],
        x_label="memory in front of the query, in tokens",
        y_label="TTFT in s",
        format_value=_time,
    )


def _time(value_s: float) -> str:
    return f"{value_s:.2f}" if value_s >= 0.1 else f"{value_s:.3f}"
