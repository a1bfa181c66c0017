"""Two data-parallel engines behind two API processes: a user's KV is where his requests go, and every process
knows what happens in the other."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import arms
from benchmarks.serving import serve
from tests.e2e.conftest import Memos, cached_tokens
from tests.e2e.test_scenes import hint, scene, wait_until

pytestmark = pytest.mark.e2e

DOCUMENT = {"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True}
OTHER = {"text": "The market opens on Sundays. " * 40, "type": "document", "pinned": True}
QUESTION = "What is my job?"
NUM_USERS = 8


@pytest.fixture(scope="module")
def engines(recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memos]:
    directory = tmp_path_factory.mktemp("engines")
    config = directory / "memos.yaml"
    config.write_text(
        f"data_dir: {directory / 'data'}\nmemory: {{long_lived_tokens: 2048}}\n"
        "kv: {host_bytes: 64MiB, disk_bytes: 64MiB, min_load_tokens: 32}\n"
    )
    with serve(
        recall_model,
        plugin=True,
        config=config,
        extra=["--data-parallel-size", "2", "--api-server-count", "2"],
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    ) as server:
        yield Memos(server)


def new_user(engines: Memos) -> str:
    key = f"key-{uuid.uuid4().hex}"
    engines.call("POST", "/v1/memories", key, json=DOCUMENT)
    return key


def totals(engines: Memos) -> list[dict[str, int]]:
    """By engine, once nothing is under way."""

    def quiet() -> Any:
        status = engines.call("GET", "/v1/memos/status").json()["engines"]
        return not any(each["in_flight"] for each in status) and status

    return [each["totals"] for each in wait_for(quiet, "quiet")]


def saved_blocks(engines: Memos) -> list[int]:
    return [each["saved_blocks"] for each in totals(engines)]


def loaded_blocks(engines: Memos) -> int:
    return sum(each["loaded_host_blocks"] + each["loaded_disk_blocks"] for each in totals(engines))


def drop(engines: Memos, *tiers: str) -> None:
    for tier in tiers:
        totals(engines)
        with engines.server.http(new_user(engines)) as client:
            arms.drop(client, tier)


def wait_for(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 30
    while not (value := found()):
        assert time.monotonic() < deadline, f"never {what}"
    return value


def test_a_users_requests_go_to_the_engine_with_his_kv(engines: Memos) -> None:
    used = set()
    for _ in range(NUM_USERS):
        key, before = new_user(engines), saved_blocks(engines)
        first, second, third = (engines.chat(key, QUESTION, {"remember": False}) for _ in range(3))
        assert cached_tokens(first) == 0 and cached_tokens(second) > 200 and cached_tokens(third) > 200
        (home,) = [rank for rank, now in enumerate(saved_blocks(engines)) if now > before[rank]]
        used.add(home)
    assert used == {0, 1}, "users are spread"


def test_a_request_may_name_its_engine(engines: Memos) -> None:
    for rank in (0, 1):
        key, before = new_user(engines), saved_blocks(engines)
        response = engines.chat(
            key, QUESTION, {"remember": False, "session": "s"}, extra_headers={"X-data-parallel-rank": str(rank)}
        )
        assert cached_tokens(response) == 0
        assert saved_blocks(engines)[rank] > before[rank]


@pytest.mark.parametrize("tiers", [("gpu",), ("gpu", "host")], ids=["from_host", "from_disk"])
def test_a_hint_at_any_process_brings_the_prefix_to_the_users_engine(engines: Memos, tiers: tuple[str, ...]) -> None:
    key = new_user(engines)
    right = engines.answer(key, QUESTION, {"remember": False})
    hint(engines, key, "closed")
    drop(engines, *tiers)
    hint(engines, key, "typing")
    wait_until(engines, key, "ready")
    before = loaded_blocks(engines)
    response = engines.chat(key, QUESTION, {"remember": False})
    assert cached_tokens(response) > 200 and response.choices[0].message.content == right
    assert loaded_blocks(engines) == before, "the request itself loaded nothing"


def test_every_process_knows_of_a_turn(engines: Memos) -> None:
    """Each connection goes to one of the two processes; while that one stands still, to the other."""
    key = new_user(engines)
    body = {"model": engines.server.model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1}
    with engines.server.http(key) as client:

        def known_to_the_other() -> Any:
            turn = {"remember": False, "session": "s"}
            with client.stream("POST", "/v1/chat/completions", json={**body, "memos": turn}) as response:
                port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
                asked = serving_process(engines, port)
                response.read()
            asked.suspend()
            try:
                return scene(engines, key, "s")["prediction"]
            finally:
                asked.resume()

        wait_for(known_to_the_other, "known to the other process")


def serving_process(engines: Memos, client_port: int) -> psutil.Process:
    """The API process that has accepted a connection."""
    for process in psutil.Process(engines.server.process.pid).children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.raddr and connection.raddr.port == client_port:
                return process
    raise AssertionError(f"nobody has the connection from port {client_port}")


def test_what_a_new_session_starts_with_is_built_on_the_users_engine(engines: Memos) -> None:
    key = new_user(engines)
    engines.chat(key, QUESTION, {"session": uuid.uuid4().hex, "remember": False})

    def next_session() -> dict[str, Any]:
        return scene(engines, key)["next_session"]

    size = wait_for(lambda: next_session()["blocks"], "declared")
    engines.call("POST", "/v1/memories", key, json=OTHER)
    wait_for(lambda: (seen := next_session())["state"] == "ready" and seen["blocks"] > size, "built")
    first = engines.chat(key, QUESTION, {"session": uuid.uuid4().hex, "remember": False})
    assert cached_tokens(first) >= first.usage.prompt_tokens - 64
