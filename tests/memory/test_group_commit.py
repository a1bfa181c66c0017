"""Writes at the same time share one commit, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.errors import NotFound, RequestError, StoreError, StoreFull
from memos_vllm.memory import removal
from memos_vllm.memory import store as store_module
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB, make_service, texts

MIB = 2**20


def last_commit(store: MemoryStore) -> int:
    return store.stamp()


def together(store: MemoryStore, writes: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs the writes in one group: they queue up behind a write that waits for them. Results or errors."""
    outcomes: list[Any] = [None] * len(writes)
    leads, queued = threading.Event(), threading.Event()

    def lead(user: Any) -> None:
        leads.set()
        assert queued.wait(60)

    def follow(place: int) -> None:
        try:
            outcomes[place] = writes[place]()
        except BaseException as error:
            outcomes[place] = error

    leader = threading.Thread(target=store.write, args=(Principal("leader", ""), lead))
    leader.start()
    assert leads.wait(60)
    followers = []
    for place in range(len(writes)):
        followers.append(threading.Thread(target=follow, args=(place,)))
        followers[-1].start()
        while len(store._writes._queue) <= place:  # queued in order
            assert followers[-1].is_alive()
    queued.set()
    for thread in [leader, *followers]:
        thread.join()
    return outcomes


def test_a_group_is_one_commit(service: MemoryService) -> None:
    first = last_commit(service._store)
    records = together(service._store, [lambda i=i: service.add((ALICE, BOB)[i % 2], f"tea {i}") for i in range(20)])
    assert last_commit(service._store) == first + 2, "the leader's and the group's"
    assert [record.text for record in records] == [f"tea {i}" for i in range(20)]
    assert texts(service.list(ALICE).records) == [f"tea {i}" for i in range(0, 20, 2)]
    assert texts(service.list(BOB).records) == [f"tea {i}" for i in range(1, 20, 2)]


def test_an_error_takes_back_its_own_write_alone(service: MemoryService) -> None:
    known = service.add(ALICE, "known")

    def half(user: Any) -> None:
        user.insert(service._now(), text="half", type="fact", pinned=False, tags=(), session=None)
        removal.remove(user, known.id)
        raise KeyError("in the middle")

    before, failed, unknown, after = together(
        service._store,
        [
            lambda: service.add(ALICE, "before"),
            lambda: service._store.write(ALICE, half),
            lambda: service.delete(ALICE, "unknown"),
            lambda: service.add(ALICE, "after"),
        ],
    )
    assert isinstance(failed, KeyError) and isinstance(unknown, NotFound)
    assert service.list(ALICE).records == (known, before, after)
    assert texts(service.search(ALICE, "known before half after")) != []
    assert service.kv_epoch(ALICE) == 0


def test_the_map_grows_within_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FIRST_MAP_BYTES", MIB)
    service = make_service(tmp_path)
    records = together(service._store, [lambda i=i: service.add(ALICE, str(i) * MIB) for i in range(5)])
    assert service.list(ALICE).records == tuple(records)
    service._store.close()


def test_what_does_not_fit_fails_alone(tmp_path: Path) -> None:
    service = make_service(tmp_path, max_map_bytes=MIB)
    small, large, other = together(
        service._store,
        [lambda: service.add(ALICE, "small"), lambda: service.add(ALICE, "x" * MIB), lambda: service.add(BOB, "other")],
    )
    assert isinstance(large, StoreFull)
    assert service.list(ALICE).records == (small,) and service.list(BOB).records == (other,)
    service._store.close()


def test_a_group_whose_commit_fails_is_tried_one_by_one(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(group: object) -> None:
        raise StoreError("together")

    monkeypatch.setattr(service._store, "_commit_together", refuse)
    outcomes = together(service._store, [lambda: service.add(ALICE, "tea"), lambda: service.add(ALICE, "milk")])
    assert service.list(ALICE).records == tuple(outcomes)


def test_an_interrupted_leader_leaves_nobody_waiting(service: MemoryService) -> None:
    def interrupted(user: Any) -> None:
        raise KeyboardInterrupt

    stopped, other = together(
        service._store, [lambda: service._store.write(ALICE, interrupted), lambda: service.add(ALICE, "tea")]
    )
    assert {type(stopped), type(other)} <= {KeyboardInterrupt, StoreError}
    assert service.list(ALICE).records == ()
    service.add(ALICE, "goes on")


class TestBatch:
    def test_is_one_commit_in_its_order(self, service: MemoryService) -> None:
        first = last_commit(service._store)
        records = service.add_many(ALICE, [{"text": f"tea {i}", "tags": ["t"]} for i in range(300)])
        assert last_commit(service._store) == first + 1
        assert service.list(ALICE, limit=1000, tag="t").records == tuple(records)
        assert sorted(record.id for record in records) == [record.id for record in records]

    @pytest.mark.parametrize(
        ("memories", "words"),
        [
            ([{"text": "a"}, {"text": " "}], r"memories\[1\]: 'text' is empty"),
            ([{"text": "a"}, {}], r"memories\[1\]: 'text'"),
            ([{"text": "a", "colour": "red"}], r"memories\[0\]: unknown field 'colour'"),
            ([{"text": "a", "origin": "x"}], r"memories\[0\]: 'origin'"),
            (["a"], r"memories\[0\] must be an object"),
            ("abc", "must be a list"),
            ({"text": "a"}, "must be a list"),
            ([{"text": "a"}] * 10_001, "split the batch"),
            ([{"text": "x" * MIB}] * 65, "split the batch"),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_is_stored_whole_or_not_at_all(self, service: MemoryService, memories: Any, words: str) -> None:
        with pytest.raises(RequestError, match=words):
            service.add_many(ALICE, memories)
        assert service.stats()["memories"] == 0

    def test_of_nothing(self, service: MemoryService) -> None:
        assert service.add_many(ALICE, []) == []
