"""A trace of real requests through cache policies: how many reusable blocks are ready when a request comes.

    python -m benchmarks.trace [--trace FILE] [--capacity 500 1500 ...] [--json FILE] [--plot FILE.png]

    lru, s3fifo, arc   know the past, load nothing early
    ours_evict         the engine's predictor and residency policy, which only choose what to give up
    ours               the same, which also bring back what is predicted
    ours_hint          the same, told that the user types, --hint-lead-ms before the request
    belady             knows the future, loads nothing early
    oracle             knows the future and loads early

and with --bounds, what ours could do if it knew more:

    ours_trained       the habits of the whole trace before it begins: all that learning faster could give
    ours_returns       which conversations go on, not when

Everything that is learned is learned from the trace as it goes by. The trace has no users, and no times
of answers: an answer ends --decode-ms-per-token per token after its request.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from benchmarks import report, trace_table
from benchmarks.arguments import output_file
from benchmarks.trace_baselines import ARC, LRU, S3FIFO, Belady, Future
from benchmarks.trace_data import TraceError, Turn, read, turns
from benchmarks.trace_replay import Machine, OursReplay, Outcome, replay_baseline, replay_oracle, trained
from memos_vllm.core.predictor import Predictor

TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "mooncake_conversation.jsonl.xz"
CAPACITIES = (500, 1500, 3000, 6000, 12000)
HINT_LEAD_MS = 1000.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    console = report.console()
    trace = Path(arguments.trace or TRACE)
    if arguments.trace is None and not trace.exists():
        console.print(f"skipped: there is no {trace}; name a trace with --trace", highlight=False)
        return 0
    machine = Machine(arguments.link_gb_per_s, arguments.block_bytes, arguments.decode_ms_per_token / 1000.0)
    try:
        replayed = turns(read(trace))
    except TraceError as error:
        print(f"trace: {error}", file=sys.stderr)
        return 2
    arms = _arms(replayed, machine, arguments.hint_lead_ms / 1000.0)
    named = arguments.policy or [policy for policy in trace_table.POLICIES if policy not in trace_table.BOUNDS]
    if arguments.bounds:
        named = [*named, *trace_table.BOUNDS]
    wanted = [policy for policy in trace_table.POLICIES if policy in named]
    name = trace.name.removesuffix(".xz").removesuffix(".jsonl")
    rows = []
    with report.progress("trace", len(wanted) * len(arguments.capacity)) as advance:
        for capacity in arguments.capacity:
            for policy in wanted:
                start = time.perf_counter()
                outcome = arms[policy](capacity)
                seconds = time.perf_counter() - start
                rows.append(trace_table.row(name, policy, capacity, outcome, machine.block_bytes, seconds))
                advance(f"{policy} at {capacity:,}")
    rows = trace_table.with_gaps(rows)
    title = (
        f"{name}: {len(replayed):,} requests, {sum(turn.num_reusable for turn in replayed):,} reusable blocks; "
        f"link {machine.link_gb_per_s:g} GB/s, {machine.block_bytes / 2**20:g} MiB per block, "
        f"hint {arguments.hint_lead_ms:g} ms ahead"
    )
    trace_table.show(console, rows, title)
    if arguments.json:
        flags = {key: value for key, value in vars(arguments).items() if key not in ("json", "plot")}
        report.write_json(arguments.json, "trace", flags | {"trace": trace.name}, rows)
    if arguments.plot:
        trace_table.plot(arguments.plot, rows, title)
    return 0


def _arms(replayed: Sequence[Turn], machine: Machine, lead_s: float) -> dict[str, Callable[[int], Outcome]]:
    def future() -> Future:
        return Future(turn.request.blocks for turn in replayed)

    @cache
    def habits() -> Predictor:
        return trained(replayed, machine)

    return {
        "lru": lambda capacity: replay_baseline(replayed, LRU(capacity)),
        "s3fifo": lambda capacity: replay_baseline(replayed, S3FIFO(capacity)),
        "arc": lambda capacity: replay_baseline(replayed, ARC(capacity)),
        "ours_evict": lambda capacity: OursReplay(replayed, capacity, machine, prefetch=False).run(),
        "ours": lambda capacity: OursReplay(replayed, capacity, machine).run(),
        "ours_hint": lambda capacity: OursReplay(replayed, capacity, machine, lead_s).run(),
        "ours_trained": lambda capacity: OursReplay(replayed, capacity, machine, predictor=habits().fresh()).run(),
        "ours_returns": lambda capacity: OursReplay(replayed, capacity, machine, knows_returns=True).run(),
        "belady": lambda capacity: replay_baseline(replayed, Belady(capacity, future())),
        "oracle": lambda capacity: replay_oracle(replayed, capacity, machine),
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    model = Machine()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trace", metavar="FILE", help=f".jsonl or .jsonl.xz; default: {TRACE.name} in shared/data, if it is there"
    )
    parser.add_argument(
        "--capacity", nargs="+", type=_count, default=list(CAPACITIES), metavar="BLOCKS", help="default: %(default)s"
    )
    parser.add_argument("--policy", nargs="+", choices=list(trace_table.POLICIES), help="default: all but the bounds")
    parser.add_argument("--bounds", action="store_true", help="also what ours could do if it knew more")
    parser.add_argument(
        "--hint-lead-ms", type=_positive, default=HINT_LEAD_MS, metavar="MS", help="default: %(default)g"
    )
    parser.add_argument(
        "--link-gb-per-s", type=_positive, default=model.link_gb_per_s, metavar="GB", help="default: %(default)g"
    )
    parser.add_argument(
        "--block-bytes",
        type=_count,
        default=model.block_bytes,
        metavar="BYTES",
        help="default: %(default)d, 512 tokens of Llama-3.1-8B in bf16",
    )
    parser.add_argument(
        "--decode-ms-per-token",
        type=_positive,
        default=1000.0 * model.decode_s_per_token,
        metavar="MS",
        help="when an answer ends; default: %(default)g",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    arguments.capacity = sorted(set(arguments.capacity))
    return arguments


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
