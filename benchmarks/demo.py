"""The demonstration behind ``make demo``: memory that is remembered, kept apart, kept, and cheap.

    python -m benchmarks.demo [--model MODEL]

Starts ``vllm serve MODEL --plugin memos``, tells it facts as Alice, asks in a new conversation as
Alice and as Bob, restarts the server, asks again, and ends with a table of the time to first token
with the same memory read from each tier. Exits 0 only if every step held.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import arms as kv_tiers
from benchmarks.client import RequestFailed
from benchmarks.serving import Server, serve

RECALL_MODEL = Path(__file__).parents[1] / "tests" / "assets" / "recall-model"
ALICE, BOB = "alice-key", "bob-key"
TOLD = (
    "My favourite drink is oolong tea.",
    "My home city is Turin.",
    "My dog's name is Biscuit.",
)
QUESTION, ANSWER = "What is my favourite drink?", "oolong tea"
REPEATS = 5

console = Console(highlight=False)


class StepFailed(Exception):
    """What the demonstration promises did not happen."""


def say(text: str) -> None:
    console.print(f"[bold]{text}[/bold]")


def check(holds: bool, promise: str) -> None:
    console.print(f"  [green]yes[/green]  {promise}" if holds else f"  [red]NO[/red]   {promise}")
    if not holds:
        raise StepFailed(promise)


def ask(server: Server, key: str, text: str, **memos: object) -> tuple[str, int]:
    """One new conversation without history; the answer and how many prompt tokens were cached."""
    response = server.client(key).chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=48,
        extra_body={"memos": memos or True, "chat_template_kwargs": {"enable_thinking": False}},
    )
    details = response.usage.prompt_tokens_details
    answer = (response.choices[0].message.content or "").strip()
    console.print(f"  [dim]{key.removesuffix('-key')}:[/dim] {text}  [dim]->[/dim] {answer}")
    return answer, (details.cached_tokens or 0) if details else 0


def time_to_first_token(server: Server, key: str, text: str) -> tuple[float, int]:
    """Seconds from sending to the first piece of the answer, and cached prompt tokens."""
    begin = time.perf_counter()
    first = cached = 0.0
    stream = server.client(key).chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"memos": {"remember": False}},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - begin
        if chunk.usage and chunk.usage.prompt_tokens_details:
            cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
    return first, int(cached)


def call(server: Server, method: str, path: str, body: dict | None = None, key: str = ALICE) -> dict:
    with server.http(key) as client:
        response = client.request(method, path, json=body)
        response.raise_for_status()
        return response.json()


def settle(server: Server) -> dict:
    """Waits until no copy is under way; the status of activation memory."""
    deadline = time.monotonic() + 60
    while (status := call(server, "GET", "/v1/memos/status")["kv"])["in_flight"]:
        if time.monotonic() > deadline:
            raise StepFailed("KV is saved within a minute")
        time.sleep(0.01)
    return status


def drop_kv(server: Server, tier: str) -> None:
    with server.http(ALICE) as client:
        kv_tiers.drop(client, tier)


def remembers(server: Server) -> None:
    say("Alice tells three facts in one conversation")
    for fact in TOLD:
        ask(server, ALICE, fact)
    say("A new conversation, without any history")
    answer, _ = ask(server, ALICE, QUESTION)
    check(ANSWER in answer, "Alice's question is answered from memory")
    answer, _ = ask(server, BOB, QUESTION)
    check(ANSWER not in answer, "Bob asks the same and does not get it")
    with server.client(ALICE).chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=48,
        stream=True,
        extra_body={"memos": True, "chat_template_kwargs": {"enable_thinking": False}},
    ) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    check(ANSWER in streamed, "streaming gives the same answer")


def fill(server: Server, num_tokens: int) -> None:
    """Pins a document of about ``num_tokens`` tokens, so that there is a prefix worth keeping."""
    lines, total, index = [], 0, 0
    while total < num_tokens:
        lines.append(f"Note {index}: the train from Turin to Genoa leaves at {index % 24:02d}:{(7 * index) % 60:02d}.")
        if index % 16 == 0:
            total = call(server, "POST", "/tokenize", {"model": server.model, "prompt": "\n".join(lines)})["count"]
        index += 1
    call(server, "POST", "/v1/memories", {"text": "\n".join(lines), "type": "document", "pinned": True})


def measure(server: Server, arms: dict[str, list[tuple[float, int]]], arm: str, prepare: tuple[str, ...]) -> None:
    """Repeats: bring the memory's KV into the arm's tier only, then ask something new."""
    for index in range(REPEATS):
        for tier in prepare:
            drop_kv(server, tier)
        arms.setdefault(arm, []).append(time_to_first_token(server, ALICE, f"Question {arm} {index}?"))
        settle(server)


def predicted(server: Server, arms: dict[str, list[tuple[float, int]]]) -> None:
    """Repeats: KV on disk only, a hint, KV on the GPU, and only then the request."""
    ready = call(server, "GET", "/v1/memos/status")["kv"]["prediction"]["ready"]
    for index in range(REPEATS):
        settle(server)
        for tier in ("gpu", "host"):
            drop_kv(server, tier)
        call(server, "POST", "/v1/scenes", {"event": "typing"})
        deadline = time.monotonic() + 60
        while call(server, "GET", "/v1/scenes")["state"] != "ready":
            if time.monotonic() > deadline:
                raise StepFailed("the predicted KV is on the GPU within a minute")
            time.sleep(0.01)
        arms.setdefault("gpu, predicted", []).append(time_to_first_token(server, ALICE, f"Question ahead {index}?"))
    now_ready = call(server, "GET", "/v1/memos/status")["kv"]["prediction"]["ready"]
    check(now_ready == ready + REPEATS, "every request found its memory's KV ready on the GPU")


def configuration(directory: Path, num_tokens: int, *, predicts: bool) -> Path:
    path = directory / "memos.yaml"
    path.write_text(
        f"data_dir: {directory / 'data'}\nmemory:\n  long_lived_tokens: {2 * num_tokens}\n"
        f"kv:\n  host_bytes: 1GiB\n  disk_bytes: 4GiB\nprediction:\n  enabled: {str(predicts).lower()}\n"
    )
    return path


def cold(server: Server, arms: dict[str, list[tuple[float, int]]]) -> None:
    """The same prompt without the user's salt on it: nothing can be cached."""
    for index in range(REPEATS):
        drop_kv(server, "gpu")
        salted = {"memos": {"remember": False}, "cache_salt": f"cold-{time.time_ns()}"}
        begin = time.perf_counter()
        stream = server.client(ALICE).chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": f"Question cold {index}?"}],
            temperature=0,
            max_tokens=4,
            stream=True,
            extra_body=salted,
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                arms.setdefault("cold", []).append((time.perf_counter() - begin, 0))
                break
        stream.close()
        settle(server)


def show(arms: dict[str, list[tuple[float, int]]], model: str) -> None:
    table = Table(title=f"Time to first token with the same memory, {Path(model).name}, median of {REPEATS}")
    for column in ("memory's KV comes from", "TTFT ms", "cached tokens", "of cold"):
        table.add_column(column, justify="left" if column.startswith("memory") else "right")
    medians = {arm: sorted(sample)[len(sample) // 2] for arm, sample in arms.items()}
    for arm, (seconds, cached) in medians.items():
        table.add_row(arm, f"{seconds * 1e3:.1f}", str(cached), f"{seconds / medians['cold'][0]:.2f}")
    console.print(table)


def run(model: str, num_tokens: int) -> None:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memos-demo-")))
        arms: dict[str, list[tuple[float, int]]] = {}
        say(f"vllm serve {model} --plugin memos")
        # The tiers are shown as they are found; prediction comes after the restart.
        with serve(model, plugin=True, config=configuration(directory, num_tokens, predicts=False)) as server:
            remembers(server)
            say(f"Alice pins a document of {num_tokens} tokens")
            fill(server, num_tokens)
            time_to_first_token(server, ALICE, "Hello?")
            status = settle(server)
            check(status["host"]["blocks"] > 0 and status["disk"]["blocks"] > 0, "its KV is in host memory and on disk")
            cold(server, arms)
            measure(server, arms, "gpu", ())
            measure(server, arms, "host", ("gpu",))
            measure(server, arms, "disk", ("gpu", "host"))
        say("The server is restarted")
        with serve(model, plugin=True, config=configuration(directory, num_tokens, predicts=True)) as server:
            before = call(server, "GET", "/v1/memos/status")["kv"]["disk"]["blocks"]
            check(before > 0, "the KV is still there")
            seconds, cached = time_to_first_token(server, ALICE, "Question restart?")
            arms["after restart"] = [(seconds, cached)]
            check(cached > num_tokens // 2, "the first request finds it")
            answer, _ = ask(server, ALICE, QUESTION)
            check(ANSWER in answer, "Alice's question is still answered")
            answer, _ = ask(server, BOB, QUESTION)
            check(ANSWER not in answer, "Bob still does not get it")
            say("Alice starts to type; her memory's KV goes from disk to the GPU before the request exists")
            predicted(server, arms)
        for arm in ("gpu", "host", "disk"):
            check(min(cached for _, cached in arms[arm]) > num_tokens // 2, f"memory was served from the {arm} tier")
        show(arms, model)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(RECALL_MODEL), help="any model that vLLM can load")
    parser.add_argument("--document-tokens", type=int, default=1500, help="size of the pinned document")
    arguments = parser.parse_args()
    try:
        run(arguments.model, arguments.document_tokens)
    except (StepFailed, RequestFailed) as failure:
        console.print(f"[red]The demonstration failed:[/red] {failure}")
        return 1
    console.print("[green]Every step held.[/green]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
