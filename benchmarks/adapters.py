"""LoRA adapters per request: what the first use, a resident one, a prefetched one and eviction cost.

    python -m benchmarks.adapters --preset smoke|cpu|gpu [--adapters 1,8,64] [--slots 4] [--json FILE]
    python -m benchmarks.adapters_table FILE... [--plot FILE.png]

Two servers with the same flags, both alive, one paused while the other is asked:

    resolver  vLLM with its stock filesystem resolver; the request names the adapter as its model
    memos     the plugin; the request names it in ``memos.adapter``

and for each number of adapters:

    first       never used before by this server
    resident    used by the request before
    prefetched  never used before, announced by a hint, loaded before the request (memos only)
    churn       all adapters over the slots, several clients at once, in Zipf or round-robin order

TTFT and gaps between tokens (ITL) are taken at the client. Every answer's log-probabilities are compared
with the first ones of all adapters; one that is nearer to another adapter's is a mix-up, and then the exit
code is 1. So it is if the two servers disagree about an adapter.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks import adapters_table, lora, models, report, texts
from benchmarks.arguments import output_file
from benchmarks.client import Answer, RequestFailed, chat
from benchmarks.serving import Server, ServerError, has_gpu

ZIPF_EXPONENT = 1.0
LIKELIEST = {"top_logprobs": 20, "return_tokens_as_token_ids": True}
AGREE = 0.15
"""Log-probabilities of one adapter differ by less, over batches and servers, in bfloat16. They are compared token
by token: which of two tokens that are as likely is the greedy answer differs from batch to batch."""

PREFETCH_TIMEOUT_S = 60.0
KEY = "adapters"


@dataclass(frozen=True)
class Options:
    """One run.

    Attributes:
        adapters: how many take part, one cell each.
        modules: that an adapter changes.
        slots: vLLM's ``--max-loras``.
        host: vLLM's ``--max-cpu-loras``.
        samples: requests of each use that is asked one by one, at least.
        churn: requests of each order.
        clients: at once, in churn.
    """

    model: models.Model
    adapters: tuple[int, ...] = (1, 8, 64)
    modules: tuple[str, ...] = (*lora.ATTENTION, *lora.MLP)
    slots: int = 4
    host: int = 8
    rank: int = 16
    samples: int = 8
    churn: int = 96
    clients: int = 4
    max_tokens: int = 8
    seed: int = 0


PRESETS = {
    "smoke": Options(models.RECALL, (1, 8), slots=2, host=4, rank=8, samples=3, churn=16, max_tokens=4),
    "cpu": Options(models.CPU),
    # 521 adapters in all: 8 GB of these modules, and 45 GB of all that there are.
    "gpu": Options(
        models.QWEN3_8B,
        (1, 8, 64, 256),
        ("q_proj", "v_proj"),
        host=64,
        samples=32,
        churn=1024,
        clients=16,
        max_tokens=32,
    ),
}


@dataclass
class Arm:
    """One server and how a request names an adapter there."""

    name: str
    server: Server
    first: dict[str, Answer] = field(default_factory=dict)

    def ask(self, http: httpx.Client, adapter: str, text: str, max_tokens: int) -> Answer:
        messages = [{"role": "user", "content": text}]
        if self.name == "resolver":
            return chat(http, adapter, messages, max_tokens=max_tokens, **LIKELIEST)
        memos = {"session": adapter, "adapter": adapter, "recall": False, "remember": False}  # of its hint
        return chat(http, self.server.model, messages, max_tokens=max_tokens, memos=memos, **LIKELIEST)


class Run:
    """
    Args:
        save: called whenever there are new rows, since a run may be ended at any time.
    """

    def __init__(self, options: Options, folder: Path, save: Callable[[Run], None] = lambda run: None) -> None:
        self.options, self.folder, self._save = options, folder, save
        self.rows: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._texts = iter(range(10**9))
        self._prompt = self._text()

    def measure(self) -> None:
        options = self.options
        model = Path(options.model.directory())
        cells = [(number, self._names(number, cell)) for cell, number in enumerate(options.adapters)]
        every = [name for _, (known, fresh) in cells for name in (*known, *fresh)]
        for seed, name in enumerate(every):
            lora.write_adapter(
                self.folder / "import" / name, model, seed,
                rank=options.rank, modules=options.modules, base_name=str(model),
            )  # fmt: skip
        with ExitStack() as stack, report.progress("adapters", 1 + 6 * len(cells)) as advance:
            arms = self._start(model, stack)
            advance("registering")
            for name in every:
                self._register(arms[1], name)
            for number, (known, fresh) in cells:
                for arm in arms:
                    with self._alone(arm, arms), arm.server.http(KEY) as http:
                        advance(f"{number} adapters, {arm.name}")
                        self._one_by_one(arm, http, number, known, fresh)
                        for order in ("round_robin", "zipf"):
                            advance(f"{number} adapters, {arm.name}, {order}")
                            self._churn(arm, number, known, order)
                    self._save(self)
                self._compare(arms, known)

    def _names(self, number: int, cell: int) -> tuple[list[str], list[str]]:
        """Adapters of a cell, and as many fresh ones as are prefetched."""
        fresh = self._num_sampled(number)
        return [f"c{cell}-a{i}" for i in range(number)], [f"c{cell}-f{i}" for i in range(fresh)]

    def _num_sampled(self, number: int) -> int:
        """Adapters of which a resident or a prefetched use is timed."""
        return max(self.options.samples, min(number, 2 * self.options.samples))

    def _start(self, model: Path, stack: ExitStack) -> list[Arm]:
        options = self.options
        extra = ["--enable-lora", "--max-loras", str(options.slots), "--max-cpu-loras", str(options.host)]
        extra += ["--max-lora-rank", str(options.rank), "--max-num-seqs", "32", *options.model.flags]
        share = ["--gpu-memory-utilization", "0.46"] if has_gpu() else []
        config = self.folder / "memos.yaml"
        config.write_text(yaml.safe_dump(self._settings()), encoding="utf-8")
        environment = {
            "VLLM_PLUGINS": "lora_filesystem_resolver",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(self.folder / "import"),
        }
        stock = Server(model, extra=[*extra, *share], env=environment)
        memos = Server(model, plugin=True, config=config, extra=[*extra, *share])
        arms = [Arm("resolver", stock), Arm("memos", memos)]
        for arm in arms:
            stack.callback(arm.server.stop)
            arm.server.start()
            arm.server.wait_until_ready()
            # The first of everything is slow: kernels, allocation, LoRA buffers.
            with arm.server.http(KEY) as http:
                for _ in range(3):
                    chat(http, arm.server.model, [{"role": "user", "content": self._text()}], max_tokens=4)
        return arms

    def _settings(self) -> dict[str, Any]:
        """Room for a copy of every adapter."""
        folder = self.folder / "import"
        needed = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        adapters = {"import_dir": str(folder), "disk_bytes": 2 * needed}
        return {"data_dir": str(self.folder / "data"), "adapters": adapters}

    @contextmanager
    def _alone(self, arm: Arm, arms: Sequence[Arm]) -> Iterator[None]:
        for other in arms:
            other.server.resume() if other is arm else other.server.pause()
        try:
            yield
        finally:
            for other in arms:
                other.server.resume()

    def _register(self, arm: Arm, name: str) -> None:
        with arm.server.http(KEY) as http:
            response = http.post("/v1/adapters", json={"name": name, "path": name})
        if response.status_code != 200:
            raise RequestFailed(f"registering {name}: {response.text[:300]}")

    # -- uses -----------------------------------------------------------------------------------

    def _one_by_one(self, arm: Arm, http: httpx.Client, number: int, known: list[str], fresh: list[str]) -> None:
        """First use of each, and resident uses in between; then prefetched ones, or first uses again."""
        max_tokens = self.options.max_tokens
        first, resident = [], []
        for index, name in enumerate(known):
            first.append(self._timed(arm, http, name))
            if index < self._num_sampled(number):
                resident.append(self._timed(arm, http, name))
            arm.first[name] = arm.ask(http, name, self._prompt, max_tokens)
        prefetched = []
        for name in fresh:
            if arm.name == "memos":
                self._prefetch(http, name)
                prefetched.append(self._timed(arm, http, name))
            else:
                first.append(self._timed(arm, http, name))
            resident.append(self._timed(arm, http, name))
        self._row(arm, number, "first", first)
        self._row(arm, number, "resident", resident)
        if prefetched:
            self._row(arm, number, "prefetched", prefetched)

    def _timed(self, arm: Arm, http: httpx.Client, name: str) -> Answer:
        http.get("/metrics")  # an API server that has just answered something, in every arm
        return arm.ask(http, name, self._text(), self.options.max_tokens)

    def _prefetch(self, http: httpx.Client, name: str) -> None:
        """Announces a request, and waits until the adapter is there."""
        before = _totals(http)["prefetches"]
        hint = {"event": "will_use", "session": name, "adapter": name}
        deadline = time.monotonic() + PREFETCH_TIMEOUT_S
        if http.post("/v1/scenes", json=hint).status_code != 200:
            raise RequestFailed("the hint was refused")
        while _totals(http)["prefetches"] == before:
            if time.monotonic() > deadline:
                raise RequestFailed(f"{name} was not prefetched within {PREFETCH_TIMEOUT_S:.0f} s")
            time.sleep(0.02)

    def _churn(self, arm: Arm, number: int, known: list[str], order: str) -> None:
        options = self.options
        rng = random.Random(f"{options.seed} {number} {order}")
        weights = [1 / (place + 1) ** ZIPF_EXPONENT for place in range(number)]
        names = (
            rng.choices(known, weights, k=options.churn)
            if order == "zipf"
            else [known[index % number] for index in range(options.churn)]
        )
        texts_ = [self._text() if index % 2 else self._prompt for index in range(options.churn)]

        def work(client: int) -> list[tuple[str, str, Answer]]:
            with arm.server.http(KEY) as http:
                return [
                    (names[i], texts_[i], arm.ask(http, names[i], texts_[i], options.max_tokens))
                    for i in range(client, options.churn, options.clients)
                ]

        began = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            done = [each for part in pool.map(work, range(options.clients)) for each in part]
        rate = len(done) / (time.perf_counter() - began)
        asked = [(name, answer) for name, text, answer in done if text == self._prompt]
        wrong = [what for name, answer in asked if (what := self._mixup(arm, name, answer))]
        self.problems += [f"{arm.name}, {order}: {what}" for what in wrong]
        answers = [answer for _, _, answer in done]
        self._row(arm, number, "churn", answers, order=order, mixups=len(wrong), requests_per_s=rate)

    # -- checks ---------------------------------------------------------------------------------

    def _mixup(self, arm: Arm, name: str, answer: Answer) -> str | None:
        """What is wrong with an answer; None if it is the adapter's own."""
        own = _distance(arm.first[name], answer)
        nearest = min(arm.first, key=lambda other: _distance(arm.first[other], answer))
        if own <= AGREE or nearest == name:
            return None
        distance = _distance(arm.first[nearest], answer)
        return f"an answer for {name} is {own:.2f} from its own and {distance:.2f} from that of {nearest}"

    def _compare(self, arms: Sequence[Arm], known: list[str]) -> None:
        for name in known:
            distance = _distance(arms[0].first[name], arms[1].first[name])
            nearest = min(_distance(arms[0].first[other], arms[1].first[name]) for other in known)
            if distance > AGREE and distance > nearest:
                self.problems.append(f"the servers disagree about {name}: log-probabilities differ by {distance:.2f}")

    def _row(self, arm: Arm, number: int, use: str, answers: list[Answer], order: str = "", **more: Any) -> None:
        gaps = [gap for answer in answers for gap in answer.gaps_s] or [0.0]
        self.rows.append(
            {
                "arm": arm.name,
                "adapters": number,
                "slots": self.options.slots,
                "use": use,
                "order": order,
                "ttft_p50_s": report.percentile([answer.ttft_s for answer in answers], 0.5),
                "ttft_p95_s": report.percentile([answer.ttft_s for answer in answers], 0.95),
                "itl_p99_s": report.percentile(gaps, 0.99),
                "mixups": 0,
                "requests_per_s": None,
                "n": len(answers),
                **more,
            }
        )

    def _text(self) -> str:
        return " ".join(texts.sentences(f"adapters {self.options.seed} {next(self._texts)}", 8))


def _totals(http: httpx.Client) -> dict[str, Any]:
    totals: dict[str, Any] = http.get("/v1/memos/status").json()["adapters"]["totals"]
    return totals


def _distance(one: Answer, other: Answer) -> float:
    """Between the log-probabilities of the first tokens that both show; without end where these are few."""
    both = one.first_token.keys() & other.first_token.keys()
    if len(both) <= len(one.first_token) // 2:
        return math.inf
    return max(abs(one.first_token[token] - other.first_token[token]) for token in both)


def main(argv: Sequence[str] | None = None) -> int:
    # As Ctrl-C: the servers are stopped on the way out, and what was measured is still shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    preset, options, target = parse(argv)
    folder = Path(tempfile.mkdtemp(prefix="memos-adapters-"))

    def save(run: Run) -> None:
        if target:
            flags = {"preset": preset, "model": options.model.name, "problems": run.problems}
            names = ("modules", "slots", "host", "rank", "clients", "max_tokens", "seed")
            report.write_json(target, "adapters", flags | {name: getattr(options, name) for name in names}, run.rows)

    run = Run(options, folder, save)
    try:
        run.measure()
    except KeyboardInterrupt:
        run.problems.append("interrupted")
    except (ServerError, RequestFailed, httpx.HTTPError) as error:
        run.problems.append(str(error))  # what was measured before still counts
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    save(run)
    adapters_table.show(run.rows, run.problems)
    return 1 if run.problems else 0


def parse(argv: Sequence[str] | None = None) -> tuple[str, Options, str | None]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="default: gpu where there is one, else cpu")
    parser.add_argument("--model", help="directory, or one of " + ", ".join(models.NAMED))
    parser.add_argument("--adapters", type=_counts, metavar="N,N", help="how many adapters, one cell each")
    for name, what in (("slots", "--max-loras"), ("host", "--max-cpu-loras"), ("rank", "of every adapter")):
        parser.add_argument(f"--{name}", type=_count, metavar="N", help=what)
    parser.add_argument("--samples", type=_count, metavar="N", help="requests of each use, at least")
    parser.add_argument("--churn", type=_count, metavar="N", help="requests of each order")
    parser.add_argument("--clients", type=_count, metavar="N", help="at once, in churn")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows here")
    arguments = parser.parse_args(argv)
    preset = arguments.preset or ("gpu" if has_gpu() else "cpu")
    names = ("adapters", "slots", "host", "rank", "samples", "churn", "clients")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    options = replace(PRESETS[preset], **given)
    if arguments.model:
        try:
            options = replace(options, model=models.find(arguments.model))
        except ValueError as error:
            parser.error(str(error))
    if options.model.dummy:
        parser.error(f"{options.model.name} has no weights here, so its answers do not tell adapters apart")
    if options.host < options.slots:
        parser.error("--host must be at least --slots: vLLM keeps what is in a slot in host memory too")
    return preset, options, arguments.json


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
