"""Web search: what is asked, what is made of the answer, and what of a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from memos_vllm.config import SourcesConfig, WebConfig
from memos_vllm.errors import ConfigError, SourceError
from memos_vllm.memory.sources import web
from memos_vllm.memory.sources.web import WebSource
from tests.memory.memory_factories import ALICE, BOB

URL = "https://search.example/find?q={query}&n={limit}"
Handler = Callable[[httpx.Request], httpx.Response]


def source(handler: Handler, **config: Any) -> WebSource:
    client = httpx.Client(transport=httpx.MockTransport(handler))
    return WebSource(WebConfig(**{"url": URL, "users": "all", **config}), client)


def answering(answer: Any, status: int = 200) -> Handler:
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return lambda request: httpx.Response(status, content=content)


def raising(error: Exception) -> Handler:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    return handler


def test_results_become_passages() -> None:
    asked: list[httpx.URL] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        found = [
            {"name": "Tea", "link": "http://t.x/1", "snippet": "<b>Hot</b> &amp;\ngreen; 1 < 2"},
            {"link": "http://t.x/2"},
            "no result",
            {"link": "http://t.x/3", "snippet": "x" * 2000},
            {"link": "http://t.x/4", "snippet": "beyond the limit"},
        ]
        return httpx.Response(200, json={"web": {"hits": found}})

    found = source(handler, results="web.hits", title="name", link="link", text="snippet").search(
        "green tea & milk?", 2
    )
    assert str(asked[0]) == "https://search.example/find?q=green+tea+%26+milk%3F&n=2"
    assert (found[0].title, found[0].cited, found[0].text) == ("Tea", "http://t.x/1", "Hot & green; 1 < 2")
    assert len(found) == 2 and len(found[1].text) == web.MAX_TEXT_CHARS
    assert found[0].quoted == "[web: Tea, http://t.x/1] Hot & green; 1 < 2"
    assert found[0].as_json()["citation"] == {"cited": "http://t.x/1", "title": "Tea", "section": []}


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (raising(httpx.ReadTimeout("slow")), "within 2 s"),
        (raising(httpx.ConnectError("refused")), "cannot be reached: refused"),
        (answering({}, 429), "answered 429"),
        (answering({}, 302), "answered 302"),
        (answering(b"<html>"), "cannot be used"),
        (answering(b"[" * 100_000), "cannot be used"),
        (answering({"hits": []}), "no 'results'"),
        (answering([]), "no 'results'"),
        (answering({"results": "x"}), "no list"),
        (answering(b" " * (web.MAX_ANSWER_BYTES + 1)), "more than"),
    ],
)
def test_a_failure_says_what_it_is_and_nothing_of_the_question(handler: Handler, words: str) -> None:
    searched = source(handler)
    with pytest.raises(SourceError, match=words) as caught:
        searched.search("my secret", 5)
    assert "secret" not in str(caught.value) and searched.status()["problem"] in str(caught.value)


def test_a_success_ends_the_problem() -> None:
    answers = [httpx.Response(500), httpx.Response(200, json={"results": []})]
    searched = source(lambda request: answers.pop(0))
    with pytest.raises(SourceError):
        searched.search("x", 1)
    assert searched.search("x", 1) == [] and searched.status()["problem"] is None


def test_a_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = WebConfig(url=URL, users=[{"tenant": "acme", "user": "alice"}], headers_env={"X-Key": "SEARCH_KEY"})
    monkeypatch.delenv("SEARCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="SEARCH_KEY"):
        WebSource(config)
    monkeypatch.setenv("SEARCH_KEY", "k")
    made = WebSource(config)
    assert made._client.headers["x-key"] == "k" and made.serves(ALICE) and not made.serves(BOB)


@pytest.mark.parametrize(
    "values",
    [
        {"web": {"url": "https://x/?q=1", "users": "all"}},
        {"web": {"url": URL}},
        {"web": {"url": URL, "users": []}},
        {"folders": [{"name": "a", "path": "/x"}]},
        {"folders": [{"name": "A b", "path": "/x", "users": "all"}]},
        {"folders": [{"name": "web", "path": "/x", "users": "all"}], "web": {"url": URL, "users": "all"}},
        {"share": 1.5},
    ],
)
def test_a_configuration_that_says_too_little_stops_the_start(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourcesConfig.model_validate(values)
    assert SourcesConfig().web is None and SourcesConfig().folders == []
