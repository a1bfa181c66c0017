"""Many users, a GPU that holds few of them: whose prefix is there when he comes back?

    python -m benchmarks.multiuser --preset smoke|cpu|gpu [--model PATH] [--json FILE] [--plot FILE.png]
    python -m benchmarks.multiuser --interference ...

Each user has a memory of some thousand tokens and a conversation that goes on. Users take turns, so
that all others come between two turns of one; the KV pool holds three of them. In one run:

    direct             no prefix cache
    prefix_cache       vLLM's prefix cache under pressure
    warmup_request     the MemOS way: a chat of two tokens for the next user in the pause before his turn
    example_connector  vLLM's ExampleConnector, with the block size that suits it best
    reactive           Memos without prediction: loads when the request is there
    warm               vLLM's prefix cache with room for all: the limit, measured beside each of Memos' arms
    warm_again         the same in the place of an arm with Memos, if asked for: what this program itself makes of 1.00
    predictive         Memos; the client gives no hints
    predictive_hints   Memos; the client says when a user starts to type

TTFT is taken at the stock openai client, streaming. Rows are about the turns from the second on. The
exit code is 1 if an arm failed or, in float32, an answer differs between arms. ``--interference`` measures instead
what prefetching costs the decode streams of other users.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path

import httpx

from benchmarks import multiuser_interference, multiuser_script, multiuser_table, report, texts
from benchmarks.arms import reset_prefix_cache
from benchmarks.client import RequestFailed
from benchmarks.multiuser_arms import Arm, DirectArm, HintedArm, MemosArm, WarmUpArm
from benchmarks.multiuser_options import CHECK, Arguments, Options, parse
from benchmarks.multiuser_play import Control, Result, play
from benchmarks.multiuser_script import Script
from benchmarks.multiuser_servers import START_TIMEOUT_S, make_server, memory_directory, shown
from benchmarks.serving import Server, ServerError, has_gpu


def main(argv: Sequence[str] | None = None) -> int:
    # As Ctrl-C: the server is stopped on the way out, and what was measured is still shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse(__doc__.split("\n\n")[0], argv)
    where = arguments.options.data_dir or memory_directory(arguments.options)
    data_dir = Path(tempfile.mkdtemp(prefix="memos-multiuser-", dir=where))
    try:
        return (multiuser_interference.run if arguments.interference else compare)(arguments, data_dir)
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


def compare(arguments: Arguments, data_dir: Path) -> int:
    """All arms, then files, table and exit code."""
    options = arguments.options
    run = Run(options, data_dir)
    try:
        run.measure()
    except KeyboardInterrupt:
        run.failures.append("interrupted")
    except texts.CannotFit as error:
        run.failures.append(str(error))
    rows = multiuser_table.rows(options.model.name, options.pause_s, run.results, compare=options.comparable)
    if arguments.json:
        flags = {"preset": arguments.preset, **options.as_flags(), "servers": run.flags, "failures": run.failures}
        report.write_json(arguments.json, "multiuser", flags, rows)
    heading = (
        f"{options.model.name}: {options.users} users with {options.memory_tokens:,} tokens of memory each, "
        f"room for {options.pool_users}, {options.pause_s:g} s between two turns"
    )
    if arguments.plot and rows:
        multiuser_table.plot(arguments.plot, rows, heading)
    failures = run.failures + multiuser_table.problems(rows)
    multiuser_table.show(report.console(), rows, failures, heading)
    return 1 if failures else 0


class Run:
    """All arms on one model. One server at a time, but for the arms with Memos, beside which the limit is
    measured on a second server.

    Attributes:
        results: one per arm that was begun.
        failures: one sentence per server that did not start or died.
        flags: what each server ran with.
    """

    def __init__(self, options: Options, data_dir: Path):
        self.options = options
        self.results: list[Result] = []
        self.failures: list[str] = []
        self.flags: dict[str, str] = {}
        self._data_dir = data_dir
        self._script: Script | None = None

    def measure(self) -> None:
        arms = [arm for arm in make_arms(self.options) if arm.name in self.options.arms]
        beside = [arm for arm in arms if isinstance(arm, MemosArm) or arm.name == CHECK]
        paired = bool(beside) and multiuser_table.LIMIT in self.options.arms
        alone = [arm for arm in arms if arm not in beside and not (paired and arm.name == multiuser_table.LIMIT)]
        steps = len(alone + beside) * self.options.users * self.options.turns
        with report.progress(self.options.model.name, steps) as advance:
            for deployment, group in groupby(alone, lambda arm: arm.deployment):
                with self._noted(deployment), self._server(deployment) as server:
                    for arm in group:
                        empty(server)
                        self._play(arm, server, advance)
            with self._noted("large"), self._server("large") if paired else nullcontext() as large:
                for arm in beside:
                    if large is not None:
                        large.pause()
                    with self._noted(arm.deployment), self._server(arm.deployment) as server:
                        self._play(arm, server, advance, large)

    def _play(self, arm: Arm, server: Server, advance: Callable[[str], None], large: Server | None = None) -> None:
        self.results.append(Result(arm.name))
        script = self._script_by(server)
        control = None if large is None else Control(large, arm.name)
        play(arm, server, script, self.options.pause_s, advance, self.results[-1], control)

    @contextmanager
    def _server(self, deployment: str) -> Iterator[Server]:
        server = make_server(deployment, self.options, self._data_dir, gpu_share=0.45 if has_gpu() else None)
        try:
            server.start()
            server.wait_until_ready(START_TIMEOUT_S)
            self.flags[deployment] = shown(server)
            yield server
        finally:
            server.stop()

    @contextmanager
    def _noted(self, deployment: str) -> Iterator[None]:
        """What goes wrong with one server is noted, and the other arms still count."""
        try:
            yield
        except (ServerError, RequestFailed, httpx.HTTPError) as error:
            self.failures.append(f"{deployment}: {error}")

    def _script_by(self, server: Server) -> Script:
        """The script, made by the first server that can count tokens."""
        if self._script is None:
            with server.http() as http:
                self._script = multiuser_script.write(http, server.model, self.options.shape, self.options.seed)
        return self._script


def make_arms(options: Options) -> list[Arm]:
    """One per name in ``multiuser_options.ARMS``, and the check, with the server that it runs on."""
    return [
        DirectArm("direct", "small"),
        Arm("prefix_cache", "small"),
        WarmUpArm("warmup_request", "small"),
        Arm("example_connector", "example"),
        MemosArm("reactive", "reactive"),
        Arm("warm", "large"),
        Arm("warm_again", "large_again"),
        MemosArm("predictive", "predictive"),
        # A server of its own: what the other arm has taught would help it.
        HintedArm("predictive_hints", "predictive_hints", options.lead_s),
    ]


def empty(server: Server) -> None:
    """Leaves nothing in the prefix cache of what an earlier arm computed."""
    with server.http() as http:
        reset_prefix_cache(http)


if __name__ == "__main__":
    sys.exit(main())
