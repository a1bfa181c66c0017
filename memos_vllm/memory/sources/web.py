"""Web search as a source: one GET with the user's question, answered in JSON."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote_plus

import httpx
import regex

from memos_vllm.config import WebConfig
from memos_vllm.errors import ConfigError, SourceError
from memos_vllm.memory.documents.blocks import clean
from memos_vllm.memory.results import Passage
from memos_vllm.memory.sources import contract
from memos_vllm.types import Principal

MAX_QUERY_CHARS = 400
MAX_ANSWER_BYTES = 2**20
MAX_TEXT_CHARS = 1000
_TAG = regex.compile(r"</?[a-zA-Z][^<>]{0,200}>")


class WebSource:
    """
    Args:
        client: tests give one; it brings the headers, and follows no redirect.

    Raises:
        ConfigError: an environment variable of ``headers_env`` is not set.
    """

    def __init__(self, config: WebConfig, client: httpx.Client | None = None):
        self.name = config.name
        self.deadline_s = config.deadline_s
        self._config = config
        self._client = client or httpx.Client(timeout=config.deadline_s, headers=_headers(config))
        self._problem: str | None = None

    def serves(self, who: Principal) -> bool:
        return contract.is_for(self._config.users, who)

    def status(self) -> dict[str, Any]:
        return {"name": self.name, "kind": "web", "problem": self._problem}

    def search(self, query: str, top_k: int) -> Sequence[Passage]:
        asked = quote_plus(query[:MAX_QUERY_CHARS].encode("utf-8", "replace"))
        url = self._config.url.replace("{query}", asked).replace("{limit}", str(top_k))
        try:
            passages = self._passages(_json(self._get(url)))
        except httpx.TimeoutException as error:
            raise self._failed(f"did not answer within {self.deadline_s:g} s") from error
        except httpx.HTTPStatusError as error:
            raise self._failed(f"answered {error.response.status_code}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._failed(f"cannot be reached: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise self._failed(f"answered what cannot be used: {error}") from error
        self._problem = None
        return passages[:top_k]

    def _get(self, url: str) -> bytes:
        with self._client.stream("GET", url, headers={"accept": "application/json"}) as response:
            response.raise_for_status()
            answer = b""
            for chunk in response.iter_bytes():
                answer += chunk
                if len(answer) > MAX_ANSWER_BYTES:
                    raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes")
        return answer

    def _passages(self, answer: Any) -> list[Passage]:
        results = answer
        for name in self._config.results.split("."):
            if not isinstance(results, dict) or name not in results:
                raise LookupError(f"no {self._config.results!r} in it (sources.web.results)")
            results = results[name]
        if not isinstance(results, list):
            raise TypeError(f"{self._config.results!r} is no list (sources.web.results)")
        return [passage for result in results if (passage := self._passage(result))]

    def _passage(self, result: Any) -> Passage | None:
        """None for a result without text or address."""
        names = (self._config.text, self._config.link, self._config.title)
        text, link, title = (_plain(result.get(name)) if isinstance(result, dict) else "" for name in names)
        if not text or not link:
            return None
        return Passage(self.name, text[:MAX_TEXT_CHARS], link[:MAX_TEXT_CHARS], title=title[:MAX_TEXT_CHARS] or None)

    def _failed(self, problem: str) -> SourceError:
        self._problem = problem
        # Neither the question nor a key in the address belongs into a log.
        return SourceError(f"web search {self.name} {problem}")


def _headers(config: WebConfig) -> dict[str, str]:
    headers = {}
    for header, variable in config.headers_env.items():
        if not (value := os.environ.get(variable)):
            raise ConfigError(f"sources.web.headers_env: {variable} is not set")
        headers[header] = value
    return headers


def _json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _plain(value: Any) -> str:
    """One line without markup."""
    return " ".join(html.unescape(_TAG.sub("", clean(value))).split()) if isinstance(value, str) else ""
