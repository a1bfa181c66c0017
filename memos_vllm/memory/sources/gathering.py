"""Searching all sources of a user at once, while memory is recalled, and not beyond their deadlines."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from memos_vllm.errors import SourceError
from memos_vllm.memory.results import Passage
from memos_vllm.memory.sources.contract import Source
from memos_vllm.types import Principal

logger = logging.getLogger(__name__)

THREADS = 16
"""Of one source, so that a slow one takes no thread of another."""

MAX_WAITING = 64
"""Questions to one source at a time; of more it is not asked."""

RETRY_AFTER_S = 30.0
"""A source that failed is left alone for so long."""

FAILURES = ("error", "late", "busy")


@dataclass(frozen=True, slots=True)
class Gathered:
    passages: tuple[Passage, ...]
    """The best of each source, then the second best of each, and so on: scores of two sources say nothing about
    each other."""

    failures: tuple[str, ...]
    """Of ``FAILURES``, one for each source that gave no answer."""


class Sources:
    """Thread-safe."""

    def __init__(
        self, sources: Sequence[Source] = (), top_k: int = 5, monotonic_s: Callable[[], float] = time.monotonic
    ):
        self._top_k = top_k
        self._monotonic_s = monotonic_s
        self._asked = [_Asked(source, monotonic_s) for source in sources]

    def begin(self, who: Principal, query: str) -> Gathering:
        """Asks every source that serves the user; returns at once."""
        if not query.strip():
            return Gathering([], self._monotonic_s)
        asked = [each for each in self._asked if each.source.serves(who)]
        return Gathering([(each, each.ask(query, self._top_k)) for each in asked], self._monotonic_s)

    def status(self, who: Principal | None = None, *, all: bool = False) -> list[dict[str, Any]]:
        """Of the sources that serve a user: others' names say what others have.

        Args:
            who: asks; None: nobody who is known.
            all: of every source, for the operator.
        """
        return [each.status() for each in self._asked if all or (who is not None and each.source.serves(who))]


class Gathering:
    """One question under way."""

    def __init__(
        self, questions: Sequence[tuple[_Asked, Future[Sequence[Passage]] | None]], monotonic_s: Callable[[], float]
    ):
        self._questions = questions
        self._monotonic_s = monotonic_s
        self._began_s = monotonic_s()

    async def finish(self) -> Gathered:
        """Waits until every source has answered or its deadline has passed; no thread does. Never fails."""
        answers = await asyncio.gather(*(self._answer(*question) for question in self._questions))
        ranked = chain.from_iterable(zip_longest(*(passages for passages, _ in answers)))
        return Gathered(
            tuple(passage for passage in ranked if passage is not None),
            tuple(failure for _, failure in answers if failure is not None),
        )

    async def _answer(
        self, asked: _Asked, question: Future[Sequence[Passage]] | None
    ) -> tuple[Sequence[Passage], str | None]:
        """What a source found, or why there is nothing."""
        left_s = self._began_s + asked.source.deadline_s - self._monotonic_s()
        try:
            if question is None:
                failure = "busy"
            elif question.done():  # also where recalling memory took longer than the deadline
                return question.result(), None
            else:
                return await asyncio.wait_for(asyncio.wrap_future(question), max(0.0, left_s)), None
        except TimeoutError:
            failure = "late"
        except Exception as error:  # whatever a source does, the chat goes on
            failure = "error"
            asked.failed(error)
        asked.failures[failure] += 1
        return (), failure


class _Asked:
    """One source with its threads."""

    def __init__(self, source: Source, monotonic_s: Callable[[], float]):
        self.source = source
        self.failures: Counter[str] = Counter()
        self._monotonic_s = monotonic_s
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix=f"memos-source-{source.name}")
        self._free = threading.BoundedSemaphore(MAX_WAITING)
        self._left_alone_until_s = 0.0

    def ask(self, query: str, top_k: int) -> Future[Sequence[Passage]] | None:
        """None where too many questions wait already. One that is left alone answers with nothing."""
        if self._monotonic_s() < self._left_alone_until_s:
            nothing: Future[Sequence[Passage]] = Future()
            nothing.set_result(())
            return nothing
        if not self._free.acquire(blocking=False):
            return None
        question = self._pool.submit(self.source.search, query, top_k)
        question.add_done_callback(lambda _: self._free.release())
        return question

    def status(self) -> dict[str, Any]:
        return {**self.source.status(), "failures": dict(self.failures)}

    def failed(self, error: Exception) -> None:
        known = isinstance(error, SourceError)
        text = "source %s is left alone for %g s: %s"
        logger.warning(text, self.source.name, RETRY_AFTER_S, error, exc_info=None if known else error)
        self._left_alone_until_s = self._monotonic_s() + RETRY_AFTER_S
