"""vLLM's other routes that generate: they have no memory, and say so to a request that asks for it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from memos_vllm.errors import RequestError
from memos_vllm.integration.rest import error_response

WITHOUT_MEMORY = frozenset(
    ("/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations")
)
_FIELD = b'"memos"'


class RefusesMemory:
    """ASGI middleware: 400 to a POST on these routes whose ``memos`` field asks for memory.

    vLLM ignores fields that it does not know, so the answer would come without memory and without a word. The body
    is read before the route reads it, as a whole as the route would, and handed on as it came; answers pass untouched.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) not in WITHOUT_MEMORY:
            await self._app(scope, receive, send)
            return
        messages = await _body(receive)
        if _asks_for_memory(b"".join(message.get("body", b"") for message in messages)):
            refusal = error_response(
                RequestError("memory is on /v1/chat/completions only; send the request there, or without 'memos'")
            )
            await refusal(scope, receive, send)
            return
        waiting = iter(messages)

        async def replay() -> Any:
            return next(waiting, None) or await receive()

        await self._app(scope, replay, send)


def _path(scope: Any) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _body(receive: Any) -> list[Any]:
    """The messages of a request up to the end of its body, or to its client's leave."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _asks_for_memory(body: bytes) -> bool:
    if _FIELD not in body:  # most bodies need not be parsed twice
        return False
    try:
        given = json.loads(body)
    except ValueError:
        return False  # the route says what is wrong with it
    return isinstance(given, dict) and given.get("memos") not in (None, False)
