"""The arms: each a way to have the next user's prefix ready, played with the same script.

An arm says how a turn is asked and what is done in the pause before it. Arms that need the same
server (``deployment``) share one, with its prefix cache emptied in between.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from benchmarks.client import RequestFailed
from benchmarks.multiuser_client import Answer, ask, hint, prediction_totals
from benchmarks.multiuser_script import Conversation
from benchmarks.multiuser_servers import APPLICATION_KEY
from benchmarks.serving import DEFAULT_KEY, Server
from memos_vllm.memory.assembly import assemble

WARM_UP_TOKENS = 2
Message = dict[str, Any]


class Arm:
    """Stock vLLM with its prefix cache: the base of all arms.

    Attributes:
        name: as it stands in rows.
        deployment: which server it runs on, see ``multiuser_servers.make_server``.
    """

    def __init__(self, name: str, deployment: str):
        self.name = name
        self.deployment = deployment

    @contextmanager
    def opened(self, server: Server) -> Iterator[Play]:
        with server.client(DEFAULT_KEY) as client, server.http(DEFAULT_KEY) as http:
            yield Play(server.model, client, http)

    def introduce(self, play: Play, conversation: Conversation) -> None:
        """Before the first turn: whatever the server must know of a user."""

    def ask(self, play: Play, conversation: Conversation, messages: list[Message], max_tokens: int) -> Answer:
        prompt = assemble(messages, [conversation.document])
        return ask(play.client, play.model, prompt, max_tokens, cache_salt=self._salt(conversation))

    def _salt(self, conversation: Conversation) -> str:
        return f"{self.name}-{conversation.user}"

    def prepare(self, play: Play, conversation: Conversation, messages: list[Message], until: float) -> None:
        """The pause before a turn from the second on; returns at the time ``until``, prepared or not."""
        sleep_until(until)

    def scenes(self, play: Play) -> dict[str, int]:
        return {}


class DirectArm(Arm):
    """No prefix cache: a salt that nobody has had shares a block with nobody."""

    def _salt(self, conversation: Conversation) -> str:
        return uuid.uuid4().hex


class WarmUpArm(Arm):
    """The MemOS way: a chat of two tokens brings the conversation so far into the prefix cache.

    It cannot know the question, and the turn comes at its time whether the warm-up is through or not.
    """

    def prepare(self, play: Play, conversation: Conversation, messages: list[Message], until: float) -> None:
        play.in_background(lambda: self.ask(play, conversation, messages, WARM_UP_TOKENS))
        sleep_until(until)


class MemosArm(Arm):
    """Memos: the user's memory is his, the request holds the conversation alone."""

    @contextmanager
    def opened(self, server: Server) -> Iterator[Play]:
        with server.client(APPLICATION_KEY) as client, server.http(APPLICATION_KEY) as http:
            yield Play(server.model, client, http)

    def introduce(self, play: Play, conversation: Conversation) -> None:
        body = {"user": conversation.user, "text": conversation.document, "type": "document", "pinned": True}
        response = play.http.post("/v1/memories", json=body)
        if response.status_code >= 300:
            raise RequestFailed(f"adding a memory failed with HTTP {response.status_code}: {response.text[:300]}")

    def ask(self, play: Play, conversation: Conversation, messages: list[Message], max_tokens: int) -> Answer:
        memos = {"user": conversation.user, "session": conversation.session, "remember": False}
        return ask(play.client, play.model, messages, max_tokens, memos=memos)

    def scenes(self, play: Play) -> dict[str, int]:
        return prediction_totals(play.http)


class HintedArm(MemosArm):
    """Memos, and an application that says when a user starts to type."""

    def __init__(self, name: str, deployment: str, lead_s: float):
        super().__init__(name, deployment)
        self._lead_s = lead_s

    def prepare(self, play: Play, conversation: Conversation, messages: list[Message], until: float) -> None:
        sleep_until(until - self._lead_s)
        hint(play.http, "typing", conversation.user, conversation.session)
        sleep_until(until)


@dataclass
class Play:
    """An open connection to one arm's server."""

    model: str
    client: openai.OpenAI
    http: httpx.Client
    background_requests: int = 0
    _threads: list[threading.Thread] = field(default_factory=list)
    _errors: list[RequestFailed] = field(default_factory=list)

    def in_background(self, request: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                request()
            except RequestFailed as error:
                self._errors.append(error)

        self.background_requests += 1
        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        """Waits for the requests in the background; the first error of one is raised here."""
        while self._threads:
            self._threads.pop().join()
        if self._errors:
            raise self._errors[0]


def user_message(text: str) -> Message:
    return {"role": "user", "content": text}


def sleep_until(moment: float) -> None:
    """``moment`` as ``time.perf_counter`` has it."""
    time.sleep(max(0.0, moment - time.perf_counter()))
