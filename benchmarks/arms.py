"""The two arms of a TTFT measurement, stock vLLM and vLLM with Memos, as steps that can be interleaved.

A *trial* is one user with one document. It is asked several queries of the same length, so that only
the memory in front is shared. The stock arm answers every query from its own prefix cache (``warm``);
the Memos arm answers the same queries with the KV in one tier. Pairs of answers to one query are
compared in time and, bit by bit, in content: both computed the same few tokens on the same prefix.

Every source promises how many tokens come from where. A sample that breaks the promise carries a
``problem`` and is never reported as a measurement.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.client import Answer, RequestFailed, chat
from benchmarks.serving import Server
from memos_vllm.memory.assembly import assemble

SAVE_TIMEOUT_S = 120.0
_POLL_S = 0.005


@dataclass(frozen=True)
class Trial:
    """One user, one document, and the queries that are asked about it.

    Attributes:
        user: API key on the Memos server, cache salt on the stock server.
        document: its system message has ``context_tokens`` tokens.
        first_query: asked of both servers with nothing cached.
        hits: (source, query) in the order in which Memos serves them; stock answers them warm.
        restart_query: asked after the restart; ``None`` leaves the restart out.
    """

    user: str
    context_tokens: int
    query_tokens: int
    document: str
    first_query: str
    hits: Sequence[tuple[str, str]]
    restart_query: str | None = None
    repeat: int = 0

    @property
    def cell(self) -> tuple[int, int]:
        return self.context_tokens, self.query_tokens


@dataclass(frozen=True)
class Sample:
    """One timed request."""

    arm: str
    source: str
    trial: Trial
    query: str
    answer: Answer
    problem: str | None = None
    save_s: float | None = None


@dataclass
class Arm(ABC):
    """What both arms share. ``steps`` and ``restart_steps`` yield after each measured request."""

    server: Server
    block_size: int
    max_tokens: int
    samples: list[Sample] = field(default_factory=list)

    name = ""

    @abstractmethod
    def steps(self, trial: Trial) -> Iterator[None]: ...

    @abstractmethod
    def restart_steps(self, trial: Trial) -> Iterator[None]: ...

    def _record(
        self, trial: Trial, source: str, query: str, answer: Answer, problem: str | None, save_s: float | None = None
    ) -> None:
        expected = trial.context_tokens + trial.query_tokens
        if answer.prompt_tokens != expected:
            problem = f"the prompt has {answer.prompt_tokens} tokens, expected {expected}"
        self.samples.append(Sample(self.name, source, trial, query, answer, problem, save_s))

    def _hit_problem(self, trial: Trial, answer: Answer) -> str | None:
        """All full blocks of the memory must come from a cache, and nothing of the query."""
        least = trial.context_tokens // self.block_size * self.block_size
        if answer.cached_tokens < least:
            return f"only {answer.cached_tokens} tokens were cached, expected {least}"
        if answer.cached_tokens > least + self.block_size:
            return f"{answer.cached_tokens} tokens were cached, more than the memory's {least}"
        return None


def _miss_problem(answer: Answer) -> str | None:
    return f"{answer.cached_tokens} tokens were cached, expected none" if answer.cached_tokens else None


class StockArm(Arm):
    """vLLM without the plugin, given the prompt that Memos assembles."""

    name = "stock"

    def steps(self, trial: Trial) -> Iterator[None]:
        with self.server.http() as http:
            answer = self._ask(http, trial, trial.first_query)
            self._record(trial, "direct", trial.first_query, answer, _miss_problem(answer))
            yield
            queries = [query for _, query in trial.hits]
            if trial.restart_query is not None:
                queries.append(trial.restart_query)  # asked now, as the reference for the answer after the restart
            for query in queries:
                answer = self._ask(http, trial, query)
                self._record(trial, "warm", query, answer, self._hit_problem(trial, answer))
                yield
            reset_prefix_cache(http)
            answer = self._ask(http, trial, queries[0])
            self._record(trial, "evicted", queries[0], answer, _miss_problem(answer))
            yield

    def restart_steps(self, trial: Trial) -> Iterator[None]:
        """Once per cell: the process has nothing, so this is ``direct`` again."""
        if trial.repeat > 0 or trial.restart_query is None:
            return
        with self.server.http() as http:
            answer = self._ask(http, trial, trial.restart_query)
            self._record(trial, "restart", trial.restart_query, answer, _miss_problem(answer))
            yield

    def _ask(self, http: httpx.Client, trial: Trial, query: str) -> Answer:
        messages = assemble([{"role": "user", "content": query}], [trial.document])
        return _warm_chat(http, self.server.model, messages, self.max_tokens, cache_salt=trial.user)


class MemosArm(Arm):
    """vLLM with the plugin: the document is a pinned memory of the user, the request holds the query alone."""

    name = "memos"

    def __init__(self, server: Server, block_size: int, max_tokens: int, data_dir: Path):
        super().__init__(server, block_size, max_tokens)
        self.data_dir = data_dir

    def steps(self, trial: Trial) -> Iterator[None]:
        with self.server.http(trial.user) as http:
            add_memory(http, trial.document)
            before = kv_status(http)["disk"]["blocks"]
            answer = self._ask(http, trial, trial.first_query)
            save_s = self._wait_until_saved(http, before)
            self._record(trial, "build", trial.first_query, answer, _miss_problem(answer), save_s)
            yield
            for source, query in trial.hits:
                self._place(http, source)
                self._measure(http, trial, source, query)
                yield

    def restart_steps(self, trial: Trial) -> Iterator[None]:
        if trial.restart_query is None:
            return
        drop_page_cache(self.data_dir)
        with self.server.http(trial.user) as http:
            self._measure(http, trial, "restart", trial.restart_query)
            yield

    def _measure(self, http: httpx.Client, trial: Trial, source: str, query: str) -> None:
        before = external_hits(http)
        answer = self._ask(http, trial, query)
        loaded = external_hits(http) - before
        problem = self._hit_problem(trial, answer)
        if source == "gpu" and loaded:
            problem = problem or f"{loaded} tokens were loaded from a lower tier, expected all on the GPU"
        if source != "gpu" and loaded < trial.context_tokens // self.block_size * self.block_size:
            problem = problem or f"only {loaded} tokens were loaded from a lower tier, the rest came from the GPU"
        self._record(trial, source, query, answer, problem)

    def _place(self, http: httpx.Client, source: str) -> None:
        """Leaves the KV in the tier that ``source`` names and in none above it."""
        self._wait_until_idle(http)
        if source in ("host", "disk"):
            drop(http, "gpu")
        if source == "disk":
            drop(http, "host")
            drop_page_cache(self.data_dir)
        kv = kv_status(http)
        if source == "host" and not kv["host"]["blocks"]:
            raise RequestFailed("the host tier is empty, so it cannot be measured")
        if source == "disk" and (kv["host"]["blocks"] or not kv["disk"]["blocks"]):
            raise RequestFailed(f"the disk tier cannot be measured: {kv}")

    def _ask(self, http: httpx.Client, trial: Trial, query: str) -> Answer:
        messages = [{"role": "user", "content": query}]
        return _warm_chat(http, self.server.model, messages, self.max_tokens, memos={"remember": False})

    def _wait_until_saved(self, http: httpx.Client, blocks_before: int) -> float:
        """Seconds from the end of the answer until its KV stands on disk."""
        start = time.perf_counter()
        while True:
            kv = kv_status(http)
            if kv["in_flight"] == 0 and kv["disk"]["blocks"] > blocks_before:
                return time.perf_counter() - start
            if time.perf_counter() - start > SAVE_TIMEOUT_S:
                raise RequestFailed(f"the KV was not saved within {SAVE_TIMEOUT_S:.0f} s: {kv}")
            time.sleep(_POLL_S)

    def _wait_until_idle(self, http: httpx.Client) -> None:
        """Earlier queries are saved too; that must not run into the next measurement."""
        deadline = time.perf_counter() + SAVE_TIMEOUT_S
        while (kv := kv_status(http))["in_flight"]:
            if time.perf_counter() > deadline:
                raise RequestFailed(f"KV transfers did not end within {SAVE_TIMEOUT_S:.0f} s: {kv}")
            time.sleep(_POLL_S)


def alternate(arms: Sequence[Arm], steps: Sequence[Iterator[None]]) -> None:
    """One step of each arm in turn until all have ended; while one is measured, the others' servers are paused."""
    waiting = list(zip(arms, steps, strict=True))
    try:
        while waiting:
            for arm, iterator in list(waiting):
                for other in arms:
                    other.server.resume() if other is arm else other.server.pause()
                if next(iterator, StopIteration) is StopIteration:
                    waiting.remove((arm, iterator))
    finally:
        for arm in arms:
            arm.server.resume()


def _warm_chat(
    http: httpx.Client, model: str, messages: list[dict[str, Any]], max_tokens: int, **fields: Any
) -> Answer:
    """A chat on an open connection and an API server that has just answered something, in every arm."""
    http.get("/metrics")
    return chat(http, model, messages, max_tokens=max_tokens, **fields)


def add_memory(http: httpx.Client, text: str) -> None:
    """A pinned document of the client's user."""
    _check(http.post("/v1/memories", json={"text": text, "type": "document", "pinned": True}), "adding the memory")


def kv_status(http: httpx.Client) -> dict[str, Any]:
    """The ``kv`` part of the plugin's status: transfers in flight, blocks and bytes per tier."""
    kv = _check(http.get("/v1/memos/status"), "reading the status")["kv"]
    if not kv.get("enabled", True):
        raise RequestFailed("activation memory is off on this server, so there is nothing to measure; its log says why")
    return kv


def drop(http: httpx.Client, tier: str) -> None:
    """Drops the KV of all users from ``gpu`` or ``host``; a copy in a lower tier stays."""
    _until_success(http, f"/v1/memos/kv/drop?tier={tier}")


def reset_prefix_cache(http: httpx.Client) -> None:
    _until_success(http, "/reset_prefix_cache")


def external_hits(http: httpx.Client) -> int:
    """Tokens that the KV connector has brought in so far, as vLLM's own metrics count them."""
    response = http.get("/metrics")
    lines = [line for line in response.text.splitlines() if line.startswith("vllm:external_prefix_cache_hits_total")]
    if response.status_code != 200 or not lines:
        raise RequestFailed(
            "the metric vllm:external_prefix_cache_hits_total is missing, so the source of the KV is unknown"
        )
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def drop_page_cache(data_dir: Path) -> None:
    """Asks the kernel to forget the KV files, so that a read from disk is one. Files are synced already."""
    for path in data_dir.rglob("*.safetensors"):
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _until_success(http: httpx.Client, path: str, attempts: int = 600) -> None:
    """vLLM refuses to reset while a block is held, by a transfer that is about to end for example."""
    for _ in range(attempts):
        response = http.post(path)
        if response.status_code != 409 and _check(response, f"POST {path}").get("success", True):
            return
        time.sleep(0.1)
    raise RequestFailed(f"POST {path} did not succeed: blocks are still in use")


def _check(response: httpx.Response, what: str) -> dict[str, Any]:
    if response.status_code >= 300:
        raise RequestFailed(f"{what} failed with HTTP {response.status_code}: {response.text[:500]}")
    return response.json() if response.content else {}
