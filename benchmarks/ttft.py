"""Time to first token: what a memory costs to read, by where its KV is.

    python -m benchmarks.ttft --preset smoke|cpu|gpu [--model PATH] [--json FILE] [--plot FILE.png]

For each model, context length and query length, in one run and interleaved:

    direct    the assembled prompt on stock vLLM, nothing cached
    evicted   stock vLLM after its prefix cache was reset: computed again
    warm      stock vLLM, prefix-cache hit: the limit
    gpu       Memos, KV in the GPU prefix cache
    host      Memos, KV in the host pool
    disk      Memos, KV on disk, page cache dropped
    restart   the first request after the server was restarted; Memos reads from disk, stock computes

TTFT is taken at the client. Build is the first request with a memory: computed, then saved. Greedy
answers are compared: each from Memos with the warm one to the same query, the first one with the
direct one; not those of a model without weights, which gives times only. The exit code is 1 if one
differs, or if a sample's tokens did not come from where its source says; neither is reported as a
measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks import models, report, texts, ttft_table
from benchmarks.arguments import directory, output_file
from benchmarks.arms import Arm, MemosArm, Sample, StockArm, Trial, alternate
from benchmarks.client import RequestFailed, chat, count_tokens
from benchmarks.serving import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE, Server, ServerError, has_gpu
from memos_vllm.memory.assembly import assemble

CONTEXTS = (583, 2773, 6064)
QUERIES = (167, 303, 953)
"""MemOS's lengths (arXiv 2507.03724, Table 5), in tokens."""

TIERS = ("gpu", "host", "disk")
MAX_MODEL_LEN = 8192
_ROOM_FOR_TEMPLATE = 64
DISK_SHARE = 0.9
"""Of what is free: the KV of all trials of a model stays on disk until its servers were restarted."""
START_TIMEOUT_S = 1800.0 if has_gpu() else 300.0


@dataclass(frozen=True)
class Options:
    """One run.

    Attributes:
        repeats: users per cell, each with a document of his own; samples of ``direct``, ``evicted``,
            ``restart`` and Build. Fewer where the disk has no room for the KV of all.
        hits: queries per user and tier; ``repeats * hits`` samples of ``gpu``, ``host`` and ``disk``.
        max_tokens: length of an answer.
        restart: whether the servers are restarted for the ``restart`` rows.
    """

    models: tuple[models.Model, ...]
    contexts: tuple[int, ...] = CONTEXTS
    queries: tuple[int, ...] = QUERIES
    repeats: int = 7
    hits: int = 1
    max_tokens: int = 4
    restart: bool = True
    arms: tuple[str, ...] = ("stock", "memos")
    block_size: int = GPU_BLOCK_SIZE if has_gpu() else CPU_BLOCK_SIZE
    seed: int = 0
    data_dir: str | None = None

    @property
    def queries_per_user(self) -> int:
        return 2 + len(TIERS) * self.hits

    def kv_tokens(self, repeats: int) -> int:
        """Whose KV goes to disk: each user's document and, behind it, each query with its answer; and a rehearsal."""
        users = [(context, query) for context in self.contexts for query in self.queries] * repeats
        users.append((max(self.contexts), max(self.queries)))
        return sum(context + self.queries_per_user * (query + self.max_tokens) for context, query in users)


PRESETS = {
    # About a minute: the servers' start is most of it.
    "smoke": Options((models.RECALL,), (583, 1500), (167, 303), repeats=2, hits=2, max_tokens=8, restart=False),
    # Cold samples cost seconds and vary little; hits cost tenths and vary much, so they are repeated more.
    "cpu": Options((models.CPU,), repeats=3, hits=2),
    "gpu": Options((models.QWEN3_8B, models.QWEN3_32B, models.QWEN25_72B), repeats=5, hits=3),
}


def main(argv: Sequence[str] | None = None) -> int:
    # As Ctrl-C: the servers are stopped on the way out, and what was measured is still shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse(argv)
    options = arguments.options
    console = report.console()
    rows: list[ttft_table.Row] = []
    flags: dict[str, Any] = {}
    failures: list[str] = []
    interrupted = False
    for model in options.models:
        if has_gpu() and (memory_bytes := report.gpu_memory_bytes()):
            model = models.fitted(model, memory_bytes)
            if model is not models.fitted(model, memory_bytes):
                console.print(f"note    {model.name} does not fit this card and is left out", highlight=False)
                continue
        model.directory()  # made before the disk is asked how much room is left
        run = Run(model, options)
        try:
            run.measure()
        except KeyboardInterrupt:
            interrupted = True
            run.failures.append("interrupted")
        except (ServerError, RequestFailed, texts.CannotFit, httpx.HTTPError) as error:
            run.failures.append(str(error))  # the other models, and what was measured of this one, still count
        rows += ttft_table.rows(model.name, run.samples, compare=not model.dummy)
        flags[model.name] = run.flags
        failures += [f"{model.name}: {failure}" for failure in run.failures]
        if interrupted:
            break
    if arguments.json:
        flags = {"preset": arguments.preset, **_as_flags(options), "servers": flags, "failures": failures}
        report.write_json(arguments.json, "ttft", flags, rows)
    if arguments.plot and rows:
        ttft_table.plot(arguments.plot, rows)
    failures += ttft_table.problems(rows)
    ttft_table.show(console, rows, failures)
    return 1 if failures or not rows else 0


class Run:
    """One model on both arms.

    Both servers live at once where they fit, and their requests alternate, so that a machine that
    slows down slows both arms; the one that is not asked is paused. Where they don't fit one GPU, one
    arm follows the other.

    Attributes:
        samples: of both arms, also those with a problem.
        repeats: as many as the disk has room for.
        failures: one sentence per trial that could not be finished.
        flags: what the servers ran with.
    """

    def __init__(self, model: models.Model, options: Options):
        memory_bytes = report.gpu_memory_bytes() if has_gpu() else None
        self.model = model
        self.options = options
        self.repeats = repeats_that_fit(model, options)
        self.side_by_side = not memory_bytes or 2 * model.weight_bytes < 0.7 * memory_bytes
        self.cells = [(context, query) for context in options.contexts for query in options.queries]
        self.samples: list[Sample] = []
        self.failures: list[str] = []
        self.flags: dict[str, Any] = {"side_by_side": self.side_by_side, "repeats": self.repeats}

    def measure(self) -> None:
        """Fills ``samples``. What was measured before an error stays.

        Raises:
            ServerError: a server did not start, or died.
            RequestFailed, CannotFit: the first requests failed, so there is no point in going on.
        """
        options = self.options
        if not self.repeats:
            self.failures.append("the disk has no room for one user's KV per cell: --data-dir, or fewer --contexts")
            return
        groups = [options.arms] if self.side_by_side else [(arm,) for arm in options.arms]
        steps = len(groups) * (1 + len(self.cells) * self.repeats * (2 if options.restart else 1))
        data_dir = Path(tempfile.mkdtemp(prefix="memos-ttft-", dir=options.data_dir))
        try:
            with report.progress(self.model.name, steps) as advance:
                for group in groups:
                    self._measure_group(group, data_dir, advance)
        finally:
            shutil.rmtree(data_dir, ignore_errors=True)

    def _measure_group(self, group: Sequence[str], data_dir: Path, advance: Callable[[str], None]) -> None:
        share = {1: 0.95, 2: 0.46}[len(group)] if has_gpu() else None
        arms = [make_arm(name, self.model, self.options, data_dir, share) for name in group]
        with contextlib.ExitStack() as stack:
            for arm in arms:
                stack.callback(self.samples.extend, arm.samples)
                stack.callback(arm.server.stop)
            start([arm.server for arm in arms])
            for arm in arms:
                self.flags[arm.name] = _shown(arm.server.flags)
            rehearsal, trials = self._main_phase(arms, advance)
            if self.options.restart:
                self._restart_phase(arms, rehearsal, trials, advance)

    def _main_phase(self, arms: Sequence[Arm], advance: Callable[[str], None]) -> tuple[Trial, list[Trial]]:
        with arms[0].server.http() as http:
            make_trial = TrialMaker(http, arms[0].server.model, self.model.name, self.options)
            # The first of everything is slow (allocation, kernels, files): one trial is thrown away.
            rehearsal = make_trial(max(self.options.contexts), max(self.options.queries), repeat=-1)
            rehearsal = replace(rehearsal, hits=rehearsal.hits[:2] + rehearsal.hits[-1:])
            advance("rehearsal")
            alternate(arms, [arm.steps(rehearsal) for arm in arms])
            for arm in arms:
                arm.samples.clear()
            trials = []
            for repeat in range(self.repeats):
                for context, query in self.cells:
                    advance(f"{context} + {query} tokens, {repeat + 1} of {self.repeats}")
                    trials.append(make_trial(context, query, repeat))
                    # Who goes first alternates, so that a steady drift favours nobody.
                    order = arms if repeat % 2 == 0 else arms[::-1]
                    self._attempt(order, trials[-1], [arm.steps(trials[-1]) for arm in order])
        return rehearsal, trials

    def _restart_phase(
        self, arms: Sequence[Arm], rehearsal: Trial, trials: Sequence[Trial], advance: Callable[[str], None]
    ) -> None:
        """After a restart, every trial's last query."""
        for arm in arms:
            arm.server.stop()
        start([arm.server for arm in arms])
        messages = assemble([{"role": "user", "content": rehearsal.first_query}], [rehearsal.document])
        for arm in arms:
            with arm.server.http() as http:
                chat(http, arm.server.model, messages, max_tokens=self.options.max_tokens)
        measured = [len(arm.samples) for arm in arms]
        alternate(arms, [arm.restart_steps(rehearsal) for arm in arms])
        for arm, number in zip(arms, measured, strict=True):
            del arm.samples[number:]
        for trial in trials:
            advance(f"{trial.context_tokens} + {trial.query_tokens} tokens, after a restart")
            self._attempt(arms, trial, [arm.restart_steps(trial) for arm in arms])

    def _attempt(self, arms: Sequence[Arm], trial: Trial, steps: Sequence[Iterator[None]]) -> None:
        """One trial; if it fails while the servers live, the others are still worth measuring."""
        try:
            alternate(arms, steps)
        except (RequestFailed, httpx.HTTPError) as error:
            for arm in arms:
                arm.server.check_alive()
            where = f"{trial.context_tokens} + {trial.query_tokens} tokens, repeat {trial.repeat + 1}"
            self.failures.append(f"{where}: {error or type(error).__name__}")


def start(servers: Sequence[Server]) -> None:
    """Starts servers and waits: one by one on a GPU, where each measures the memory it finds unless it is told how much
    its KV cache takes; else together."""
    together = not has_gpu() or all("--kv-cache-memory-bytes" in server.extra for server in servers)
    if together:
        for server in servers:
            server.start()
    for server in servers:
        if not together:
            server.start()
        server.wait_until_ready(START_TIMEOUT_S)


class TrialMaker:
    """Makes trials whose texts have the exact token lengths of their cell."""

    def __init__(self, http: httpx.Client, served_model: str, model_name: str, options: Options):
        self._http = http
        self._model = served_model
        self._prefix = f"ttft-{options.seed}-{model_name}"
        self._options = options
        self._queries: dict[int, list[str]] = {}
        self._system_tokens = self._count_document("tea")

    def __call__(self, context: int, query: int, repeat: int) -> Trial:
        user = f"{self._prefix}-{context}-{query}-{repeat}"
        queries = self._queries.setdefault(query, self._make_queries(query) if query not in self._queries else [])
        pool = iter(queries)
        first, last = next(pool), next(pool)
        # Host before disk: what was read from disk need not be in the host pool afterwards.
        order = [
            tier
            for _ in range(self._options.hits)
            for tier in (("gpu", "host") if repeat % 2 == 0 else ("host", "gpu"))
        ]
        order += ["disk"] * self._options.hits
        return Trial(
            user=user,
            context_tokens=context,
            query_tokens=query,
            document=texts.document(user, context, self._count_document),
            first_query=first,
            hits=[(source, next(pool)) for source in order],
            restart_query=last if self._options.restart else None,
            repeat=repeat,
        )

    def _make_queries(self, length: int) -> list[str]:
        number = self._options.queries_per_user
        return [texts.query(f"{self._prefix}-{length}-{index}", length, self._count_query) for index in range(number)]

    def _count_document(self, document: str) -> int:
        messages = assemble([{"role": "user", "content": ""}], [document])[:1]
        return count_tokens(self._http, self._model, messages, add_generation_prompt=False)

    def _count_query(self, query: str) -> int:
        messages = assemble([{"role": "user", "content": query}], ["tea"])
        return count_tokens(self._http, self._model, messages, add_generation_prompt=True) - self._system_tokens


def make_arm(name: str, model: models.Model, options: Options, data_dir: Path, gpu_share: float | None) -> Arm:
    """An arm with its server, not yet started. Apart from the plugin both servers have the same flags."""
    extra = [*model.flags, "--block-size", str(options.block_size), "--max-model-len", str(MAX_MODEL_LEN)]
    if gpu_share is not None:
        extra += ["--gpu-memory-utilization", f"{gpu_share:.2f}"]
    path = model.directory()
    if name == "stock":
        return StockArm(Server(path, extra=extra), options.block_size, options.max_tokens)
    config = data_dir / "memos.yaml"
    config.write_text(yaml.safe_dump(memos_config(options, data_dir)), encoding="utf-8")
    server = Server(path, plugin=True, config=config, extra=extra)
    return MemosArm(server, options.block_size, options.max_tokens, data_dir)


def repeats_that_fit(model: models.Model, options: Options) -> int:
    """Users per cell whose KV the disk has room for, at most as many as asked for."""
    if model.geometry is None:
        return options.repeats  # a directory or a hub's: its KV is not known before it runs
    room = disk_room(options.data_dir or tempfile.gettempdir())
    fits = (
        n for n in range(options.repeats, 0, -1) if options.kv_tokens(n) * model.geometry.kv_bytes_per_token <= room
    )
    return next(fits, 0)


def disk_room(folder: str | Path) -> int:
    """Bytes that KV may take there."""
    return int(DISK_SHARE * shutil.disk_usage(folder).free)


def memos_config(options: Options, data_dir: Path) -> dict[str, Any]:
    """Room for the longest document in the system message and for every trial's KV."""
    return {
        "data_dir": str(data_dir / "data"),
        "memory": {"long_lived_tokens": 2 * max(options.contexts)},
        # The tiers are measured as they are found; prediction would bring KV to the GPU before the request.
        "prediction": {"enabled": False},
        "kv": {"host_bytes": "16GiB" if has_gpu() else "1GiB", "disk_bytes": disk_room(data_dir)},
    }


@dataclass(frozen=True)
class Arguments:
    options: Options
    preset: str
    json: str | None
    plot: str | None


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Command line to options; a bad value ends the program with one sentence and code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ttft", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="default: gpu where there is one, else cpu")
    parser.add_argument(
        "--model", action="append", help="directory, hub name, or one of " + ", ".join(models.NAMED) + "; repeatable"
    )
    parser.add_argument("--contexts", type=_lengths, metavar="N,N", help="memory lengths in tokens")
    parser.add_argument("--queries", type=_lengths, metavar="N,N", help="query lengths in tokens")
    parser.add_argument("--repeats", type=_count, metavar="N", help="users per cell")
    parser.add_argument("--hits", type=_count, metavar="N", help="queries per user and tier")
    parser.add_argument(
        "--restart", action=argparse.BooleanOptionalAction, default=None, help="measure after a restart as well"
    )
    parser.add_argument(
        "--arms", type=_arms, metavar="stock,memos", help="default: both; without stock nothing is compared"
    )
    parser.add_argument("--block-size", type=_count, metavar="N", help="tokens per KV block, for both servers")
    parser.add_argument("--seed", type=int, help="of documents and queries")
    parser.add_argument(
        "--data-dir", type=directory, help="where the KV files go; default: the directory for temporary files"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows here")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw the table here")
    arguments = parser.parse_args(argv)
    preset = arguments.preset or ("gpu" if has_gpu() else "cpu")
    names = ("contexts", "queries", "repeats", "hits", "restart", "arms", "block_size", "seed", "data_dir")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    options = replace(PRESETS[preset], **given)
    if arguments.model:
        try:
            options = replace(options, models=tuple(map(models.find, arguments.model)))
        except ValueError as error:
            parser.error(str(error))
    for model in options.models:
        if model is models.RECALL and not (models.RECALL_MODEL / "model.safetensors").exists():
            parser.error(f"the recall model is missing from {models.RECALL_MODEL}; name another one with --model")
    if preset == "gpu" and not arguments.model and not has_gpu():
        parser.error("the preset gpu needs an NVIDIA GPU and vLLM's CUDA build; take --preset cpu")
    longest = max(options.contexts) + max(options.queries) + options.max_tokens
    if longest > MAX_MODEL_LEN:
        parser.error(f"context and query take {longest} tokens together, the servers are started for {MAX_MODEL_LEN}")
    if min(options.contexts) < options.block_size + _ROOM_FOR_TEMPLATE:
        parser.error(
            f"a context needs at least {options.block_size + _ROOM_FOR_TEMPLATE} tokens, one block and the template"
        )
    return Arguments(options, preset, arguments.json, arguments.plot)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token counts such as 583,2773") from None
    if values[0] < 32:
        raise argparse.ArgumentTypeError("a length of less than 32 tokens has no room for template and text")
    return values


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _arms(text: str) -> tuple[str, ...]:
    arms = tuple(dict.fromkeys(text.split(",")))
    if not set(arms) <= {"stock", "memos"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not stock, memos or stock,memos")
    return arms


def _as_flags(options: Options) -> dict[str, Any]:
    return {
        "contexts": list(options.contexts),
        "queries": list(options.queries),
        "repeats": options.repeats,
        "hits": options.hits,
        "max_tokens": options.max_tokens,
        "restart": options.restart,
        "arms": list(options.arms),
        "block_size": options.block_size,
        "seed": options.seed,
    }


def _shown(flags: Sequence[str]) -> str:
    """A server's flags without those that differ by chance."""
    out, skip = [], False
    for flag in flags:
        if not skip and flag not in ("--port", "--memos-config", "--served-model-name"):
            out.append(flag)
        skip = not skip and flag in ("--port", "--memos-config", "--served-model-name")
    return " ".join(out)


if __name__ == "__main__":
    sys.exit(main())
