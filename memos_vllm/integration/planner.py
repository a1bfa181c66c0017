"""The planner: from a turn's end to KV in GPU blocks, before the next request exists.

It feeds what happens (turns, hints) to the predictor and tells the engine which scenes it expects,
with their value, whenever that changed. One planner lives in each API process. They tell each other what
happens (``event_exchange``), so each can predict for all; the engine merges what they say.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import hashlib
import itertools
import logging
import math
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from memos_vllm.config import PredictionConfig
from memos_vllm.core import snapshot
from memos_vllm.core.scenes import Event, Scene, SceneKind, TurnEnded, TurnStarted
from memos_vllm.integration import engine_channel
from memos_vllm.integration.event_exchange import Heard
from memos_vllm.integration.latest_only import LatestOnly
from memos_vllm.integration.lengths import Lengths
from memos_vllm.integration.predictor_file import PredictorFile
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger(__name__)

REPLAN_INTERVAL_S = 1.0
"""How often the ranking is looked at while nothing happens: probabilities change with time."""

FIRST_TOKEN_S = 0.3
"""How long after the start of a turn nothing new is brought for other turns, unless this one ends before: its first
token is being computed, and a CPU's forward pass shares its cores and its memory with the copies. Under
steady load a turn starts all the time; what is expected is then told this much later, and not never."""

RENDERING_S = 0.02
"""How long after the start of a turn the engine is told which scenes are in use. Until then the request is rendered and
sent, for which the process needs its time; what the engine was told to expect holds meanwhile, this scene too."""

HINT_INTERVAL_S = 0.05
"""Between the starts of two tellings of which hints alone are the reason: a client may send thousands a second, every
telling is a ranking here and a call between two steps of the engine, and a prefetch takes longer than this anyway. The
first hint after a pause is told at once, and a turn's end always is."""

LIKELY = 0.5
"""From this probability of a use within the horizon on, a scene's adapter is brought: loading one costs the engine
time, and takes a place from another. A scene's KV may be brought at less; blocks that nobody needs are many."""

OWNER_SHARE = 0.25
"""Share of the told scenes that one user's may be while others have such, however much is announced for him."""

MAX_ANNOUNCED = 16
"""Scenes of one user's of which nothing is known but the adapter; the one announced first is forgotten first. Any
hint may name a new session, and a predictor that is full forgets others' scenes."""

MAX_ANNOUNCERS = 10_000

SAVE_INTERVAL_S = 60.0
"""How often what was learned is written down; a crash forgets no more than this."""

COPY_PARTS = 8
"""Parts of the predictor's state (``core.snapshot``) that are copied between two looks at the event loop."""


class ScenePlanner:
    """Owned by the API process's event loop.

    Args:
        file: where what was learned is kept, over restarts.
        now: wall-clock seconds; habits follow the hour of the day.
        on_expected: told ``likely`` after each event, and when time alone has changed it. It may take its time: it is
            called in a task of its own, and what happens meanwhile is one more call.
        on_event: told every event of this process, its time, and the kind of its scene.
    """

    def __init__(
        self,
        engine: EngineClient,
        config: PredictionConfig,
        file: PredictorFile,
        now: Callable[[], float] = time.time,
        on_expected: Callable[[Sequence[str]], Awaitable[None]] | None = None,
        on_event: Heard = lambda at, event, kind: None,
    ) -> None:
        self.enabled = config.enabled
        self._engine = engine
        self._max_scenes = config.max_scenes
        self._file = file
        self._now = now
        self.name = f"{os.getpid()}"
        self.on_told: Callable[[], None] = lambda: None
        """Called when an event has changed what the engine expects."""
        self._bringing = None if on_expected is None else LatestOnly(on_expected, "memos-expected")
        self._on_event = on_event
        self._predictor = file.restore(now())
        self._told: list[tuple[float, str]] = []
        self.likely: list[str] = []
        """Scenes that come within the horizon with at least the probability ``LIKELY``, most valuable first."""
        self._busy: Counter[str] = Counter()
        """Requests under way, by scene."""
        self._events: deque[tuple[float, Event | Scene, SceneKind]] = deque()
        """What the predictor has not learned from yet; empty unless its state is being copied."""
        self._announced: OrderedDict[str | None, deque[str]] = OrderedDict()
        """By user, scenes as ``know`` adds them."""
        self._copied_at: float | None = None
        """Set while the state is being copied, and nothing may change it."""
        self._changed = asyncio.Event()
        self._begun_at = -math.inf
        """When the engine was last begun to be told of something, by the event loop's clock."""
        self._soon: asyncio.TimerHandle | None = None
        """What happened until then is told together."""
        self._held_since: float | None = None
        """Start of a turn since which the engine was told of nothing new."""
        self._telling = False
        self._sizes: dict[str, int] = {}
        """In blocks, of starts that were declared since the engine was told last."""
        self._saved_at = now()
        self._task: asyncio.Task[None] | None = None

    @staticmethod
    def scene_id(who: Principal, session: str | None) -> str:
        """A session's scene; without a session, that of the user's next conversation."""
        parts = [who.tenant, who.user] + ([session] if session is not None else [])
        text = "".join(f"{len(part)}:{part}" for part in parts)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @classmethod
    def start_id(cls, who: Principal) -> str:
        """The scene of what the user's next session starts with; no session has the name."""
        return cls.scene_id(who, "")

    def hinted_id(self, who: Principal, session: str | None) -> str:
        """What a hint is about: a session that nobody has seen begins with the start."""
        scene_id, start_id = self.scene_id(who, session), self.start_id(who)
        return start_id if not self._is_seen(scene_id) and start_id in self._predictor else scene_id

    @property
    def busy(self) -> bool:
        """Whether the engine has yet to hear of something that happened, or ``on_expected`` to end."""
        is_bringing = self._bringing is not None and self._bringing.busy
        is_waiting = self._changed.is_set() or self._soon is not None
        return is_waiting or self._telling or self._held_since is not None or is_bringing

    @property
    def told(self) -> list[str]:
        """Scenes that the engine was told to expect, most valuable first."""
        return [scene_id for _, scene_id in self._told]

    # -- what happens ---------------------------------------------------------------------------

    def turn_started(self, who: Principal, session: str | None, *, starts_session: bool = False) -> str:
        """A request came; returns its scene.

        Args:
            starts_session: as far as the request shows; that its session is known says otherwise.
        """
        scene_id = self.scene_id(who, session)
        if starts_session and (session is None or not self._is_seen(scene_id)):
            # The start is used as soon as the request is here; from now on the next session is expected.
            self._note(TurnStarted(self.start_id(who), owner=str(who)), SceneKind.SESSION_START)
            self._note(TurnEnded(self.start_id(who)), SceneKind.CONVERSATION)
        self._busy[scene_id] += 1
        if self._held_since is None:
            self._held_since = self._now()
        self.observe(TurnStarted(scene_id, owner=str(who)))
        return scene_id

    def know(self, scene_id: str, who: Principal) -> None:
        """A scene of which nothing but its adapter is known: its events count from now on."""
        if self.enabled and scene_id not in self._predictor:
            scene = Scene(scene_id, owner=str(who), kind=SceneKind.ADAPTER)
            self._events.append((self._now(), scene, scene.kind))
            self._learn()

    def _is_seen(self, scene_id: str) -> bool:
        """Whether a request has had the scene."""
        scene = self._predictor.scene(scene_id)
        return scene is not None and scene.kind is not SceneKind.ADAPTER

    def turn_ended(self, scene_id: str, lengths: Lengths | None = None) -> None:
        """A request is through; the scene's turn ends with its last one."""
        self._busy -= Counter([scene_id])
        self._held_since = None
        if scene_id not in self._busy:
            seen = lengths or Lengths()
            self.observe(TurnEnded(scene_id, seen.prompt_tokens, output_tokens=seen.output_tokens))

    def observe(self, event: Event, kind: SceneKind = SceneKind.CONVERSATION) -> None:
        """Learns from an event, and replans soon.

        Args:
            kind: of the scene, where the event is the first of it.
        """
        if not self.enabled:
            return
        if not isinstance(event, TurnStarted | TurnEnded):
            self._held_since = None  # a hint is not to wait
        self._note(event, kind)
        self._start(at_once=self._is_due(event))

    def _note(self, event: Event, kind: SceneKind) -> None:
        """Learns from an event, and tells other API processes."""
        if not self.enabled:
            return
        now = self._now()
        self._on_event(now, event, kind)
        self._events.append((now, event, kind))
        self._learn()

    def hear(self, at: float, event: Event, kind: SceneKind) -> None:
        """Learns from what happened in another API process, which tells the engine what follows at once. This one
        looks at its ranking when it does so anyway, so that one event is not told by all of them."""
        if self.enabled:
            self._events.append((min(at, self._now()), event, kind))
            self._learn()
            self._start(at_once=False)

    def _learn(self) -> None:
        while self._events and self._copied_at is None:
            now, event, kind = self._events.popleft()
            if isinstance(event, Scene):
                if event.id not in self._predictor:
                    self._predictor.add(event)
                    self._forget_announced(event)
                continue
            if isinstance(event, TurnStarted) and not self._is_seen(event.scene_id):
                self._predictor.add(Scene(event.scene_id, owner=event.owner, kind=kind))
            self._predictor.observe(event, now)

    def _forget_announced(self, new: Scene) -> None:
        theirs = self._announced.setdefault(new.owner, deque())
        self._announced.move_to_end(new.owner)
        theirs.append(new.id)
        if len(theirs) > MAX_ANNOUNCED and not self._is_seen(oldest := theirs.popleft()):
            self._predictor.remove(oldest)
        if len(self._announced) > MAX_ANNOUNCERS:
            self._announced.popitem(last=False)

    def forget(self, who: Principal) -> None:
        """Forgets a user's scenes and habits, and has that written down at once, here and in other API processes."""
        self._file.forgotten.add(str(who))
        self._forget_news()
        self._start()

    def _forget_news(self) -> None:
        """Forgets whom any API process was told to forget."""
        if self._file.forgotten.has_news():
            self._copied_at = None  # which ends a copy; it starts again
            self._learn()
            self._file.forgotten.take_news(self._predictor)
            self._saved_at = -math.inf

    def explain(self, scene_id: str) -> dict[str, Any] | None:
        """Why a scene is expected; None if nothing is known of it."""
        now = self._now() if self._copied_at is None else self._copied_at
        prediction = self._predictor.predict(scene_id, now) if self.enabled else None
        return None if prediction is None else asdict(prediction)

    def _is_due(self, event: Event) -> bool:
        """Whether the engine is to hear of an event now; if not, all that happens until then is told together."""
        loop = asyncio.get_running_loop()
        match event:
            case TurnStarted():
                due = loop.time() + RENDERING_S
            case TurnEnded():
                return True
            case _:
                due = self._begun_at + HINT_INTERVAL_S
        if due <= loop.time():
            return True
        if self._soon is None or due < self._soon.when():
            self._cancel_soon()
            self._soon = loop.call_at(due, self._changed.set)
        return False

    def _cancel_soon(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None

    def _start(self, *, at_once: bool = True) -> None:
        if at_once:
            self._changed.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="memos-planner")
            atexit.register(self.save)

    # -- what follows ---------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            timeout_s = REPLAN_INTERVAL_S if self._held_since is None else FIRST_TOKEN_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            happened = self._changed.is_set() or self._held_since is not None
            self._changed.clear()
            if happened:
                self._begun_at = asyncio.get_running_loop().time()
            self._cancel_soon()
            self._telling = True
            try:
                self._forget_news()
                if self.enabled:
                    await self._replan(happened)
                if self._now() - self._saved_at > SAVE_INTERVAL_S:
                    await self.save_in_slices()
            except Exception:
                # Prediction only makes requests cheap; they must not depend on it.
                logger.exception("the expected scenes could not be told to the engine")
                await asyncio.sleep(REPLAN_INTERVAL_S)
            finally:
                self._telling = False

    async def _replan(self, happened: bool) -> None:
        """Tells the engine what is expected: after an event, since blocks may have left the GPU in the
        meantime, and when time alone has changed the order."""
        self._take_sizes(self._sizes)
        self._sizes = {}
        self._predictor.take_changes()
        if self._held_since is not None and 0.0 <= self._now() - self._held_since < FIRST_TOKEN_S:
            await self._tell(self._told)
            return
        self._held_since = None
        of_one = max(1, int(OWNER_SHARE * self._max_scenes))
        predictions = self._predictor.rank(self._now(), self._max_scenes, of_one=of_one)
        ranked = [(each.value, each.scene_id) for each in predictions]
        likely = [each.scene_id for each in predictions if each.probability >= LIKELY]
        if not happened and [scene_id for _, scene_id in ranked] == self.told and likely == self.likely:
            return
        await self._tell(ranked)
        self.likely = likely
        self.on_told()
        if self._bringing is not None:
            self._bringing.ask(likely)

    async def _tell(self, ranked: list[tuple[float, str]]) -> None:
        payload = {"planner": self.name, "scenes": ranked, "busy": list(self._busy)}
        replies = await engine_channel.call(self._engine, "expect", payload)
        self._told = ranked
        for reply in replies:
            self._take_sizes(reply.get("blocks", {}))

    def starts_declared(self, num_blocks: dict[str, int]) -> None:
        """The engine knows these starts of sessions now, and is soon told to expect them."""
        self._sizes.update(num_blocks)
        self._changed.set()

    def _take_sizes(self, num_blocks_of: dict[str, int]) -> None:
        """The engine knows how large the scenes are; their value depends on it."""
        for scene_id, num_blocks in num_blocks_of.items():
            known = self._predictor.scene(scene_id)
            if known is not None and known.num_blocks != num_blocks:
                # Prefill time and bytes both grow with the tokens; what counts is their ratio.
                self._predictor.add(
                    Scene(
                        scene_id,
                        owner=known.owner,
                        kind=known.kind,
                        num_blocks=num_blocks,
                        size_bytes=num_blocks,
                        prefill_s=float(num_blocks),
                    )
                )

    # -- what is kept over restarts -------------------------------------------------------------

    async def save_in_slices(self) -> None:
        """Writes down what was learned, whole or not at all, and holds the event loop a few milliseconds at a time.

        What happens while the state is copied is learned right after that, so the copy is of one moment.
        """
        with _without_collection():
            as_of, lines = await self._encoded_state()
        await asyncio.to_thread(self._file.write, lines, as_of, "slices")

    async def _encoded_state(self) -> tuple[float, list[bytes]]:
        """When the state was so, in seconds since the epoch, and its lines."""
        copied: list[snapshot.Part] | None = None
        while copied is None:
            self._saved_at, as_of = self._now(), time.time()
            copied = await self._copy_state()
        lines = [snapshot.head(copied)]
        for part in copied:
            lines.append(snapshot.encode(part))
            await asyncio.sleep(0)
        return as_of, lines

    async def _copy_state(self) -> list[snapshot.Part] | None:
        """None if a user was forgotten before it was done."""
        self._copied_at = self._now()
        self._predictor.advance(self._copied_at)
        copied: list[snapshot.Part] = []
        parts = snapshot.parts(self._predictor.state())
        try:
            while slice_ := list(itertools.islice(parts, COPY_PARTS)):
                copied += slice_
                await asyncio.sleep(0)
                if self._copied_at is None:
                    return None
            return copied
        finally:
            self._copied_at = None
            self._learn()

    def save(self) -> None:
        """The same in one go, at the end of the process."""
        self._file.write([self._predictor.to_bytes()], time.time(), "whole")


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection meanwhile, some 1 s at 10,000 scenes.

    The copies are as many objects as set off a full collection, which stops the process for longer than
    all of them take (75 ms, seen at 10,000 scenes); and all of them die without one.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
