"""Search by words, vectors, times and links together; filters, context, budget, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from memos_vllm.errors import RequestError, StoreFull
from memos_vllm.memory.indexes import Indexes
from memos_vllm.memory.retrieval import _EMBED_BATCH, RETRY_AFTER_S, Retrieval
from memos_vllm.memory.search import UserIndex
from memos_vllm.memory.service import MemoryService
from memos_vllm.types import Principal
from tests.memory.embedder_factories import TopicEmbedder
from tests.memory.memory_factories import ALICE, BOB, Clock, make_service, says, texts

NOT_FOUND: list[str] = []


@pytest.fixture
def embedder() -> TopicEmbedder:
    return TopicEmbedder()


@pytest.fixture
def hybrid(tmp_path: Path, clock: Clock, embedder: TopicEmbedder) -> MemoryService:
    service = make_service(tmp_path / "hybrid", clock=clock, embedder=embedder, long_lived_tokens=0)
    yield service
    service._store.close()


class Later:
    """A backlog on which nobody works."""

    def __init__(self) -> None:
        self.users: dict[Principal, None] = {}

    def __contains__(self, who: Principal) -> bool:
        return who in self.users

    def add(self, who: Principal) -> None:
        self.users[who] = None


def say(service: MemoryService, session: str, *sentences: str) -> None:
    for sentence in sentences:
        service.add(ALICE, sentence, session=session)


class TestNeighbours:
    def test_an_answer_is_found_by_the_words_of_its_question(self, service: MemoryService) -> None:
        say(service, "s", "Where did you spend your holidays?", "In Lisbon, it was lovely.", "Anyway, the dog is fine.")
        found = texts(service.search(ALICE, "holidays"))
        assert found == ["Where did you spend your holidays?", "In Lisbon, it was lovely.", "Anyway, the dog is fine."]

    def test_neither_across_conversations_nor_without_one(self, service: MemoryService) -> None:
        say(service, "s", "Where did you spend your holidays?")
        say(service, "t", "In Lisbon.")
        service.add(ALICE, "no conversation one")
        service.add(ALICE, "no conversation two holidays")
        assert len(service.search(ALICE, "holidays")) == 2

    def test_what_lies_between_may_be_forgotten(self, service: MemoryService) -> None:
        say(service, "s", "holidays", "the middle")
        middle = service.list(ALICE).records[-1]
        say(service, "s", "Lisbon")
        service.delete(ALICE, middle.id)
        near = service.search(ALICE, "holidays")[1]
        assert (near.record.text, near.score) == ("Lisbon", pytest.approx(near.why["terms"]["holiday"]))
        assert texts(service.search(ALICE, "middle")) == NOT_FOUND

    def test_a_changed_memory_keeps_its_place(self, service: MemoryService) -> None:
        say(service, "s", "one", "two", "three")
        middle = service.list(ALICE).records[1]
        service.update(ALICE, middle.id, text="second")
        (hit,) = service.search(ALICE, "second", top_k=1, context=2)
        assert (texts(hit.before), texts(hit.after)) == (["one"], ["three"])


class TestContext:
    def test_comes_with_a_hit_where_it_is_asked_for(self, service: MemoryService) -> None:
        say(service, "s", "a1", "b2", "tea", "c3", "d4")
        (hit,) = service.search(ALICE, "tea", top_k=1, context=1)
        assert (texts(hit.before), texts(hit.after)) == (["b2"], ["c3"])
        (hit,) = service.search(ALICE, "tea", top_k=1)
        assert (hit.before, hit.after) == ((), ())

    def test_what_search_leaves_out_does_not_come_as_context_either(self, service: MemoryService, clock: Clock) -> None:
        archived = service.add(ALICE, "archived", session="s")
        service.add(ALICE, "tea", session="s")
        service.add(ALICE, "over", session="s", ttl_s=60)
        service.life.set_state(ALICE, archived.id, "archived")
        clock.forward(61)
        (hit,) = service.search(ALICE, "tea", top_k=1, context=1)
        assert (hit.before, hit.after) == ((), ())
        (hit,) = service.search(ALICE, "tea", top_k=1, context=1, include_archived=True)
        assert texts(hit.before) == ["archived"]

    @pytest.mark.parametrize("context", [-1, 11, True, "2"])
    def test_is_a_small_number(self, service: MemoryService, context: object) -> None:
        with pytest.raises(RequestError, match="context"):
            service.search(ALICE, "tea", context=context)  # type: ignore[arg-type]


class TestTime:
    def test_a_question_about_a_day_finds_what_was_said_then(self, service: MemoryService, clock: Clock) -> None:
        for day in range(5):
            clock.now = datetime(2026, 3, 1 + day, tzinfo=UTC)
            service.add(ALICE, f"walk number {day}")
        clock.now = datetime(2026, 3, 4, tzinfo=UTC)
        assert texts(service.search(ALICE, "Which walk was yesterday?"))[0] == "walk number 2"
        assert texts(service.search(ALICE, "the walk on 5 March 2026"))[0] == "walk number 4"

    def test_a_relative_date_means_the_day_it_was_said(self, service: MemoryService, clock: Clock) -> None:
        clock.now = datetime(2023, 8, 25, tzinfo=UTC)
        service.add(ALICE, "I moved house last May")
        service.add(ALICE, "I moved my desk")
        clock.now = datetime(2026, 1, 1, tzinfo=UTC)
        (best, *_) = service.search(ALICE, "Who moved in May 2023?")
        assert best.record.text == "I moved house last May"
        assert "@2023-05" in best.why["terms"]

    def test_the_event_counts_where_it_is_not_when_it_was_stored(self, service: MemoryService) -> None:
        service.add(ALICE, "the concert", valid_from=datetime(2020, 6, 1, tzinfo=UTC))
        service.add(ALICE, "another concert")
        assert texts(service.search(ALICE, "concert in June 2020"))[0] == "the concert"

    def test_the_newest_comes_first_where_it_is_asked_for(self, service: MemoryService) -> None:
        service.add(ALICE, "tea in Oslo", valid_from=datetime(2025, 6, 1, tzinfo=UTC))
        service.add(ALICE, "tea in Rome", valid_from=datetime(2020, 6, 1, tzinfo=UTC))
        assert texts(service.search(ALICE, "tea")) == ["tea in Rome", "tea in Oslo"]
        found = service.search(ALICE, "latest tea")
        assert texts(found) == ["tea in Oslo", "tea in Rome"]
        assert found[0].why["retrievers"]["recency"]["rank"] == 1


class TestHybrid:
    def test_finds_by_other_words(self, hybrid: MemoryService) -> None:
        for text in ("I brew oolong every morning", "My kitten sleeps", "I drive to work", "The garden is green"):
            hybrid.add(ALICE, text)
        (best, *_) = hybrid.search(ALICE, "tea")
        assert best.record.text == "I brew oolong every morning"
        assert best.why["method"] == "hybrid"
        assert best.why["retrievers"]["dense"]["rank"] == 1
        assert best.why["terms"] == {}

    def test_what_does_not_stand_out_is_not_found(self, hybrid: MemoryService) -> None:
        for number in range(5):
            hybrid.add(ALICE, f"oolong number {number}")
        hybrid.add(ALICE, "kitten")
        assert texts(hybrid.search(ALICE, "cat")) == ["kitten"]

    def test_follows_a_change_and_a_deletion(self, hybrid: MemoryService) -> None:
        kept = [hybrid.add(ALICE, text) for text in ("oolong", "kitten", "drive", "plain")]
        hybrid.search(ALICE, "tea")
        hybrid.update(ALICE, kept[0].id, text="kitten again")
        hybrid.update(ALICE, kept[1].id, text="brew")
        assert texts(hybrid.search(ALICE, "tea"))[0] == "brew"
        hybrid.delete(ALICE, kept[1].id)
        assert "brew" not in texts(hybrid.search(ALICE, "tea"))

    def test_vectors_are_kept_and_not_made_again(
        self, hybrid: MemoryService, embedder: TopicEmbedder, clock: Clock
    ) -> None:
        hybrid.add(ALICE, "oolong")
        hybrid.search(ALICE, "tea")
        hybrid._indexes = hybrid._retrieval._indexes = Indexes(embedder)  # as after a restart
        embedder.embedded.clear()
        hybrid.search(ALICE, "cat")
        assert embedder.embedded == ["cat"]

    def test_a_stored_vector_does_not_outlive_its_text(self, hybrid: MemoryService, embedder: TopicEmbedder) -> None:
        kept = [hybrid.add(ALICE, text) for text in ("oolong", "drive", "plain")]
        hybrid.search(ALICE, "tea")
        hybrid.update(ALICE, kept[0].id, text="kitten")
        hybrid._indexes = hybrid._retrieval._indexes = Indexes(embedder)
        assert texts(hybrid.search(ALICE, "cat")) == ["kitten"]

    def test_a_vector_is_not_stored_for_another_text(self, hybrid: MemoryService, embedder: TopicEmbedder) -> None:
        record = hybrid.add(ALICE, "oolong")
        vectors = {record.id: embedder.embed(["kitten"])[0]}
        hybrid._retrieval._keep(ALICE, vectors, {record.id: "kitten"})
        with hybrid._store.read(ALICE) as user:
            assert list(user.rows("vectors")) == []
        hybrid._retrieval._keep(ALICE, vectors, {record.id: "oolong"})
        with hybrid._store.read(ALICE) as user:
            assert len(list(user.rows("vectors"))) == 1

    def test_the_speaker_is_part_of_what_is_embedded(self, hybrid: MemoryService, embedder: TopicEmbedder) -> None:
        hybrid.add(ALICE, "I like it", origin={"speaker": "Kitten"})
        hybrid.search(ALICE, "x")
        assert "Kitten: I like it" in embedder.embedded
        assert texts(hybrid.search(ALICE, "kitten")) == ["I like it"]

    def test_an_embedder_that_fails_leaves_words(self, hybrid: MemoryService, embedder: TopicEmbedder) -> None:
        hybrid.add(ALICE, "oolong")
        embedder.fails = True
        assert texts(hybrid.search(ALICE, "oolong")) == ["oolong"]
        assert hybrid.search(ALICE, "tea") == []

    def test_an_embedder_that_failed_is_left_alone_for_a_while(
        self, hybrid: MemoryService, embedder: TopicEmbedder
    ) -> None:
        now_s = [0.0]
        hybrid._retrieval = Retrieval(hybrid._store, hybrid._indexes, embedder, lambda: now_s[0])
        for text in ("oolong", "kitten", "drive"):
            hybrid.add(ALICE, text)
        embedder.fails = True
        assert hybrid.embedder_failures == 0
        assert hybrid.search(ALICE, "tea") == []
        assert hybrid.embedder_failures == 1
        embedder.fails = False
        now_s[0] = RETRY_AFTER_S - 1
        assert hybrid.search(ALICE, "tea") == []
        now_s[0] = RETRY_AFTER_S
        assert texts(hybrid.search(ALICE, "tea")) == ["oolong"]

    def test_a_text_that_is_refused_costs_nobody_his_vectors(
        self, hybrid: MemoryService, embedder: TopicEmbedder
    ) -> None:
        embedder.refuses = "poison"
        for who in (ALICE, BOB):
            hybrid.add_many(who, [{"text": text} for text in ("oolong", "kitten", "drive")])
        hybrid.add(ALICE, "poison")
        hybrid.search(ALICE, "tea")
        hybrid._retrieval._backlog.join()
        for who in (BOB, ALICE):
            assert texts(hybrid.search(who, "tea")) == ["oolong"]
        assert hybrid.search(ALICE, "brew poison") == hybrid.search(ALICE, "poison"), "a question may be refused, too"
        assert texts(hybrid.search(BOB, "tea")) == ["oolong"]
        hybrid._indexes = hybrid._retrieval._indexes = Indexes(embedder)  # as after a restart
        embedder.num_calls = 0
        hybrid.search(ALICE, "tea")
        assert embedder.num_calls == 1, "what was refused is not asked again"

    def test_a_question_waits_for_one_batch(self, hybrid: MemoryService, embedder: TopicEmbedder) -> None:
        hybrid._retrieval._backlog = later = Later()
        hybrid.add_many(ALICE, [{"text": f"oolong {number}"} for number in range(2 * _EMBED_BATCH)])
        hybrid.add(ALICE, "kitten")
        hybrid.search(ALICE, "cat")
        assert len(embedder.embedded) == _EMBED_BATCH + 1 and later.users == {ALICE: None}
        hybrid.search(ALICE, "cat")
        assert len(embedder.embedded) == _EMBED_BATCH + 2, "the rest is another's work already"
        assert [hybrid._retrieval._embed_rest(ALICE) for _ in range(2)] == [True, False]
        later.users.clear()
        assert texts(hybrid.search(ALICE, "cat")) == ["kitten"]

    def test_the_backlog_leaves_an_embedder_alone_that_fails(
        self, hybrid: MemoryService, embedder: TopicEmbedder
    ) -> None:
        hybrid._retrieval._backlog = Later()
        hybrid.add_many(ALICE, [{"text": f"oolong {number}"} for number in range(2 * _EMBED_BATCH)])
        hybrid.search(ALICE, "cat")
        embedder.fails, embedder.num_calls = True, 0
        assert [hybrid._retrieval._embed_rest(ALICE) for _ in range(2)] == [False, False]
        assert embedder.num_calls == 1

    def test_a_full_store_still_searches_by_vectors(
        self, hybrid: MemoryService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for text in ("oolong", "kitten", "drive"):
            hybrid.add(ALICE, text)

        def full(*_: object, **__: object) -> None:
            raise StoreFull("full")

        monkeypatch.setattr(hybrid._store, "write", full)
        assert texts(hybrid.search(ALICE, "tea")) == ["oolong"]

    def test_a_text_that_changes_while_it_is_embedded_is_embedded_again(
        self, hybrid: MemoryService, embedder: TopicEmbedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changing, *_ = [hybrid.add(ALICE, text) for text in ("oolong", "kitten", "drive", "brew")]
        embed = embedder.embed

        def change_meanwhile(texts: Sequence[str]) -> object:
            rows = embed(texts)
            if "oolong" in texts:
                hybrid.update(ALICE, changing.id, text="plain words")
            return rows

        monkeypatch.setattr(embedder, "embed", change_meanwhile)
        assert texts(hybrid.search(ALICE, "tea")) == ["brew"]
        hybrid._retrieval._backlog.join()
        assert "plain words" in embedder.embedded

    def test_what_is_remembered_is_embedded_before_the_next_question(
        self, hybrid: MemoryService, embedder: TopicEmbedder
    ) -> None:
        hybrid.remember(ALICE, says("I brew oolong every morning."))
        assert embedder.embedded == ["I brew oolong every morning."]
        embedder.fails = True
        assert len(hybrid.remember(ALICE, says("My kitten sleeps a lot."))) == 1

    def test_users_are_apart(self, hybrid: MemoryService) -> None:
        hybrid.add(ALICE, "oolong")
        hybrid.add(BOB, "brew")
        assert texts(hybrid.search(BOB, "oolong tea brew")) == ["brew"]


class TestFilters:
    def test_all_that_is_given_must_hold(self, service: MemoryService) -> None:
        service.add(ALICE, "tea one", tags=["work", "drink"], session="s")
        service.add(ALICE, "tea two", tags=["work"], session="t")
        service.add(ALICE, "tea three", type="document", origin={"cube": "books"})
        assert texts(service.search(ALICE, "tea", tags=["work", "drink"])) == ["tea one"]
        assert texts(service.search(ALICE, "tea", tag="work", session="t")) == ["tea two"]
        assert texts(service.search(ALICE, "tea", cube="books")) == ["tea three"]
        assert texts(service.search(ALICE, "tea", tag="work", type="document")) == NOT_FOUND

    def test_time(self, service: MemoryService, clock: Clock) -> None:
        service.add(ALICE, "tea early")
        clock.forward(60)
        middle = clock.now
        service.add(ALICE, "tea late")
        assert texts(service.search(ALICE, "tea", said_from=middle)) == ["tea late"]
        assert texts(service.search(ALICE, "tea", said_before=middle)) == ["tea early"]

    def test_a_word_is_no_label(self, service: MemoryService) -> None:
        service.add(ALICE, "fact type session work")
        service.add(ALICE, "other", tags=["work"])
        assert texts(service.search(ALICE, "work")) == ["fact type session work"]

    def test_what_has_expired_is_not_found(self, service: MemoryService, clock: Clock) -> None:
        service.add(ALICE, "tea", ttl_s=60)
        clock.forward(59)
        assert len(service.search(ALICE, "tea")) == 1
        clock.forward(2)
        assert service.search(ALICE, "tea") == []

    def test_a_sensitive_memory_goes_into_no_prompt(self, make: Callable[..., MemoryService]) -> None:
        service = make(long_lived_tokens=0)
        service.add(ALICE, "tea", sensitivity="sensitive")
        assert len(service.search(ALICE, "tea")) == 1
        assert service.recall(ALICE, says("tea")).late == ()

    def test_a_budget_in_tokens(self, service: MemoryService) -> None:
        service.add(ALICE, "tea " * 9)
        service.add(ALICE, "tea and much else besides")
        assert texts(service.search(ALICE, "tea", max_tokens=5)) == ["tea and much else besides"]
        assert service.search(ALICE, "tea", max_tokens=0) == []


def test_what_a_hit_is_linked_with_is_found_behind_it(service: MemoryService, clock: Clock) -> None:
    tea, shop = service.add(ALICE, "I buy tea"), service.add(ALICE, "The shop is in Kew Road")
    service.life.link(ALICE, tea.id, shop.id, type="bought_at")
    found = service.search(ALICE, "tea")
    assert texts(found) == ["I buy tea", "The shop is in Kew Road"]
    assert found[1].score == pytest.approx(found[0].score / 2)
    assert found[1].why["retrievers"]["link"] == {"from": tea.id, "type": "bought_at"}
    assert texts(service.search(ALICE, "tea", top_k=1)) == ["I buy tea"]
    assert texts(service.search(ALICE, "tea", said_before=clock.now - timedelta(1))) == NOT_FOUND


def test_a_link_leads_nowhere_once_it_is_over_or_to_what_the_filter_keeps_out(
    service: MemoryService, clock: Clock
) -> None:
    tea, shop = service.add(ALICE, "I buy tea", tags=["mine"]), service.add(ALICE, "The shop is in Kew Road")
    service.life.link(ALICE, tea.id, shop.id, type="bought_at", valid_to=clock.now + timedelta(1))
    assert len(service.search(ALICE, "tea")) == 2
    assert texts(service.search(ALICE, "tea", tag="mine")) == ["I buy tea"]
    clock.forward(90_000)
    assert texts(service.search(ALICE, "tea")) == ["I buy tea"]


def test_gaps_are_closed_and_nothing_moves(make: Callable[..., MemoryService]) -> None:
    service = make()
    service.add_many(
        ALICE,
        [
            {"text": f"tea number {number}", "session": str(number % 3), "tags": [str(number % 2)]}
            for number in range(200)
        ],
    )
    service.search(ALICE, "tea")
    for record in service.list(ALICE, limit=200).records[::-1]:
        service.update(ALICE, record.id, pinned=True)
        if record.text.endswith("7"):
            service.delete(ALICE, record.id)
    arguments = {"query": "tea 150 number", "top_k": 200, "tag": "0", "context": 1}
    followed = service.search(ALICE, **arguments)  # type: ignore[arg-type]
    with service._store.read(ALICE) as user, service._indexes.current(user) as index:
        assert index._lexical.num_slots <= len(index) + 11  # of what was changed after the last deletion
        pinned = index.pinned()
        built = UserIndex()
        built.catch_up(user)
        assert built.pinned() == pinned == sorted(pinned)
    service._indexes = service._retrieval._indexes = Indexes()
    again = service.search(ALICE, **arguments)  # type: ignore[arg-type]
    assert [(hit.record.id, hit.before, hit.after) for hit in again] == [
        (hit.record.id, hit.before, hit.after) for hit in followed
    ]
    assert [hit.score for hit in again] == pytest.approx([hit.score for hit in followed], rel=1e-4)
