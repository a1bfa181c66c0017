"""The stock ``openai`` client, streaming and timed; and the counters of the server behind it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, fields
from typing import Any

import httpx
import openai

from benchmarks.client import RequestFailed


@dataclass(frozen=True)
class Answer:
    """What one streaming request gave, and when.

    Attributes:
        ttft_s: from the call of the client to the first chunk with content, in seconds.
        times_s: of each chunk with a token, visible or not, as ``time.perf_counter`` has it.
    """

    ttft_s: float
    times_s: tuple[float, ...]
    text: str
    prompt_tokens: int
    cached_tokens: int


def ask(
    client: openai.OpenAI, model: str, messages: list[dict[str, Any]], max_tokens: int, **extra_body: Any
) -> Answer:
    """Sends a greedy streaming chat and times it.

    Raises:
        RequestFailed: the server refused it, or the stream ended without usage.
    """
    text: list[str] = []
    times: list[float] = []
    first_visible = None
    usage = None
    sent = time.perf_counter()
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra_body,
        )
        for chunk in stream:
            now = time.perf_counter()
            usage = chunk.usage or usage
            if not chunk.choices or chunk.choices[0].delta.role:  # usage, or vLLM's opening of the message
                continue
            times.append(now)
            if chunk.choices[0].delta.content:
                first_visible = first_visible or now
                text.append(chunk.choices[0].delta.content)
    except openai.OpenAIError as error:
        raise RequestFailed(str(error) or type(error).__name__) from error
    if usage is None or not times:
        raise RequestFailed("the stream ended without an answer or without usage")
    details = usage.prompt_tokens_details
    return Answer(
        ttft_s=(first_visible or times[0]) - sent,
        times_s=tuple(times),
        text="".join(text),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens if details else 0) or 0,
    )


@dataclass(frozen=True)
class Counters:
    """vLLM's own counters since the server's start.

    Attributes:
        requests: finished ones, whoever made them.
        loaded_tokens: that the KV connector has brought in for requests.
    """

    requests: int = 0
    preemptions: int = 0
    loaded_tokens: int = 0

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(*(getattr(self, one.name) - getattr(earlier, one.name) for one in fields(self)))


_METRICS = {
    "requests": "vllm:request_success_total",
    "preemptions": "vllm:num_preemptions_total",
    "loaded_tokens": "vllm:external_prefix_cache_hits_total",
}


def parse_counters(metrics: str) -> Counters:
    """From the text of ``/metrics``; a metric that is missing counts as 0 (no connector, say)."""
    values = {
        name: sum(float(value) for value in re.findall(rf"^{metric}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE))
        for name, metric in _METRICS.items()
    }
    return Counters(**{name: round(value) for name, value in values.items()})


def counters(http: httpx.Client) -> Counters:
    response = http.get("/metrics")
    if response.status_code != 200:
        raise RequestFailed(f"/metrics answered HTTP {response.status_code}")
    return parse_counters(response.text)


def prediction_totals(http: httpx.Client) -> dict[str, int]:
    """Memos' counters of scenes, added up over the engines; empty where prediction is off."""
    response = http.get("/v1/memos/status")
    if response.status_code != 200:
        raise RequestFailed(f"/v1/memos/status answered HTTP {response.status_code}: {response.text[:300]}")
    totals: dict[str, int] = {}
    for engine in response.json()["engines"]:
        prediction = engine.get("prediction", {})
        if prediction.get("enabled"):
            for name, value in prediction.items():
                if isinstance(value, int) and not isinstance(value, bool):
                    totals[name] = totals.get(name, 0) + value
    return totals


def hint(http: httpx.Client, event: str, user: str, session: str) -> None:
    """Tells Memos what the application knows."""
    response = http.post("/v1/scenes", json={"event": event, "user": user, "session": session})
    if response.status_code >= 300:
        raise RequestFailed(f"POST /v1/scenes answered HTTP {response.status_code}: {response.text[:300]}")
