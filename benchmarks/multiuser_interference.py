"""What prefetching costs others: inter-token latency of four decode streams, without and with prefetches.

Two servers with Memos, one without prediction. The users' KV is in host memory, and the pool holds a
few of them, beside four streams of users who have no memory. In a window the streams decode at the
same time, from the same prompts as ever, while the client says of one user after another that he is
typing; where prediction is on, his KV is brought in while the others decode. Windows alternate between
the servers, the other one is paused, and who begins a pair alternates too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import openai

from benchmarks import multiuser_script, report, texts
from benchmarks.arms import kv_status
from benchmarks.client import RequestFailed
from benchmarks.multiuser_arms import MemosArm, Play
from benchmarks.multiuser_client import Answer, Counters, ask, counters, hint, prediction_totals
from benchmarks.multiuser_options import Arguments, Options
from benchmarks.multiuser_script import Script
from benchmarks.multiuser_servers import make_server, shown
from benchmarks.serving import Server, ServerError, has_gpu
from benchmarks.ttft import start

ARM = MemosArm("interference", "")
STREAMS = 4
TARGET = 1.05
SAVE_TIMEOUT_S = 120.0
OFF, ON = "prefetch_off", "prefetch_on"

Row = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """Four streams at once.

    Attributes:
        gaps_s: between the tokens of all streams, while all of them were decoding.
        prefetched_blocks: brought in meanwhile.
        hints: sent meanwhile.
    """

    arm: str
    answers: tuple[Answer, ...]
    gaps_s: tuple[float, ...]
    prefetched_blocks: int
    hints: int
    totals: Counters

    def itl_s(self, share: float) -> float:
        return report.percentile(self.gaps_s, share)


def run(arguments: Arguments, data_dir: Path) -> int:
    """Measures all pairs, then files, verdict and exit code."""
    options = arguments.options
    windows: list[Window] = []
    failures: list[str] = []
    share = 0.45 if has_gpu() else None
    servers = {
        OFF: make_server("reactive", options, data_dir, gpu_share=share),
        ON: make_server("predictive", options, data_dir, gpu_share=share),
    }
    try:
        start(list(servers.values()))
        measure(servers, options, windows)
    except KeyboardInterrupt:
        failures.append("interrupted")
    except (ServerError, RequestFailed, texts.CannotFit, httpx.HTTPError) as error:
        failures.append(str(error) or type(error).__name__)
    finally:
        for server in servers.values():
            server.stop()
    found = rows(options.model.name, windows, compare=options.comparable)
    if arguments.json:
        flags = {"preset": arguments.preset, "interference": True, **options.as_flags()}
        flags |= {"servers": {name: shown(server) for name, server in servers.items()}, "failures": failures}
        report.write_json(arguments.json, "multiuser", flags, found)
    for line in [*lines(found), *(f"[red]FAILED[/red] {failure}" for failure in failures)]:
        report.console().print(line, highlight=False)
    return 1 if failures or not found or any(row["equal"] is False for row in found) else 0


def measure(servers: Mapping[str, Server], options: Options, windows: list[Window]) -> None:
    """Fills ``windows``, after one pair that is thrown away."""
    script = None
    with report.progress("interference", 2 * (options.pairs + 1)) as advance:
        for name, server in servers.items():
            advance(f"first turns, {name}")
            with alone(server, servers), ARM.opened(server) as play:
                script = script or multiuser_script.write(play.http, server.model, options.shape, options.seed)
                introduce_all(play, script)
                window(server, script, options, name)
        assert script is not None
        for pair in range(options.pairs):
            for name in (OFF, ON) if pair % 2 == 0 else (ON, OFF):
                advance(f"pair {pair + 1}, {name}")
                with alone(servers[name], servers):
                    windows.append(window(servers[name], script, options, name))


@contextmanager
def alone(server: Server, servers: Mapping[str, Server]) -> Iterator[None]:
    """The others are paused meanwhile."""
    others = [other for other in servers.values() if other is not server]
    for other in others:
        other.pause()
    try:
        yield
    finally:
        for other in others:
            other.resume()


def introduce_all(play: Play, script: Script) -> None:
    """Has every user's KV computed once and saved."""
    for conversation in script.conversations:
        ARM.introduce(play, conversation)
        messages = [{"role": "user", "content": conversation.queries[0]}]
        ARM.ask(play, conversation, messages, script.shape.max_tokens)
    wait_until_idle(play.http)


def wait_until_idle(http: httpx.Client) -> None:
    deadline = time.monotonic() + SAVE_TIMEOUT_S
    while kv_status(http)["in_flight"]:
        if time.monotonic() > deadline:
            raise RequestFailed(f"KV transfers did not end within {SAVE_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


def window(server: Server, script: Script, options: Options, name: str) -> Window:
    over, together = threading.Event(), threading.Barrier(STREAMS)
    with ExitStack() as stack:
        play = stack.enter_context(ARM.opened(server))
        clients = [stack.enter_context(server.client()) for _ in range(STREAMS)]
        pool = stack.enter_context(ThreadPoolExecutor(STREAMS + 1))
        wait_until_idle(play.http)
        before, blocks = counters(play.http), prediction_totals(play.http).get("prefetched_blocks", 0)
        queries = [conversation.queries[0] for conversation in script.conversations]
        streams = [
            pool.submit(stream, client, server.model, queries[number], number, options.stream_tokens, together)
            for number, client in enumerate(clients)
        ]
        hinting = pool.submit(send_hints, play, script, options.hint_every_s, over)
        try:
            answers = tuple(one.result() for one in streams)
        finally:
            over.set()
        blocks = prediction_totals(play.http).get("prefetched_blocks", 0) - blocks
        gaps_s = common_gaps(answers)
        if not gaps_s:
            raise RequestFailed("the streams did not overlap; a longer answer is needed (--stream-tokens)")
        return Window(name, answers, gaps_s, blocks, hinting.result(), counters(play.http) - before)


def stream(
    client: openai.OpenAI, model: str, query: str, number: int, num_tokens: int, together: threading.Barrier
) -> Answer:
    """One of the others: a short prompt without memory, a long answer."""
    client.models.list()  # the connection stands before the streams begin
    together.wait()
    messages = [{"role": "user", "content": query}]
    return ask(client, model, messages, num_tokens, cache_salt=f"stream-{number}", ignore_eos=True)


def send_hints(play: Play, script: Script, every_s: float, over: threading.Event) -> int:
    """Says of one user after another that he types, until ``over``; how often."""
    sent = 0
    for conversation in cycle(script.conversations):
        if over.wait(every_s):
            break
        hint(play.http, "typing", conversation.user, conversation.session)
        sent += 1
    return sent


def common_gaps(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Gaps that began after the last stream's first token and ended before the first stream's last."""
    begin = max(answer.times_s[0] for answer in answers)
    end = min(answer.times_s[-1] for answer in answers)
    return tuple(
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.times_s, answer.times_s[1:], strict=False)
        if begin <= earlier and later <= end
    )


def rows(model: str, windows: Sequence[Window], *, compare: bool = True) -> list[Row]:
    """One row per arm; latencies are medians over the windows. Without ``compare`` texts may differ between windows."""
    out = []
    reference = [answer.text for answer in windows[0].answers] if windows else []
    for arm in (OFF, ON):
        of_arm = [one for one in windows if one.arm == arm]
        if not of_arm:
            continue
        ttft_s = [answer.ttft_s for one in of_arm for answer in one.answers]
        p99_s = [one.itl_s(0.99) for one in of_arm]
        out.append(
            {
                "arm": arm,
                "ttft_p50_s": report.percentile(ttft_s, 0.5),
                "ttft_p95_s": report.percentile(ttft_s, 0.95),
                "cached_tokens": min(answer.cached_tokens for one in of_arm for answer in one.answers),
                "ready_share": None,
                "prefetch_forwards": sum(one.totals.requests - STREAMS for one in of_arm),
                "preemptions": sum(one.totals.preemptions for one in of_arm),
                "equal": all([answer.text for answer in one.answers] == reference for one in of_arm)
                if compare
                else None,
                "n": len(of_arm),
                "model": model,
                "itl_p50_s": report.percentile([one.itl_s(0.5) for one in of_arm], 0.5),
                "itl_p99_s": report.percentile(p99_s, 0.5),
                "itl_p99_s_windows": [round(value, 5) for value in p99_s],
                "gaps": sum(len(one.gaps_s) for one in of_arm),
                "hints": sum(one.hints for one in of_arm),
                "prefetched_blocks": sum(one.prefetched_blocks for one in of_arm),
            }
        )
    return out


def lines(rows: Sequence[Row]) -> list[str]:
    """What was found, and the verdict."""
    out = [
        f"{row['arm']:13} inter-token latency p50 {1000 * row['itl_p50_s']:.1f} ms, "
        f"p99 {1000 * row['itl_p99_s']:.1f} ms "
        f"(medians of {row['n']} windows of {STREAMS} streams); {row['hints']} hints, "
        f"{row['prefetched_blocks']} blocks prefetched, {row['preemptions']} preemptions"
        for row in rows
    ]
    by_arm = {row["arm"]: row for row in rows}
    if OFF not in by_arm or ON not in by_arm:
        return out
    off, on = by_arm[OFF], by_arm[ON]
    ratio = on["itl_p99_s"] / off["itl_p99_s"]
    pairs = zip(on["itl_p99_s_windows"], off["itl_p99_s_windows"], strict=False)
    paired = report.percentile([one / other for one, other in pairs], 0.5)
    sound = on["prefetched_blocks"] > 0
    word = "[green]met[/green]   " if sound and paired <= TARGET else "[yellow]missed[/yellow]"
    note = "" if sound else "; nothing was prefetched, so this says nothing"
    out.append(
        f"{word}  p99 with prefetches is {paired:.2f} x that without (median of pairs); target {TARGET:.2f} x{note}; "
        f"{ratio:.2f} x as the medians of all windows"
    )
    if False in (off["equal"], on["equal"]):
        out.append("[red]FAILED[/red] the streams' texts differ between windows")
    return out
