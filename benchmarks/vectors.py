"""Where comparing every vector stops to pay: one user's vectors, exactly and by cells.

    python -m benchmarks.vectors [--count 10000 30000 100000] [--dims 256] [--json FILE]

Vectors are drawn around topics, as a person's memories are, and a query is one of them with noise. Recall is
the share of the exact 100 nearest that are compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from unittest import mock

import numpy as np
from rich.table import Table

from benchmarks import report
from benchmarks.arguments import output_file
from memos_vllm.memory import vectors
from memos_vllm.memory.vectors import Vectors

COUNTS = (3000, 10_000, 30_000, 100_000)
NUM_QUERIES = 100
NEAREST = 100
_TOPICS = 500


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    rows = []
    with report.progress("vectors", len(arguments.count)) as advance:
        for count in arguments.count:
            rows.append(measure(count, arguments.dims))
            advance(f"{count:,}")
    table = Table(title=f"{arguments.dims} dimensions, {NUM_QUERIES} queries", title_justify="left")
    for heading in ("vectors", "exact p50 ms", "p99", "cells p50 ms", "p99", "build s", f"recall of {NEAREST}"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['vectors']:,}",
            *(f"{1000 * row[key]:.2f}" for key in ("exact_p50_s", "exact_p99_s", "cells_p50_s", "cells_p99_s")),
            f"{row['build_s']:.1f}",
            f"{row['recall']:.3f}",
        )
    report.console().print(table)
    if arguments.json:
        report.write_json(arguments.json, "vectors", {"count": arguments.count, "dims": arguments.dims}, rows)
    return 0


def measure(count: int, num_dims: int) -> dict[str, float]:
    """One row of the table; times in seconds."""
    generator = np.random.default_rng(0)
    topics = generator.standard_normal((_TOPICS, num_dims))
    drawn = topics[generator.integers(0, _TOPICS, count)] + generator.standard_normal((count, num_dims))
    held = Vectors(num_dims)
    for slot, row in enumerate(drawn.astype(np.float32), 1):
        held.put(slot, row)
    noise = generator.standard_normal((NUM_QUERIES, num_dims))
    queries = (drawn[generator.integers(0, count, NUM_QUERIES)] + noise).astype(np.float32)
    with mock.patch.object(vectors, "EXACT_UP_TO", count):
        exact, exact_s = _scores(held, queries, count)
    with mock.patch.object(vectors, "EXACT_UP_TO", 0):
        start = time.perf_counter()
        held.score(queries[0], count + 1)
        build_s = time.perf_counter() - start
        by_cells, cells_s = _scores(held, queries, count)
    nearest = np.argpartition(-exact, NEAREST, axis=1)[:, :NEAREST]
    return {
        "vectors": count,
        "exact_p50_s": report.percentile(exact_s, 0.5),
        "exact_p99_s": report.percentile(exact_s, 0.99),
        "cells_p50_s": report.percentile(cells_s, 0.5),
        "cells_p99_s": report.percentile(cells_s, 0.99),
        "build_s": build_s,
        "recall": float(np.mean(np.take_along_axis(by_cells, nearest, axis=1) != 0)),
    }


def _scores(held: Vectors, queries: np.ndarray, count: int) -> tuple[np.ndarray, list[float]]:
    """[queries, slots], and seconds of each query."""
    scores, seconds = [], []
    held.score(queries[0], count + 1)  # what is worked out once
    for query in queries:
        start = time.perf_counter()
        found = held.score(query, count + 1)
        seconds.append(time.perf_counter() - start)
        scores.append(found.scores)
    return np.array(scores), seconds


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vectors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--count", nargs="+", type=_count, default=list(COUNTS), metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--dims", type=_count, default=256, metavar="N", help="default: %(default)d")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
