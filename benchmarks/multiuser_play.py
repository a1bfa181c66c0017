"""The script, played on one arm and timed; and the limit, played beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx

from benchmarks.client import RequestFailed
from benchmarks.multiuser_arms import Arm, Message, Play, sleep_until, user_message
from benchmarks.multiuser_client import Answer, Counters, counters
from benchmarks.multiuser_script import Conversation, Script
from benchmarks.serving import Server

FIRST_PAUSE_S = 0.3
"""Between first turns at most; nothing can be prepared for them."""


@dataclass(frozen=True)
class Sample:
    """One timed turn.

    Attributes:
        loaded_tokens: of the cached ones, those that a KV connector brought in for this request.
        ready: whether all full blocks that the conversation had computed before were on the GPU.
        think_s: from this user's last answer to this request.
    """

    user: str
    turn: int
    answer: Answer
    loaded_tokens: int
    ready: bool
    think_s: float | None


@dataclass
class Result:
    """One arm's run.

    Attributes:
        control: the same turns of the limit, measured beside this arm.
        totals: differences over the turns from the second on.
        scenes: Memos' counters over the same turns; empty without prediction.
        forwards: forward passes that were spent on preparing a turn rather than answering one.
        failure: why the run ended early.
    """

    arm: str
    samples: list[Sample] = field(default_factory=list)
    control: list[Sample] = field(default_factory=list)
    control_totals: Counters = field(default_factory=Counters)
    totals: Counters = field(default_factory=Counters)
    scenes: dict[str, int] = field(default_factory=dict)
    forwards: int = 0
    failure: str | None = None


class Player:
    """One arm's side of the script: the conversations so far, and what was measured."""

    def __init__(self, arm: Arm, play: Play, script: Script, samples: list[Sample]):
        self.arm, self.play, self.script, self.samples = arm, play, script, samples
        self.messages: dict[str, list[Message]] = {one.user: [] for one in script.conversations}
        self._last: dict[str, Sample] = {}
        self._answered: dict[str, float] = {}

    def rehearse(self) -> None:
        """The first full prompt of a server is slow (allocation, kernels); it belongs to no user."""
        query = self.script.rehearsal.queries[0]
        Arm.ask(self.arm, self.play, self.script.rehearsal, [user_message(query)], self.script.shape.max_tokens)

    def turn(self, turn: int, conversation: Conversation) -> None:
        user, history = conversation.user, self.messages[conversation.user]
        before = counters(self.play.http)  # also wakes an API process that has slept through the pause
        history.append(user_message(conversation.queries[turn]))
        think_s = time.perf_counter() - self._answered[user] if user in self._answered else None
        answer = self.arm.ask(self.play, conversation, history, self.script.shape.max_tokens)
        self._answered[user] = time.perf_counter()
        self.play.join()
        history.append({"role": "assistant", "content": answer.text})
        loaded = counters(self.play.http).loaded_tokens - before.loaded_tokens
        block_size = self.script.shape.block_size
        ready = user in self._last and _is_ready(answer, loaded, self._last[user].answer, block_size)
        self._last[user] = Sample(user, turn, answer, loaded, ready, think_s)
        self.samples.append(self._last[user])


class Control:
    """The limit, played beside another arm on a second server: each turn of the script there comes
    right before the same turn of the arm, after a pause of the same length. So whatever else slows the
    machine slows both, and both servers were idle as long. While one has its pause and its turn, the other is stopped.
    """

    def __init__(self, server: Server, played_beside: str):
        self._arm = Arm(f"warm beside {played_beside}", "large")
        self._server = server
        self._player: Player | None = None

    @contextmanager
    def opened(self, script: Script, result: Result) -> Iterator[None]:
        self._server.resume()
        with self._arm.opened(self._server) as play:
            self._player = Player(self._arm, play, script, result.control)
            self._player.rehearse()
            start = counters(play.http)
            self._server.pause()
            try:
                yield
            finally:
                self._server.resume()
            result.control_totals = counters(play.http) - start

    def turn(self, turn: int, conversation: Conversation, other: Server, pause_s: float) -> None:
        assert self._player is not None
        other.pause()
        self._server.resume()
        try:
            sleep_until(time.perf_counter() + pause_s)
            self._player.turn(turn, conversation)
        finally:
            self._server.pause()
            other.resume()


def play(
    arm: Arm,
    server: Server,
    script: Script,
    pause_s: float,
    advance: Callable[[str], None],
    result: Result,
    control: Control | None = None,
) -> None:
    """Plays the whole script on one arm into ``result``. An error ends the arm; what it measured stays.

    Raises:
        ServerError: the server has died.
    """
    try:
        with ExitStack() as stack:
            if control is not None:
                stack.enter_context(control.opened(script, result))
            opened = stack.enter_context(arm.opened(server))
            _play(Player(arm, opened, script, result.samples), server, pause_s, advance, result, control)
    except (RequestFailed, httpx.HTTPError) as error:
        server.check_alive()
        result.failure = str(error) or type(error).__name__


def _play(
    player: Player,
    server: Server,
    pause_s: float,
    advance: Callable[[str], None],
    result: Result,
    control: Control | None,
) -> None:
    arm, play, script = player.arm, player.play, player.script
    player.rehearse()
    for conversation in script.conversations:
        arm.introduce(play, conversation)
    start, start_scenes, background = counters(play.http), {}, 0
    for number, (turn, conversation) in enumerate(script.turns()):
        advance(f"{arm.name}, {conversation.user}, turn {turn + 1}")
        if number == script.shape.users:  # the second turns begin
            start, start_scenes, background = counters(play.http), arm.scenes(play), play.background_requests
        own_pause_s = pause_s if turn else min(pause_s, FIRST_PAUSE_S)
        if control is not None:
            control.turn(turn, conversation, server, own_pause_s)
        until = time.perf_counter() + own_pause_s
        if turn:
            arm.prepare(play, conversation, list(player.messages[conversation.user]), until)
        else:
            sleep_until(until)
        player.turn(turn, conversation)
    result.totals = counters(play.http) - start
    result.scenes = {name: value - start_scenes.get(name, 0) for name, value in arm.scenes(play).items()}
    own = script.shape.users * (script.shape.turns - 1)
    # Whoever made the others: we did (warm-ups), or the server for itself.
    result.forwards = max(result.totals.requests - own, play.background_requests - background)


def _is_ready(answer: Answer, loaded_tokens: int, previous: Answer, block_size: int) -> bool:
    """The previous prompt is a prefix of this one; its full blocks had been computed."""
    return answer.cached_tokens - loaded_tokens >= previous.prompt_tokens // block_size * block_size
