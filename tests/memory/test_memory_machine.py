"""Any order of writes: a model of what must be there, and a store that agrees with itself after each step."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from memos_vllm.core.lifecycle import State
from memos_vllm.errors import Conflict, NotFound
from memos_vllm.memory.integrity import Examination
from tests.memory.memory_factories import ALICE, BOB, Clock, make_service, says

TEXTS = st.one_of(
    st.sampled_from(["I like tea.", "I really like tea!", "My job is baker.", "My job is pilot.", "Ümläut ☕ 茶"]),
    st.text(min_size=1, max_size=30).filter(str.strip),
)
DAY = 86400.0


class MemoryMachine(RuleBasedStateMachine):
    """``contents`` has, by memory, every content that it ever had, in order; deletion alone takes one out."""

    ids = Bundle("ids")
    snapshots = Bundle("snapshots")
    links = Bundle("links")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.service = make_service(self.root, clock=self.clock)
        self.contents: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        self.linked: dict[str, tuple[str, str]] = {}
        self.taken: dict[str, dict[str, Any]] = {}

    def teardown(self) -> None:
        self.service._store.close()
        shutil.rmtree(self.root)

    @initialize(target=ids)
    def begin(self) -> str:
        self.service.add(BOB, "of bob")
        return self._added(self.service.add(ALICE, "first"))

    @rule(target=ids, text=TEXTS, tags=st.lists(st.sampled_from("abc"), unique=True))
    def add(self, text: str, tags: list[str]) -> str:
        return self._added(self.service.add(ALICE, text, tags=tags))

    @rule(target=ids, text=TEXTS)
    def say(self, text: str) -> Any:
        before = set(self.contents)
        for record in self.service.list(ALICE, include_superseded=True, limit=1000).records:
            assert record.id in before
        self.service.remember(ALICE, says(text))
        new = [r for r in self._all() if r.id not in before]
        return multiple(*(self._added(record) for record in new))

    @rule(memory=ids, text=TEXTS, tags=st.lists(st.sampled_from("abc"), unique=True))
    def update(self, memory: str, text: str, tags: list[str]) -> None:
        if not self._try(lambda: self.service.update(ALICE, memory, text=text, tags=tags)):
            return
        self.contents[memory].append((text, tuple(dict.fromkeys(tags))))

    @rule(memory=ids, other=ids)
    def merge(self, memory: str, other: str) -> None:
        if memory == other or not self._try(lambda: self.service.life.merge(ALICE, memory, [other])):
            return
        kept = self.service.get(ALICE, memory)
        assert set(kept.tags) >= {*self.contents[memory][-1][1], *self.contents[other][-1][1]}
        assert self.service.get(ALICE, other).state is State.MERGED
        self._follow(memory)

    @rule(memory=ids, state=st.sampled_from(["activated", "archived", "frozen"]))
    def set_state(self, memory: str, state: str) -> None:
        if self._try(lambda: self.service.life.set_state(ALICE, memory, state)):
            assert self.service.get(ALICE, memory).state == state

    @rule(memory=ids)
    def use(self, memory: str) -> None:
        self.service.life.used(ALICE, {"late": [memory]}, session="s")

    @rule(target=links, source=ids, end=ids)
    def link(self, source: str, end: str) -> Any:
        if source == end or not {source, end} <= self.contents.keys():
            return multiple()
        link = self.service.life.link(ALICE, source, end, "related_to")
        self.linked[link.id] = (source, end)
        return link.id

    @rule(link=consumes(links))
    def unlink(self, link: str) -> None:
        assert self._try(lambda: self.service.life.end_link(ALICE, link, remove=True)) == (link in self.linked)
        self.linked.pop(link, None)

    @rule(memory=consumes(ids))
    def delete(self, memory: str) -> None:
        if memory in self.contents:
            gone = set(self.service.delete(ALICE, memory).records)
            assert memory in gone
            for each in gone:
                del self.contents[each]
            self.linked = {link: ends for link, ends in self.linked.items() if not gone & set(ends)}

    @rule(target=snapshots)
    def snapshot(self) -> Any:
        snapshot = self.service.life.take_snapshot(ALICE, "s")
        self.taken[snapshot.id] = {record.id: record for record in self._all()}
        return snapshot.id

    @rule(snapshot=snapshots)
    def roll_back(self, snapshot: str) -> None:
        done = self.service.life.roll_back(ALICE, snapshot)
        then = self.taken[snapshot]
        for record in self._all():
            self._follow(record.id)
            if record.id in done.frozen or (record.id in then and record.state is State.FROZEN):
                continue
            if record.id in then:
                old = then[record.id]
                assert (record.text, record.tags, record.pinned) == (old.text, old.tags, old.pinned)
                assert record.is_current == old.is_current
            elif record.is_current and record.state is not State.FROZEN:
                assert record.state is State.ARCHIVED

    @rule(seconds=st.sampled_from([60.0, -3 * DAY, 200 * DAY]))
    def time(self, seconds: float) -> None:
        self.clock.forward(seconds)
        self.service.life.tend()

    @invariant()
    def nothing_is_lost(self) -> None:
        stored = {record.id: record for record in self._all()}
        assert stored.keys() == self.contents.keys()
        for memory, record in stored.items():
            with self.service._store.read(ALICE) as user:
                versions = [*user.versions(memory), record]
            assert [version.version for version in versions] == list(range(1, record.version + 1))
            assert [(version.text, version.tags) for version in versions][-1] == self.contents[memory][-1]
            told = [(version.text, version.tags) for version in versions]
            assert [each for each in self.contents[memory] if each not in told] == []

    @invariant()
    def links_are_known_at_both_ends(self) -> None:
        for link, ends in self.linked.items():
            for end in ends:
                assert link in {known.id for known in self.service.life.links(ALICE, end)}

    @invariant()
    def search_finds_what_is_in_use(self) -> None:
        found = {hit.record.id for hit in self.service.search(ALICE, "tea job", top_k=1000)}
        assert found <= {
            record.id
            for record in self._all()
            if record.is_current and record.state is not State.ARCHIVED and not record.has_expired(self.clock.now)
        }

    @invariant()
    def the_store_agrees_with_itself(self) -> None:
        store = self.service._store
        with store._begin() as txn:
            report = Examination(txn, store._dbs, lambda *_: None, store.aging).run()
        assert report.problems == []

    def _all(self) -> Any:
        return self.service.list(ALICE, include_superseded=True, limit=1000).records

    def _added(self, record: Any) -> str:
        self.contents[record.id] = [(record.text, record.tags)]
        return record.id

    def _follow(self, memory: str) -> None:
        """A merge or a rollback may have made a version."""
        record = self.service.get(ALICE, memory)
        if (record.text, record.tags) != self.contents[memory][-1]:
            self.contents[memory].append((record.text, record.tags))

    @staticmethod
    def _try(call: Any) -> bool:
        """Whether it was allowed: the memory is there, and its state lets it."""
        try:
            call()
        except (Conflict, NotFound):
            return False
        return True


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=20, stateful_step_count=25)
