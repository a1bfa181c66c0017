"""One real server for all end-to-end tests, with the recall model; and the stock server's answers."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import arms
from benchmarks.serving import Server, serve
from memos_vllm.integration.metrics import series_key

APP, ALICE, BOB, READER = "app-key", "alice-key", "bob-key", "reader-key"
CONFIG = f"""
data_dir: {{data_dir}}
identity:
  keys:
    {APP}: {{{{tenant: shop}}}}
    personal-key: {{{{tenant: shop, user: carol}}}}
    always-key: {{{{tenant: always, user: dora, memory: true}}}}
    nameless-key: {{{{tenant: nameless, memory: true}}}}
    {READER}: {{{{tenant: readers}}}}
memory:
  long_lived_tokens: 2048
sources:
  deadline_s: 10
  folders:
    - {{{{name: handbook, path: {{folder}}, users: [{{{{tenant: readers}}}}], refresh_s: 1}}}}
kv:
  host_bytes: 64MiB
  disk_bytes: 256MiB
  min_load_tokens: 32
"""
PLAIN_REQUESTS = [
    {"messages": [{"role": "user", "content": "What is my favourite drink?"}], "max_tokens": 24},
    {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "My home city is Turin."},
            {"role": "assistant", "content": "Noted."},
            {"role": "user", "content": "What is my home city?"},
        ],
        "max_tokens": 24,
        "logprobs": True,
        "top_logprobs": 3,
    },
    {"messages": [{"role": "user", "content": "Bob's job is baker. What is Bob's job?"}], "max_tokens": 24, "n": 2},
    {"messages": [], "max_tokens": 4},
    {"messages": [{"role": "user", "content": "x"}], "max_tokens": -1},
]


@dataclass
class Memos:
    """The server under test, spoken to as its users do."""

    server: Server

    def chat(self, key: str, text: str | list[dict[str, Any]], memos: Any = True, **options: Any) -> Any:
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        body = options.pop("extra_body", {}) | ({"memos": memos} if memos is not None else {})
        return self.server.client(key).chat.completions.create(
            model=self.server.model,
            messages=messages,
            temperature=0,
            **{"max_tokens": 32, **options},
            extra_body=body,
        )

    def answer(self, key: str, text: str | list[dict[str, Any]], memos: Any = True, **options: Any) -> str:
        return self.chat(key, text, memos, **options).choices[0].message.content

    def stream(self, key: str, text: str, memos: Any = True, **options: Any) -> str:
        with self.chat(key, text, memos, stream=True, **options) as chunks:
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    def call(self, method: str, path: str, key: str | None = ALICE, **options: Any) -> Any:
        with self.server.http(key or "") as client:
            if key is None:
                del client.headers["authorization"]
            return client.request(method, path, **options)

    def settle(self) -> dict[str, Any]:
        """Waits until no copy is under way and nothing is left to be built; the status of activation memory."""
        deadline = time.monotonic() + 60
        while True:
            status = self.call("GET", "/v1/memos/status").json()
            assert status["kv"].get("prediction", {}).get("fault") is None, status
            if not status["kv"]["in_flight"] and not status["build"]["pending"]:
                return status["kv"]
            assert time.monotonic() < deadline, f"copies or builds do not end: {status}"

    def metrics(self) -> dict[str, float]:
        """Our series on /metrics, summed over models and engines: name and own label values by ``series_key``."""
        out: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.call("GET", "/metrics").text):
            for sample in family.samples:
                if sample.name.startswith("memos:"):
                    own = [value for name, value in sample.labels.items() if name not in ("model_name", "engine")]
                    out[series_key(sample.name, *own)] += sample.value
        return out

    def drop(self, *tiers: str) -> None:
        for tier in tiers:
            self.settle()
            with self.server.http(ALICE) as client:
                arms.drop(client, tier)


def cached_tokens(response: Any) -> int:
    return response.usage.prompt_tokens_details.cached_tokens or 0


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source for the tenant of ``READER``."""
    return tmp_path_factory.mktemp("handbook")


@pytest.fixture(scope="session")
def config_path(tmp_path_factory: pytest.TempPathFactory, source_folder: Path) -> Path:
    directory = tmp_path_factory.mktemp("server")
    path = directory / "memos.yaml"
    path.write_text(CONFIG.format(data_dir=directory / "data", folder=source_folder))
    return path


@pytest.fixture(scope="session")
def stock_answers(recall_model: Path) -> dict[str, Any]:
    """What ``vllm serve`` answers without the flag."""
    with serve(recall_model) as server, server.http() as client:
        return {
            "openapi": client.get("/openapi.json").json(),
            "plain": [plain_answer(client, server.model, body) for body in PLAIN_REQUESTS],
            "metrics": client.get("/metrics").text,
        }


@pytest.fixture(scope="session")
def memos(stock_answers: dict[str, Any], recall_model: Path, config_path: Path) -> Iterator[Memos]:
    # After the stock server, so that one server runs at a time.
    with serve(recall_model, plugin=True, config=config_path) as server:
        yield Memos(server)


def plain_answer(client: Any, model: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and body without what differs from request to request; nothing is cached for it."""
    body = {"model": model, "temperature": 0, "cache_salt": uuid.uuid4().hex, **body}
    response = client.post("/v1/chat/completions", json=body)
    return response.status_code, without_ids(response.json())


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: without_ids(item)
            for name, item in value.items()
            if name not in ("id", "created", "system_fingerprint")
        }
    return [without_ids(item) for item in value] if isinstance(value, list) else value
