"""What one run of the multi-user benchmark measures, and its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks import models
from benchmarks.arguments import directory, output_file
from benchmarks.multiuser_script import Shape
from benchmarks.serving import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE, has_gpu

ARMS = (
    "direct",
    "prefix_cache",
    "warmup_request",
    "example_connector",
    "reactive",
    "warm",
    "predictive",
    "predictive_hints",
)
"""Which there are. ``warm`` is played beside each arm with Memos, or alone if there is none."""

CHECK = "warm_again"
"""Not among those that are played unasked: ``warm`` in the place of an arm with Memos, so 1.00 times ``warm`` but for
what the machine and this program do to the figure."""


@dataclass(frozen=True)
class Options:
    """One run.

    Attributes:
        memory_tokens: of the system message that holds a user's memory.
        query_tokens: of a question with its template.
        max_tokens: of an answer.
        pool_users: how many users' conversations the KV pool holds.
        pause_s: from the end of one answer to the next request, of whichever user.
        lead_s: how long before his turn a user starts to type.
        dtype: of weights and KV.
        pairs: of windows without and with prefetches, for ``--interference``.
        stream_tokens: length of a decode stream in such a window.
        hint_every_s: between two hints in a window with prefetches.
    """

    model: models.Model
    users: int = 8
    turns: int = 3
    memory_tokens: int = 2880
    query_tokens: int = 32
    max_tokens: int = 8
    pool_users: int = 3
    pause_s: float = 1.5
    lead_s: float = 0.5
    block_size: int = GPU_BLOCK_SIZE if has_gpu() else CPU_BLOCK_SIZE
    dtype: str = "auto"
    arms: tuple[str, ...] = ARMS
    seed: int = 0
    data_dir: str | None = None
    pairs: int = 5
    stream_tokens: int = 128
    hint_every_s: float = 0.5

    @property
    def shape(self) -> Shape:
        return Shape(
            users=self.users,
            turns=self.turns,
            memory_tokens=self.memory_tokens,
            query_tokens=self.query_tokens,
            max_tokens=self.max_tokens,
            pool_users=self.pool_users,
            block_size=self.block_size,
        )

    @property
    def comparable(self) -> bool:
        """Whether every arm must give the same answers.

        In float32 a greedy answer does not depend on the shapes in which its prompt was computed. In 16 bits it
        does where two tokens are about as likely, which they are to random weights and not to the recall model.
        """
        return not self.model.dummy and (self.dtype == "float32" or self.model is models.RECALL)

    def as_flags(self) -> dict[str, Any]:
        """For the file that is written."""
        return {**asdict(self), "model": self.model.name, "arms": list(self.arms), "data_dir": None}


PRESETS = {
    # Two to three minutes: starting the servers is most of it. Too small to judge times by.
    "smoke": Options(
        models.RECALL, users=5, turns=3, memory_tokens=800, query_tokens=48, pause_s=0.6, pairs=2, stream_tokens=384
    ),
    # A good ten minutes on two cores that have nothing else to do.
    "cpu": Options(models.CPU, turns=4, dtype="float32"),
    "gpu": Options(
        models.QWEN3_8B, turns=4, memory_tokens=2848, pause_s=0.5, pairs=7, stream_tokens=256, hint_every_s=0.25
    ),
}


@dataclass(frozen=True)
class Arguments:
    options: Options
    preset: str
    interference: bool
    json: str | None
    plot: str | None


def parse(description: str, argv: Sequence[str] | None = None) -> Arguments:
    """Command line to options; a bad value ends the program with one sentence and code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multiuser", description=description)
    parser.add_argument("--preset", choices=list(PRESETS), help="default: gpu where there is one, else cpu")
    parser.add_argument("--model", help="directory, hub name, or one of " + ", ".join(models.NAMED))
    parser.add_argument("--users", type=_count, metavar="N", help="who take turns")
    parser.add_argument("--turns", type=_count, metavar="N", help="per user, at least 2")
    parser.add_argument("--memory-tokens", type=_count, metavar="N", help="in front of each user's conversation")
    parser.add_argument("--max-tokens", type=_count, metavar="N", help="of an answer")
    parser.add_argument("--pool-users", type=_count, metavar="N", help="users whose KV fits the pool")
    parser.add_argument("--pause-s", type=_seconds, metavar="S", help="from one answer to the next user's request")
    parser.add_argument("--lead-s", type=_seconds, metavar="S", help="from the typing hint to the request")
    parser.add_argument("--block-size", type=_count, metavar="N", help="tokens per KV block")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="of weights and KV")
    parser.add_argument("--arms", type=_arms, metavar="A,B", help=f"default: {','.join(ARMS)}; also: {CHECK}")
    parser.add_argument("--seed", type=int, help="of documents and questions")
    parser.add_argument("--data-dir", type=directory, help="where KV files go; default: that for temporary files")
    parser.add_argument("--interference", action="store_true", help="measure decode streams beside prefetches instead")
    parser.add_argument("--pairs", type=_count, metavar="N", help="repetitions for --interference")
    parser.add_argument("--stream-tokens", type=_count, metavar="N", help="of each stream, for --interference")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows here")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw the rows here")
    arguments = parser.parse_args(argv)
    preset = arguments.preset or ("gpu" if has_gpu() else "cpu")
    own = ("preset", "model", "interference", "json", "plot")
    given = {name: value for name, value in vars(arguments).items() if name not in own and value is not None}
    options = replace(PRESETS[preset], **given)
    if arguments.model:
        try:
            options = replace(options, model=models.find(arguments.model))
        except ValueError as error:
            parser.error(str(error))
    if problem := problem_of(options):
        parser.error(problem)
    if preset == "gpu" and not arguments.model and not has_gpu():
        parser.error("the preset gpu needs an NVIDIA GPU and vLLM's CUDA build; take --preset cpu")
    return Arguments(options, preset, arguments.interference, arguments.json, arguments.plot)


def problem_of(options: Options) -> str | None:
    """Why these options measure nothing."""
    if options.turns < 2:
        return "the first turn finds no KV in any arm; --turns must be at least 2"
    if options.users <= options.pool_users:
        return f"{options.users} users fit a pool for {options.pool_users}; --users must be greater than --pool-users"
    if options.lead_s > options.pause_s:
        return "a hint cannot be sent before the answer that it follows; --lead-s must be at most --pause-s"
    if options.stream_tokens + options.query_tokens > options.shape.max_model_len:
        return f"a stream must fit the model length of {options.shape.max_model_len}; --stream-tokens must be smaller"
    if options.model is models.RECALL and not (models.RECALL_MODEL / "model.safetensors").exists():
        return f"the recall model is missing from {models.RECALL_MODEL}; name another one with --model"
    return None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds, from 0 to an hour")
    return value


def _arms(text: str) -> tuple[str, ...]:
    arms = tuple(dict.fromkeys(text.split(",")))
    if unknown := [arm for arm in arms if arm not in (*ARMS, CHECK)]:
        raise argparse.ArgumentTypeError(f"there is no arm {unknown[0]!r}; the arms are {', '.join((*ARMS, CHECK))}")
    return arms
