"""One timed streaming request, the same code for every arm."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


class RequestFailed(RuntimeError):
    """The server refused a request, or the stream ended without an answer."""


@dataclass(frozen=True)
class Answer:
    """What one request gave, and when.

    Attributes:
        ttft_s: from just before the request is sent to the first chunk with content, in seconds.
        total_s: to the end of the stream, in seconds.
        text: the greedy answer.
        logprobs: log-probability of each of its tokens; equal floats mean equal KV.
        prompt_tokens, cached_tokens: as the server counts them.
        gaps_s: between one chunk with content and the next.
        first_token: the likeliest first tokens and their log-probabilities, if ``top_logprobs`` was asked for.
    """

    ttft_s: float
    total_s: float
    text: str
    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    gaps_s: tuple[float, ...] = ()
    first_token: dict[str, float] = field(default_factory=dict)


def chat(http: httpx.Client, model: str, messages: list[dict[str, Any]], *, max_tokens: int, **fields: Any) -> Answer:
    """Sends a greedy streaming chat request and times it.

    Args:
        http: a client with a warm connection, see ``Server.http``.
        max_tokens: exactly so many are generated; an end-of-sequence token does not stop earlier.
        fields: further fields of the body, ``cache_salt`` or ``memos`` for example.
    """
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    content = json.dumps(body).encode()
    first: float | None = None
    first_chunk: float | None = None
    text: list[str] = []
    logprobs: list[float] = []
    first_token: dict[str, float] = {}
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    sent = time.perf_counter()
    with http.stream(
        "POST", "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    ) as response:
        if response.status_code != 200:
            response.read()
            raise RequestFailed(f"HTTP {response.status_code}: {response.text[:500]}")
        for line in response.iter_lines():
            now = time.perf_counter()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RequestFailed(str(chunk["error"])[:500])
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                first_chunk = first_chunk or now
                if choice["delta"].get("content"):
                    first = first or now
                    arrivals.append(now)
                    text.append(choice["delta"]["content"])
                tokens = (choice.get("logprobs") or {}).get("content") or ()
                if tokens and not logprobs:
                    first_token = {each["token"]: each["logprob"] for each in tokens[0].get("top_logprobs") or ()}
                logprobs += [token["logprob"] for token in tokens]
    total_s = time.perf_counter() - sent
    # A model whose first token is half a character shows no content yet; vLLM's role chunk marks the same moment.
    first = first or first_chunk
    if first is None or not usage:
        raise RequestFailed("the stream ended without an answer or without usage")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        ttft_s=first - sent,
        total_s=total_s,
        text="".join(text),
        logprobs=tuple(logprobs),
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(arrivals)),
        first_token=first_token,
    )


def count_tokens(http: httpx.Client, model: str, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> int:
    """Length of the rendered prompt, in tokens, from the server's ``/tokenize``."""
    body = {"model": model, "messages": messages, "add_generation_prompt": add_generation_prompt}
    response = http.post("/tokenize", json=body)
    if response.status_code != 200:
        raise RequestFailed(f"/tokenize answered HTTP {response.status_code}: {response.text[:500]}")
    return response.json()["count"]
