"""Time to first token with KV in host memory, by the number of groups of layers in which it is loaded.

    python -m benchmarks.layer_groups --preset smoke|cpu|gpu [--groups 1,2,4] [--json FILE]

One server per number (`kv.layer_groups`), the same users, documents and queries on each, interleaved; the servers that
are not asked are paused. With one group a request runs when all of its KV is there, so that is what the others are
compared with, query by query: in time, and in their answers. The exit code is 1 if an answer differs, or if KV did not
come from the host.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.table import Table

from benchmarks import models, report, texts, ttft
from benchmarks.arguments import output_file
from benchmarks.arms import MemosArm, Sample, Trial, alternate, kv_status
from benchmarks.client import RequestFailed
from benchmarks.serving import Server, ServerError, has_gpu

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    model: models.Model
    contexts: tuple[int, ...]
    query: int
    repeats: int
    """Users per context, each with a document of his own."""
    hits: int
    """Queries per user."""
    groups: tuple[int, ...] = (1, 2, 4)

    @property
    def of_ttft(self) -> ttft.Options:
        """The same as the TTFT benchmark says it, whose texts and servers these are."""
        return ttft.Options(
            (self.model,), self.contexts, (self.query,), repeats=self.repeats, hits=self.hits, restart=False
        )


PRESETS = {
    "smoke": Options(models.RECALL, (583,), 40, repeats=1, hits=1, groups=(1, 2)),
    "cpu": Options(models.CPU, (2773, 6064), 40, repeats=4, hits=3),
    "gpu": Options(models.QWEN3_8B, (2773, 6064), 40, repeats=4, hits=5),
}


class GroupsArm(MemosArm):
    """A server that loads in so many groups."""

    def __init__(self, groups: int, options: Options, data_dir: Path, share: float) -> None:
        of_ttft = options.of_ttft
        data_dir.mkdir()
        config = ttft.memos_config(of_ttft, data_dir)
        config["kv"] |= {"layer_groups": groups, "disk_bytes": int(config["kv"]["disk_bytes"] * share)}
        path = data_dir / "memos.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        extra = [*options.model.flags, "--block-size", str(of_ttft.block_size)]
        extra += ["--max-model-len", str(ttft.MAX_MODEL_LEN)]
        if has_gpu():
            extra += ["--gpu-memory-utilization", f"{0.9 * share:.2f}"]
        server = Server(options.model.directory(), plugin=True, config=path, extra=extra)
        super().__init__(server, of_ttft.block_size, of_ttft.max_tokens, data_dir)
        self.name = str(groups)

    def check(self) -> None:
        """Raises RequestFailed where the server does not load in these groups; its log says why."""
        with self.server.http() as http:
            found = max(1, kv_status(http)["layer_groups"])
        if found != int(self.name):
            raise RequestFailed(f"a server with kv.layer_groups {self.name} loads in {found}: its log says why")


def main(argv: Sequence[str] | None = None) -> int:
    # As Ctrl-C: the servers are stopped on the way out, and what was measured is still shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _parse(argv)
    console = report.console()
    failures: list[str] = []
    samples: list[Sample] = []
    try:
        measure(arguments.options, samples)
    except KeyboardInterrupt:
        failures.append("interrupted")
    except (ServerError, RequestFailed, texts.CannotFit, httpx.HTTPError) as error:
        failures.append(str(error))
    rows = rows_of(arguments.options.model, samples)
    if arguments.json:
        flags = {"preset": arguments.preset, "groups": list(arguments.options.groups), "failures": failures}
        report.write_json(arguments.json, "layer_groups", flags, rows)
    failures += problems(rows)
    console.print(_table(rows))
    for failure in failures:
        console.print(f"[red]failed[/]  {failure}", highlight=False)
    return 1 if failures or not rows else 0


def _table(rows: Sequence[Row]) -> Table:
    table = Table("model", "context", "groups", "n", "TTFT p50", "of one group's", "p95", "equal")
    for row in rows:
        equal = "-" if row["equal"] is None else str(row["equal"])
        times = (f"{row['ttft_p50_s']:.4f} s", f"{row['ratio_to_one']:.2f}", f"{row['ttft_p95_s']:.4f} s")
        table.add_row(row["model"], str(row["context_tokens"]), str(row["groups"]), str(row["n"]), *times, equal)
    return table


def measure(options: Options, samples: list[Sample]) -> None:
    """Fills ``samples``; what was measured before an error stays."""
    share = 1.0 / len(options.groups)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(_directory()))
        arms = [GroupsArm(groups, options, root / f"{groups}", share) for groups in options.groups]
        for arm in arms:
            stack.callback(samples.extend, arm.samples)
            stack.callback(arm.server.stop)
        ttft.start([arm.server for arm in arms])
        for arm in arms:
            arm.check()
        with arms[0].server.http() as http:
            make_trial = ttft.TrialMaker(http, arms[0].server.model, options.model.name, options.of_ttft)
            # The first of everything is slow: one trial is thrown away.
            alternate(arms, [arm.steps(_on_host(make_trial(max(options.contexts), options.query, -1))) for arm in arms])
            for arm in arms:
                arm.samples.clear()
            for repeat in range(options.repeats):
                for context in options.contexts:
                    trial = _on_host(make_trial(context, options.query, repeat))
                    first = repeat % len(arms)  # who begins alternates: a drift favours nobody
                    order = arms[first:] + arms[:first]
                    alternate(order, [arm.steps(trial) for arm in order])


@contextlib.contextmanager
def _directory() -> Any:
    path = tempfile.mkdtemp(prefix="memos-layers-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _on_host(trial: Trial) -> Trial:
    """All its queries find the KV in host memory."""
    return replace(trial, hits=[("host", query) for _, query in trial.hits])


def rows_of(model: models.Model, samples: Sequence[Sample]) -> list[Row]:
    """One row per context and number of groups, those of one group first."""
    hits = [sample for sample in samples if sample.source == "host"]
    builds = [sample for sample in samples if sample.source == "build" and sample.problem]
    one = {(sample.trial.user, sample.query): sample for sample in hits if sample.arm == "1"}
    rows = []
    for context in sorted({sample.trial.context_tokens for sample in hits}):
        for groups in sorted({int(sample.arm) for sample in hits}):
            cell = [s for s in hits if s.trial.context_tokens == context and s.arm == str(groups)]
            pairs = [(s, one[s.trial.user, s.query]) for s in cell if (s.trial.user, s.query) in one]
            if not pairs:
                continue
            times = [sample.answer.ttft_s for sample in cell]
            found = [sample.problem for sample in (*cell, *builds) if sample.problem]
            rows.append(
                {
                    "model": model.name,
                    "context_tokens": context,
                    "groups": groups,
                    "n": len(cell),
                    "ttft_p50_s": report.percentile(times, 0.5),
                    "ttft_p95_s": report.percentile(times, 0.95),
                    "ratio_to_one": report.percentile([s.answer.ttft_s / o.answer.ttft_s for s, o in pairs], 0.5),
                    "equal": None if model.dummy else all(s.answer.text == o.answer.text for s, o in pairs),
                    "problem": found[0] if found else None,
                    "samples_s": [round(value, 5) for value in times],
                }
            )
    return rows


def problems(rows: Sequence[Row]) -> list[str]:
    """One sentence per row that is no measurement."""
    out = []
    for row in rows:
        where = f"{row['context_tokens']} tokens, {row['groups']} groups"
        if row["problem"]:
            out.append(f"{where}: {row['problem']}")
        if row["equal"] is False:
            out.append(f"{where}: an answer differs from that with one group")
    return out


@dataclass(frozen=True)
class Arguments:
    options: Options
    preset: str
    json: str | None


def _parse(argv: Sequence[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_groups", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="default: gpu where there is one, else cpu")
    parser.add_argument("--groups", type=_groups, metavar="1,2,4", help="numbers of groups; 1 is always among them")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows here")
    arguments = parser.parse_args(argv)
    preset = arguments.preset or ("gpu" if has_gpu() else "cpu")
    if preset == "gpu" and not has_gpu():
        parser.error("the preset gpu needs an NVIDIA GPU and vLLM's CUDA build; take --preset cpu")
    options = PRESETS[preset]
    return Arguments(replace(options, groups=arguments.groups or options.groups), preset, arguments.json)


def _groups(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1 to 64 such as 1,2,4")
    return tuple(sorted({1, *map(int, parts)}))


if __name__ == "__main__":
    sys.exit(main())
