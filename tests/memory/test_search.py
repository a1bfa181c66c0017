"""Search: BM25 end to end, and an index that follows the change log."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from memos_vllm.errors import RequestError
from memos_vllm.memory import indexes as indexes_module
from memos_vllm.memory import tables
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, BOB, texts


def test_scores_are_bm25(service: MemoryService) -> None:
    service.add(ALICE, "green tea tea")
    service.add(ALICE, "black coffee")
    (hit,) = service.search(ALICE, "tea")
    idf = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 2 * 2.2 / (2 + 1.2 * (1 - 0.75 + 0.75 * 3 / 2.5))
    assert hit.score == pytest.approx(expected)
    assert hit.why == {
        "method": "bm25",
        "retrievers": {"lexical": {"rank": 1, "score": pytest.approx(expected)}},
        "terms": {"tea": pytest.approx(expected)},
    }


def test_finds_by_stem_and_ranks_by_relevance(service: MemoryService) -> None:
    for text in ("I like tea.", "My favourite drink is oolong tea.", "I have a cat."):
        service.add(ALICE, text)
    assert (
        texts(service.search(ALICE, "What drinks are favourites, like tea?"))[0] == "My favourite drink is oolong tea."
    )


def test_no_shared_term_finds_nothing(service: MemoryService) -> None:
    service.add(ALICE, "My favourite drink is oolong tea.")
    assert service.search(ALICE, "what is my") == []
    assert service.search(ALICE, "quantum") == []
    assert service.search(ALICE, "") == []


def test_finds_chinese(service: MemoryService) -> None:
    service.add(ALICE, "我最喜欢的饮料是乌龙茶。")
    service.add(ALICE, "我住在上海。")
    assert texts(service.search(ALICE, "乌龙茶")) == ["我最喜欢的饮料是乌龙茶。"]
    assert texts(service.search(ALICE, "茶")) == ["我最喜欢的饮料是乌龙茶。"]


def test_equal_scores_give_the_newest_first_and_top_k_cuts(service: MemoryService) -> None:
    for _ in range(3):
        service.add(ALICE, "tea")
    newest_first = [record.id for record in service.list(ALICE).records][::-1]
    assert [hit.record.id for hit in service.search(ALICE, "tea", top_k=2)] == newest_first[:2]


def test_filters(service: MemoryService) -> None:
    service.add(ALICE, "tea one", type="document", tags=["work"])
    service.add(ALICE, "tea two", tags=["home"])
    assert texts(service.search(ALICE, "tea", type="document")) == ["tea one"]
    assert texts(service.search(ALICE, "tea", tag="home")) == ["tea two"]
    assert service.search(ALICE, "tea", tag="none") == []


def test_follows_every_kind_of_change(service: MemoryService) -> None:
    def found() -> list[str]:
        return sorted(texts(service.search(ALICE, "tea coffee")))

    first = service.add(ALICE, "green tea")
    assert found() == ["green tea"]
    second = service.add(ALICE, "black tea")
    assert found() == ["black tea", "green tea"]
    service.update(ALICE, first.id, text="strong coffee")
    assert found() == ["black tea", "strong coffee"]
    service.delete(ALICE, second.id)
    assert found() == ["strong coffee"]
    service.delete_all(ALICE)
    assert found() == []
    service.add(ALICE, "white tea")
    assert found() == ["white tea"]


def test_a_followed_index_equals_a_built_one(make: Callable[..., MemoryService]) -> None:
    service = make()
    ids = []
    for i in range(30):
        ids.append(service.add(ALICE, f"tea number {i} {'cat ' * (i % 3)}", tags=[str(i % 2)]).id)
        if i % 4 == 0:
            service.update(ALICE, ids[-1], text=f"changed cat {i}", pinned=i % 8 == 0)
        if i % 7 == 6:
            service.delete(ALICE, ids[i - 1])
        followed = service.search(ALICE, "tea cat changed", top_k=100)
    service._indexes = indexes_module.Indexes()
    assert service.search(ALICE, "tea cat changed", top_k=100) == followed


def test_an_index_that_fell_behind_the_log_is_rebuilt(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CHANGES_KEPT", 5)
    gone = service.add(ALICE, "tea gone")
    service.search(ALICE, "tea")
    service.delete(ALICE, gone.id)
    for i in range(10):
        service.add(ALICE, f"tea {i}")
    assert len(service.search(ALICE, "tea", top_k=50)) == 10
    assert service._store.examine(lambda txn, dbs: len(list(txn.cursor(db=dbs["changes"])))) == 5


def test_only_the_last_users_indexes_are_held(service: MemoryService) -> None:
    service._indexes = indexes_module.Indexes(max_users=1)
    service.add(ALICE, "tea")
    service.add(BOB, "tea")
    for who in (ALICE, BOB, ALICE):
        assert texts(service.search(who, "tea")) == ["tea"]
        assert service.stats()["indexed_users"] == 1


def test_an_old_memory_that_came_back_keeps_its_place(service: MemoryService) -> None:
    first, middle, last = (service.add(ALICE, "tea").id for _ in range(3))
    service.life.merge(ALICE, last, [middle])
    assert [hit.record.id for hit in service.search(ALICE, "tea")] == [last, first]
    service.life.set_state(ALICE, middle, "activated")
    assert [hit.record.id for hit in service.search(ALICE, "tea")] == [last, middle, first]


def test_the_indexes_held_have_a_limit_in_memories(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes_module, "MAX_INDEXED_MEMORIES", 3)
    for who in (ALICE, BOB):
        service.add_many(who, [{"text": "tea"}] * 4)
    for who in (ALICE, BOB):
        assert len(service.search(who, "tea")) == 4
    service.search(BOB, "tea")
    assert service.stats()["indexed_users"] == 1


def test_of_a_huge_query_beginning_and_end_count(service: MemoryService) -> None:
    for text in ("tea", "milk", "water"):
        service.add(ALICE, text)
    filler = "coffee " * 100_000
    assert sorted(texts(service.search(ALICE, f"milk {filler} water {filler} tea"))) == ["milk", "tea"]


@pytest.mark.parametrize("arguments", [{"query": 5}, {"query": "x", "top_k": 0}, {"query": "x", "type": "song"}])
def test_bad_input(service: MemoryService, arguments: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        service.search(ALICE, **arguments)  # type: ignore[arg-type]
