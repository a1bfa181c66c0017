"""What the fp8 store changes in answers: log-probabilities and tokens against KV that was kept exactly.

    python -m benchmarks.fp8_divergence [--preset smoke|cpu|gpu] [--model NAME|PATH ...] [--json FILE]

For each model one engine with `kv.store_dtype: fp8`. Each prompt is answered greedily three times:

    computed   nothing is cached; the blocks are saved as fp8
    exact      from the GPU's prefix cache, as the first answer left it
    fp8        the prefix cache was reset, the prefix is loaded from the fp8 store

``floor`` compares computed with exact (another order of additions, no store), ``fp8`` compares fp8 with exact:
the difference of the log-probability of each token of the exact answer, up to and with the first token that
differs; the share of tokens that are equal; and of answers that are. The recall model gets its own
task, whose answers are right or wrong; other models get random tokens, on which a choice is a toss-up.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks import models, report
from benchmarks.arguments import output_file
from benchmarks.serving import has_gpu

Row = dict[str, Any]

MAX_TOKENS = 24
LOGPROBS = 20


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...]
    contexts: tuple[int, ...]
    prompts: int
    """Per model and context length."""


PRESETS = {
    "smoke": Options((models.RECALL.name,), (200,), 3),
    "cpu": Options((models.RECALL.name, models.CPU.name), (256, 1024), 24),
    "gpu": Options((models.RECALL.name, models.CPU.name, models.QWEN3_8B.name), (1024, 3072), 48),
}


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    answer: str | None
    """What is right, where that is known."""


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    """Of the likeliest tokens at each position."""
    text: str
    cached_tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    # As Ctrl-C: the engine ends, and what was measured is still shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _parse(argv)
    options: Options = arguments.options
    console = report.console()
    rows: list[Row] = []
    failures: list[str] = []
    with report.progress("fp8_divergence", len(options.models)) as advance:
        for name in options.models:
            try:
                rows += in_a_process_of_its_own(name, options)
            except KeyboardInterrupt:
                failures.append("interrupted")
            except Exception as error:  # whatever vLLM or its process ended with; the other models still count
                failures.append(f"{name}: {type(error).__name__}: {error}")
            if arguments.json:
                flags = {"preset": arguments.preset, "prompts": options.prompts, "contexts": list(options.contexts)}
                report.write_json(arguments.json, "fp8_divergence", flags | {"failures": failures}, rows)
            if "interrupted" in failures:
                break
            advance(name)
    show(console, rows)
    for failure in failures:
        console.print("[red]FAILED[/red]", Text(failure), highlight=False)
    return 1 if failures else 0


def in_a_process_of_its_own(name: str, options: Options) -> list[Row]:
    """``measure``; vLLM gives its memory back with its process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, name, options).result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def measure(name: str, options: Options) -> list[Row]:
    """All rows of one model, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory(prefix="fp8-divergence-") as directory:
        model = models.find(name)
        engine = _Engine(model, Path(directory), max(options.contexts))
        try:
            rows = []
            for context in options.contexts:
                prompts = _prompts(model, engine.tokenizer, context, options.prompts)
                rows += _compare(name, context, engine, prompts)
            return rows
        finally:
            engine.close()


def _compare(name: str, context: int, engine: _Engine, prompts: Sequence[Prompt]) -> list[Row]:
    computed, exact, fp8 = [], [], []
    for prompt in prompts:
        engine.forget()
        computed.append(engine.answer(prompt))
        exact.append(engine.answer(prompt))
        engine.drop_gpu()
        fp8.append(engine.answer(prompt))
        if fp8[-1].cached_tokens != exact[-1].cached_tokens or not fp8[-1].cached_tokens:
            raise RuntimeError(
                f"{fp8[-1].cached_tokens} tokens came from the store instead of {exact[-1].cached_tokens}"
            )
    facts = {"model": name, "context_tokens": context, "n": len(prompts), **engine.block_bytes()}
    return [
        {"arm": "floor"} | facts | divergence(exact, computed) | _right(prompts, computed),
        {"arm": "fp8"} | facts | divergence(exact, fp8) | _right(prompts, fp8),
    ]


def divergence(exact: Sequence[Answer], other: Sequence[Answer]) -> Row:
    """Of one list of answers from another, position by position.

    A token of the exact answer that is not among the other's likeliest counts with the least of theirs, so
    that its difference is a lower bound.
    """
    differences, equal, compared, same = [], 0, 0, 0
    for one, two in zip(exact, other, strict=True):
        same += one.token_ids == two.token_ids
        for position, (a, b) in enumerate(zip(one.token_ids, two.token_ids, strict=True)):
            mine, theirs = one.logprobs[position], two.logprobs[position]
            differences.append(abs(mine[a] - theirs.get(a, min(theirs.values()))))
            if a != b:
                break  # from here on the two continue different texts
        equal += sum(a == b for a, b in zip(one.token_ids, two.token_ids, strict=True))
        compared += len(one.token_ids)
    return {
        "max_logprob_diff": max(differences),
        "mean_logprob_diff": statistics.fmean(differences),
        "equal_tokens": equal / compared,
        "equal_answers": same / len(exact),
    }


def _right(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Row:
    known = [(prompt.answer, answer.text) for prompt, answer in zip(prompts, answers, strict=True) if prompt.answer]
    right = sum(text.startswith(expected) for expected, text in known)
    return {"right_answers": right / len(known) if known else None}


def _prompts(model: models.Model, tokenizer: Any, context: int, count: int) -> list[Prompt]:
    if model is not models.RECALL:
        rng = random.Random(f"{model.name} {context}")
        vocabulary = range(300, min(len(tokenizer), 4000))
        return [Prompt(rng.choices(vocabulary, k=context), None) for _ in range(count)]
    sys.path.insert(0, str(models.RECALL_MODEL))
    try:
        from evaluate import make_examples
    finally:
        sys.path.remove(str(models.RECALL_MODEL))
    examples = list(make_examples(count, seed=1, lengths=(context,)))
    chats = (tokenizer.apply_chat_template(e.messages, add_generation_prompt=True, return_dict=False) for e in examples)
    return [Prompt(list(ids), example.answer) for ids, example in zip(chats, examples, strict=True)]


def room(context: int) -> int:
    """``max_model_len``: a chat of the recall model takes more tokens than its context."""
    return 2 * context + MAX_TOKENS + 256


class _Engine:
    """vLLM in this process, with the connector and the fp8 store."""

    def __init__(self, model: models.Model, data_dir: Path, context: int) -> None:
        from vllm import LLM

        from memos_vllm.config import MemosConfig
        from memos_vllm.data_dir import secret
        from memos_vllm.integration import salts
        from memos_vllm.integration.plugin import connector_config
        from memos_vllm.types import Principal

        kv = {"store_dtype": "fp8", "disk_bytes": 0, "min_load_tokens": 1}
        config = MemosConfig.model_validate({"data_dir": str(data_dir), "kv": kv})
        flags: dict[str, Any] = {} if has_gpu() else {"kv_cache_memory_bytes": 256 * 2**20}
        self._llm = LLM(
            model.directory(),
            enforce_eager=True,
            max_model_len=room(context),
            block_size=16 if has_gpu() else 32,
            kv_transfer_config=connector_config(None, config),
            disable_log_stats=True,
            max_logprobs=LOGPROBS,
            **flags,
        )
        self._salt = salts.salt_of(secret(data_dir), Principal("benchmark", "divergence"), 0)
        self.tokenizer = self._llm.get_tokenizer()
        self._core = self._llm.llm_engine.engine_core.engine_core
        self._scheduler = self._core.scheduler

    def answer(self, prompt: Prompt) -> Answer:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=LOGPROBS)
        asked = {"prompt_token_ids": prompt.token_ids, "cache_salt": self._salt}
        output = self._llm.generate([asked], params, use_tqdm=False)[0]
        self._settle()
        completion = output.outputs[0]
        likeliest = ({token: one.logprob for token, one in step.items()} for step in completion.logprobs)
        return Answer(tuple(completion.token_ids), tuple(likeliest), completion.text, output.num_cached_tokens or 0)

    def drop_gpu(self) -> None:
        assert self._scheduler.reset_prefix_cache()

    def forget(self) -> None:
        self.drop_gpu()
        self._scheduler.connector.scheduler_side.handle("drop_host", {})

    def block_bytes(self) -> Row:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from memos_vllm.kernels.kv_copy import block_bytes

        side = get_kv_transfer_group().worker_side
        return {"block_bytes": block_bytes(side.planes), "stored_bytes": side.handshake().block_bytes}

    def close(self) -> None:
        self._core.shutdown()

    def _settle(self) -> None:
        while self._scheduler.connector.has_pending_push_work():
            self._core.step_fn()


def show(console: Any, rows: Sequence[Row]) -> None:
    table = Table(title="against KV that was kept exactly", title_justify="left")
    for name in (
        "model",
        "context",
        "",
        "bytes of a block",
        "|logprob| max",
        "mean",
        "equal tokens",
        "answers",
        "right",
    ):
        table.add_column(name, justify="left" if name in ("model", "") else "right")
    for one in rows:
        right = "" if one["right_answers"] is None else f"{one['right_answers']:.3f}"
        stored = f"{one['stored_bytes']:,} of {one['block_bytes']:,}" if one["arm"] == "fp8" else ""
        table.add_row(
            one["model"], f"{one['context_tokens']:,}", one["arm"], stored, f"{one['max_logprob_diff']:.4f}",
            f"{one['mean_logprob_diff']:.5f}", f"{one['equal_tokens']:.4f}", f"{one['equal_answers']:.3f}", right,
        )  # fmt: skip
    console.print(table)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_divergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="default: gpu where there is one, else cpu")
    parser.add_argument("--model", action="append", help="directory, hub name, or one of " + ", ".join(models.NAMED))
    parser.add_argument("--json", type=output_file, metavar="FILE")
    arguments = parser.parse_args(argv)
    arguments.preset = arguments.preset or ("gpu" if has_gpu() else "cpu")
    options = PRESETS[arguments.preset]
    for name in arguments.model or ():
        try:
            model = models.find(name)
        except ValueError as error:
            parser.error(str(error))
        if model.dummy:
            parser.error(f"{name} has no weights here, so its answers say nothing about its KV")
    named = tuple(arguments.model) if arguments.model else options.models
    arguments.options = Options(named, options.contexts, options.prompts)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
