"""Sources are asked side by side, are waited for so long and no longer, and never fail a chat."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from memos_vllm.errors import SourceError
from memos_vllm.memory.assembly import SOURCES_HEADING, assemble
from memos_vllm.memory.recall import with_sources
from memos_vllm.memory.results import Passage, Recall
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.sources import gathering
from memos_vllm.memory.sources.gathering import Gathered, Sources
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB, count_words, says, texts


@dataclass
class Fake:
    """Answers with its texts once ``may_answer`` is set."""

    name: str
    found: Sequence[str] = ()
    error: Exception | None = None
    deadline_s: float = 30.0
    users: Sequence[Principal] = (ALICE,)
    may_answer: threading.Event = field(default_factory=threading.Event)
    meets: threading.Barrier | None = None
    asked: list[str] = field(default_factory=list)

    def serves(self, who: Principal) -> bool:
        return who in self.users

    def search(self, query: str, top_k: int) -> Sequence[Passage]:
        self.asked.append(query)
        self.may_answer.wait(30)
        if self.meets is not None:
            self.meets.wait(10)
        if self.error is not None:
            raise self.error
        return [passage(text, self.name) for text in self.found[:top_k]]

    def status(self) -> dict[str, Any]:
        return {"name": self.name}


def passage(text: str, source: str = "books") -> Passage:
    return Passage(source, text, "a.txt")


def ready(name: str, *found: str, **values: Any) -> Fake:
    fake = Fake(name, found, **values)
    fake.may_answer.set()
    return fake


def ask(sources: Sources, who: Principal = ALICE, query: str = "tea?") -> Gathered:
    return asyncio.run(sources.begin(who, query).finish())


def test_the_best_of_each_come_first() -> None:
    gathered = ask(Sources([ready("a", "a1", "a2", "a3"), ready("b", "b1")], top_k=2))
    assert [each.text for each in gathered.passages] == ["a1", "b1", "a2"] and gathered.failures == ()


def test_they_are_asked_at_once() -> None:
    both = threading.Barrier(2)  # neither answers before the other was asked
    gathered = ask(Sources([ready("a", "a1", meets=both), ready("b", "b1", meets=both)]))
    assert [each.text for each in gathered.passages] == ["a1", "b1"]


def test_only_those_that_serve_the_user() -> None:
    ours, theirs = ready("a", "a1"), ready("b", "b1", users=(BOB,))
    assert [each.source for each in ask(Sources([ours, theirs])).passages] == ["a"]
    assert theirs.asked == []
    assert ask(Sources([ours]), query=" \n").passages == () and ours.asked == ["tea?"]


def test_what_comes_too_late_is_left_out() -> None:
    slow, fast = Fake("slow", ["s1"], deadline_s=0.01), ready("fast", "f1")
    sources = Sources([slow, fast])
    gathered = ask(sources)
    assert [each.text for each in gathered.passages] == ["f1"] and gathered.failures == ("late",)
    slow.may_answer.set()
    assert sources.status(ALICE) == [{"name": "slow", "failures": {"late": 1}}, {"name": "fast", "failures": {}}]
    assert sources.status(BOB) == sources.status() == [] and len(sources.status(all=True)) == 2


def test_the_deadline_counts_from_the_start_of_the_recall() -> None:
    seconds = [100.0]
    slow, fast = Fake("slow", ["s1"]), ready("fast", "f1")
    sources = Sources([slow, fast], monotonic_s=lambda: seconds[0])

    async def ask_late() -> Gathered:
        question = sources.begin(ALICE, "tea?")
        (_, answer) = question._questions[1]
        assert answer is not None and answer.result(10)
        seconds[0] += slow.deadline_s
        finishing = asyncio.create_task(question.finish())
        for _ in range(20):
            await asyncio.sleep(0)
        assert finishing.done(), "nothing is left to wait for"
        return finishing.result()

    gathered = asyncio.run(ask_late())
    slow.may_answer.set()
    assert [each.text for each in gathered.passages] == ["f1"] and gathered.failures == ("late",)


@pytest.mark.parametrize("error", [SourceError("away"), RuntimeError("a bug")])
def test_one_that_fails_is_left_alone_for_a_while(error: Exception) -> None:
    seconds = [100.0]
    bad, good = ready("bad", error=error), ready("good", "g1")
    sources = Sources([bad, good], monotonic_s=lambda: seconds[0])
    gathered = ask(sources)
    assert [each.text for each in gathered.passages] == ["g1"] and gathered.failures == ("error",)
    assert ask(sources).failures == () and len(bad.asked) == 1
    seconds[0] += gathering.RETRY_AFTER_S
    assert ask(sources).failures == ("error",) and len(bad.asked) == 2


def test_one_that_hangs_takes_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "MAX_WAITING", 2)
    slow = Fake("slow", ["s1"], deadline_s=0.01)
    sources = Sources([slow])
    assert [ask(sources).failures for _ in range(3)] == [("late",), ("late",), ("busy",)]
    slow.may_answer.set()


class TestTheBudget:
    def recalled(self, service: MemoryService, *facts: str) -> Recall:
        for fact in facts:
            service.add(ALICE, fact, type="document")
        return service.recall(ALICE, says("tea"))

    def test_sources_take_their_share_at_most_and_memory_the_rest(self, service: MemoryService) -> None:
        recall = self.recalled(service, "tea " + "one " * 9, "tea " + "two " * 9)
        passages = [passage("tea " * 7), passage("tea " * 6), passage("tea " * 2)]  # 9, 8 and 4 words when cited
        mixed = with_sources(recall, passages, 26, 0.5, count_words)
        assert mixed.sources == (passages[0], passages[2]) and len(mixed.late) == 1
        assert with_sources(recall, passages, 26, 0.0, count_words) == recall
        assert with_sources(recall, [], 26, 0.5, count_words) == recall

    def test_they_stand_late_and_cited_and_change_nothing_before(self) -> None:
        messages = [
            {"role": "system", "content": "Be kind."},
            *says("Hi"),
            {"role": "assistant", "content": "Hello"},
            *says("Tea?"),
        ]
        without, mixed = (
            assemble(messages, ["a"], ["b"]),
            assemble(messages, ["a"], ["b"], [passage("It is hot.").quoted]),
        )
        assert mixed[:-1] == without[:-1]
        heading = f"Recalled for this question:\n- b\n\n{SOURCES_HEADING}\n- [books: a.txt] It is hot.\n\nTea?"
        assert mixed[-1]["content"] == heading
        assert assemble(messages, sources=["x"])[-1]["content"] == f"{SOURCES_HEADING}\n- x\n\nTea?"

    def test_nothing_of_them_is_remembered(self, service: MemoryService) -> None:
        recall = with_sources(self.recalled(service), [passage("Tea is hot.")], 100, 0.5, count_words)
        assert recall.sources and texts(service.list(ALICE).records) == []
