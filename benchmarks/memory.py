"""Plaintext memory: how fast it is written, searched and up again, and what it costs in bytes.

    python -m benchmarks.memory [--preset smoke|cpu] [--store DIR | DSN] [--part NAME ...] [--json FILE]

    ingest    memories per second that are on disk: one a call, in batches, from 8 threads
    search    p50 and p99 of one question among the memories of one user, index warm
    many      the same with many users in one store; a restart; bytes on disk and in the process

beside SQLite FTS5 (as durable), BM25S (in memory) and exact dense search (numpy, 384 dimensions, random
vectors). ``memos`` answers by words and time, ``memos_vectors`` by such vectors too; nothing here includes the
time of an embedder.
Texts are generated: Zipf vocabulary of 50,000 words, 8 to 24 words each. ``--store`` keeps the large store of
``many``, and takes it again if it is there: building it takes far longer than measuring. Where it is
postgresql://..., an empty database, ``memos`` keeps memories there, in every part; run one part in a database.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import memory_arms, report
from benchmarks.arguments import output_file
from benchmarks.memory_texts import Texts

PARTS = ("ingest", "search", "many")
SEED = 1
BATCH = 1000
THREADS = 8
DIMENSIONS = 384
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Preset:
    single: int
    """Memories that are written one by one."""

    batched: int
    sizes: tuple[int, ...]
    """Memories of one user."""

    users: int
    per_user: int
    warm_users: int
    """How many of the users have asked before; the index of each is in memory."""

    questions: int


PRESETS = {
    "smoke": Preset(50, 1000, (1000,), 3, 300, 2, 50),
    "cpu": Preset(500, 20_000, (1_000, 10_000, 100_000), 100, 10_000, 20, 300),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    console = report.console()
    preset = PRESETS[arguments.preset]
    rows: list[Row] = []
    work = Path(tempfile.mkdtemp(prefix="memos-benchmark-", dir=arguments.directory))
    measures = {"ingest": ingest, "search": search, "many": many}
    steps = sum(_STEPS[part](preset) for part in arguments.part)
    try:
        with report.progress("memory", steps) as advance:
            for part in arguments.part:
                for row in measures[part](preset, work, arguments.store, advance):
                    rows.append(row)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _show(console, rows)
    if arguments.json:
        flags = {"preset": arguments.preset, "part": arguments.part, "seed": SEED}
        report.write_json(arguments.json, "memory", flags, rows)
    return 0


def ingest(preset: Preset, work: Path, kept: Path | str | None, advance: Callable[[str], None]) -> Iterator[Row]:
    texts = Texts(SEED)
    single, batched = list(texts.sentences(preset.single)), list(texts.sentences(preset.batched))
    store, service = memory_arms.open_memos(_database(kept) or work / "ingest")
    who = memory_arms.principal(0)
    ways: list[tuple[str, Sequence[str], Callable[[], object]]] = [
        ("single", single, lambda: [service.add(who, text) for text in single]),
        ("batch", batched, lambda: memory_arms.add_batches(service, who, batched, BATCH)),
        ("concurrent", single * 4, lambda: memory_arms.add_concurrently(service, who, single * 4, THREADS)),
    ]
    for name, written, way in ways:
        yield _row("memos", 0, 0, f"ingest_{name}_per_s", len(written) / _seconds(way))
        advance(f"ingest {name}")
    store.close()
    fts5 = memory_arms.FTS5(work / "ingest.sqlite")
    yield _row("fts5", 0, 0, "ingest_single_per_s", len(single) / _seconds(lambda: [fts5.add([t]) for t in single]))
    batches = [batched[begin : begin + BATCH] for begin in range(0, len(batched), BATCH)]
    yield _row("fts5", 0, 0, "ingest_batch_per_s", len(batched) / _seconds(lambda: [fts5.add(b) for b in batches]))
    fts5.close()
    advance("ingest into FTS5")


def search(preset: Preset, work: Path, kept: Path | str | None, advance: Callable[[str], None]) -> Iterator[Row]:
    for size in preset.sizes:
        texts = Texts(SEED)
        sentences, questions = list(texts.sentences(size)), texts.questions(preset.questions)
        store, service = memory_arms.open_memos(_database(kept) or work / f"search-{size}")
        who = memory_arms.principal(size)
        memory_arms.add_batches(service, who, sentences, BATCH)
        ask = partial(service.search, who, top_k=memory_arms.TOP_K)
        yield _row("memos", size, size, "first_search_s", _seconds(partial(ask, questions[0])))
        yield from _latencies("memos", size, size, ask, questions)
        store.close()
        advance(f"Memos, {size:,}")
        embedder = memory_arms.DrawnVectors(DIMENSIONS)
        store, service = memory_arms.open_memos(_database(kept) or work / f"search-{size}", embedder)
        ask = partial(service.search, who, top_k=memory_arms.TOP_K)
        yield _row("memos_vectors", size, size, "first_search_s", _seconds(partial(ask, questions[0])))
        yield from _latencies("memos_vectors", size, size, ask, questions)
        store.close()
        advance(f"Memos with vectors, {size:,}")
        fts5 = memory_arms.FTS5(work / f"search-{size}.sqlite")
        fts5.add(sentences)
        yield from _latencies("fts5", size, size, fts5.search, questions)
        fts5.close()
        advance(f"FTS5, {size:,}")
        if bm25s := memory_arms.bm25s(sentences):
            yield from _latencies("bm25s", size, size, bm25s, questions)
        advance(f"BM25S, {size:,}")
        dense = memory_arms.exact_dense(texts.vectors(size, DIMENSIONS), texts.vectors(64, DIMENSIONS))
        yield from _latencies("exact_dense", size, size, dense, questions)
        advance(f"exact dense, {size:,}")


def many(preset: Preset, work: Path, kept: Path | str | None, advance: Callable[[str], None]) -> Iterator[Row]:
    path = kept or work / "many"
    total = preset.users * preset.per_user
    per_user, questions = preset.per_user, Texts(SEED + 1).questions(preset.questions)
    store, service = memory_arms.open_memos(path)
    texts = Texts(SEED)
    for number in range(preset.users):
        who = memory_arms.principal(number)
        if not service.list(who, limit=1).records:
            memory_arms.add_batches(service, who, list(texts.sentences(per_user)), BATCH)
        advance(f"user {number + 1} of {preset.users}")
    assert service.stats()["memories"] == total, f"{path} is the store of another preset"
    yield _row("memos", per_user, total, "disk_bytes_per_memory", service.stats()["file_bytes"] / total)
    store.close()
    for metric, value in _restarted(path, preset).items():
        yield _row("memos", per_user, total, metric, value)
    advance("restart")
    store, service = memory_arms.open_memos(path)
    before = _resident_bytes()
    users = [memory_arms.principal(number * preset.users // preset.warm_users) for number in range(preset.warm_users)]
    for who in users:
        service.search(who, questions[0])
    yield _row(
        "memos", per_user, total, "memory_bytes_per_indexed", (_resident_bytes() - before) / (len(users) * per_user)
    )
    asked = iter(range(10**9))
    in_turn = lambda question: service.search(users[next(asked) % len(users)], question, top_k=memory_arms.TOP_K)  # noqa: E731
    yield from _latencies("memos", per_user, total, in_turn, questions)
    yield _row("memos", per_user, total, "process_bytes", _resident_bytes())
    store.close()
    advance("search among many")


def _restarted(path: Path | str, preset: Preset) -> dict[str, float]:
    """A fresh process: from its start, and from opening the store, to the answer of the first search."""
    program = (
        "import sys, time\nfrom pathlib import PosixPath\nfrom benchmarks import memory_arms\n"
        "begin = time.perf_counter()\n"
        f"store, service = memory_arms.open_memos({path!r})\n"
        f"service.search(memory_arms.principal({preset.users - 1}), 'what did i say about work')\n"
        "print(time.perf_counter() - begin)\n"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {"restart_process_s": time.perf_counter() - begin, "restart_s": float(done.stdout)}


def _latencies(
    arm: str, per_user: int, total: int, ask: Callable[[str], object], questions: Sequence[str]
) -> list[Row]:
    for question in questions[:5]:
        ask(question)
    times = [_seconds(lambda question=question: ask(question)) for question in questions]
    return [
        _row(arm, per_user, total, f"search_p{round(100 * share)}_s", report.percentile(times, share))
        for share in (0.5, 0.99)
    ]


def _row(arm: str, per_user: int, total: int, metric: str, value: float) -> Row:
    return {"arm": arm, "memories_per_user": per_user, "memories_total": total, "metric": metric, "value": value}


def _database(kept: Path | str | None) -> str | None:
    return kept if isinstance(kept, str) else None


def _place(text: str) -> Path | str:
    return text if text.startswith(("postgresql://", "postgres://")) else Path(text)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _resident_bytes() -> int:
    gc.collect()
    with suppress(OSError, AttributeError):  # of another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # what earlier parts freed is not to hide what comes
    with open("/proc/self/statm", encoding="ascii") as file:
        pages, shared = (int(value) for value in file.read().split()[1:3])
    return (pages - shared) * os.sysconf("SC_PAGE_SIZE")  # shared: the map, which is the page cache's


def _show(console: Any, rows: Sequence[Row]) -> None:
    table = Table(title="Plaintext memory", box=None, pad_edge=False)
    for name in ("arm", "memories of a user", "in the store", "metric", "value"):
        table.add_column(name, justify="left" if name in ("arm", "metric") else "right")
    for row in rows:
        counts = [f"{row[name]:,}" if row[name] else "" for name in ("memories_per_user", "memories_total")]
        table.add_row(row["arm"], *counts, *_readable(row["metric"], row["value"]))
    console.print(table)


def _readable(metric: str, value: float) -> tuple[str, str]:
    if metric.endswith("_per_s"):
        return metric, f"{value:,.0f} /s"
    if metric.endswith("_s"):
        return metric, f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"
    return metric, f"{value:,.0f} B" if value < 2**20 else f"{value / 2**20:,.0f} MiB"


_STEPS: dict[str, Callable[[Preset], int]] = {
    "ingest": lambda preset: 4,
    "search": lambda preset: 5 * len(preset.sizes),
    "many": lambda preset: preset.users + 2,
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu", help="default: %(default)s")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--store", type=_place, metavar="DIR|DSN", help="where the large store is kept, or a database")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="for what is not kept; default: the system's")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
