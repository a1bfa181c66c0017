"""What a user has is counted with every write, in both engines, and does not exceed what he may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from memos_vllm.errors import Conflict, LimitReached, RequestError
from memos_vllm.memory import holdings, maintenance, recount, tables
from memos_vllm.memory.holdings import Holdings
from memos_vllm.memory.limits import UserLimits
from memos_vllm.memory.refining import Outcome
from memos_vllm.memory.service import MemoryService
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB, Clock, says, texts

Make = Callable[..., MemoryService]


def counted_anew(service: MemoryService) -> dict[Principal, tuple[int, int]]:
    held, names = service._store.examine(recount.count)
    return {who: (held[owner].memories, held[owner].size_bytes) for owner, who in names.items()}


def kept(service: MemoryService) -> dict[Principal, tuple[int, int]]:
    return {who: (held.memories, held.size_bytes) for who, held in service.users().users}


def everything_that_writes(service: MemoryService) -> list[Callable[[], Any]]:
    """Each a step of one story; what they leave behind differs in every counted table."""
    ids: list[str] = []
    snapshot: list[str] = []

    def add() -> None:
        ids.extend(record.id for record in service.add_many(ALICE, [{"text": f"note {n}"} for n in range(6)]))

    def take() -> None:
        snapshot.append(service.life.take_snapshot(ALICE, "then").id)

    def link() -> None:
        made = service.life.link(ALICE, ids[0], ids[1], "part_of")
        service.life.end_link(ALICE, made.id)
        service.life.link(ALICE, ids[1], ids[2], "part_of")

    return [
        add,
        take,
        link,
        lambda: service.add(BOB, "of Bob"),
        lambda: service.update(ALICE, ids[0], text="a longer text than before"),
        lambda: service.update(ALICE, ids[0], text="short", pinned=True),
        lambda: service.remember(ALICE, says("My job is baker.")),
        lambda: service.remember(ALICE, says("My job is baker.")),
        lambda: service.remember(ALICE, says("My job is pilot. I like green tea. I like green tea.")),
        lambda: service.life.merge(ALICE, ids[1], [ids[2]]),
        lambda: service.life.used(ALICE, {"late": ids[:2]}),
        lambda: service.recall(ALICE, says("note"), session="s"),
        lambda: service.documents.put(ALICE, "a.txt", b"one paragraph\n\nand another", "text/plain"),
        lambda: service.documents.put(ALICE, "a.txt", b"one paragraph\n\nand a third", "text/plain"),
        lambda: service.life.roll_back(ALICE, snapshot[0]),
        lambda: service.delete(ALICE, ids[1]),
        lambda: service.documents.delete(ALICE, "a.txt"),
        lambda: service.life.end_link(ALICE, service.life.link(ALICE, ids[0], ids[3], "x").id, remove=True),
        lambda: service.life.remove_snapshot(ALICE, snapshot[0]),
        lambda: service.life.set_state(ALICE, ids[4], "archived"),
    ]


def test_what_is_counted_is_what_is_there_after_every_kind_of_write(service: MemoryService) -> None:
    for step in everything_that_writes(service):
        step()
        assert kept(service) == counted_anew(service)
    assert kept(service)[BOB] == (1, kept(service)[BOB][1])
    assert maintenance.examine_open(service._store).problems == []


def test_a_write_that_is_taken_back_counts_nothing(service: MemoryService) -> None:
    first = service.add(ALICE, "one")
    service.life.set_state(ALICE, first.id, "frozen")
    with pytest.raises(Conflict):
        service.update(ALICE, first.id, text="two")
    with pytest.raises(RequestError):
        service.add_many(ALICE, [{"text": "two"}, {"text": ""}])

    def fails(user: Any) -> None:
        user.insert(Clock()(), text="x", type="fact", pinned=False, tags=(), session=None)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        service._store.write(ALICE, fails)
    assert {who: number for who, (number, _) in kept(service).items()} == {ALICE: 1}
    assert kept(service) == counted_anew(service)


def test_who_is_deleted_is_not_listed_and_leaves_no_name(service: MemoryService) -> None:
    for step in everything_that_writes(service):
        step()
    service.delete_all(ALICE)
    assert service.holdings(ALICE) == Holdings()
    assert [who for who, _ in service.users().users] == [BOB]
    names = service._store.examine(lambda txn, dbs: [bytes(raw) for _, raw in txn.cursor(db=dbs["users"])])
    assert len(names) == 1 and b"alice" not in names[0]
    assert maintenance.examine_open(service._store).problems == []
    service.add(ALICE, "back again")
    assert kept(service) == counted_anew(service) and service.holdings(ALICE).memories == 1


def test_who_has_snapshots_alone_is_never_counted_below_nothing(service: MemoryService) -> None:
    """A store of before it was counted names him by his records alone; and any count may be wrong."""
    for count in (None, b"?"):
        record = service.add(ALICE, "one")
        snapshot = service.life.take_snapshot(ALICE, "then")
        service.delete(ALICE, record.id)

        def forget_the_count(user: Any, count: bytes | None = count) -> None:
            key = holdings.key_of(ALICE, user._owner.prefix)
            user._txn.delete(key, db=user._dbs["users"])
            if count is not None:
                user._txn.put(key, count, db=user._dbs["users"])

        service._store.write(ALICE, forget_the_count)
        service.life.remove_snapshot(ALICE, snapshot.id)
        assert service.holdings(ALICE) == Holdings() and kept(service) == {}
        if count is not None:
            service._store.write(ALICE, forget_the_count)
        service.delete_all(ALICE)
        assert service._store.examine(lambda txn, dbs: list(txn.cursor(db=dbs["users"]))) == []


def test_who_is_deleted_leaves_no_name_although_more_was_counted_than_there_was(service: MemoryService) -> None:
    service.add(ALICE, "one")

    def count_too_much(user: Any) -> None:
        key = holdings.key_of(ALICE, user._owner.prefix)
        user._txn.put(key, holdings.encode(ALICE, Holdings(9, 9999)), db=user._dbs["users"])

    service._store.write(ALICE, count_too_much)
    service.delete_all(ALICE)
    assert service._store.examine(lambda txn, dbs: list(txn.cursor(db=dbs["users"]))) == []


def test_time_that_moves_memories_is_no_use(make: Make, clock: Clock) -> None:
    service = make()
    began = clock.now
    service.add(ALICE, "soon over", ttl_s=5)
    clock.forward(60)
    assert service.life.tend().expired == 1
    assert service.holdings(ALICE).last_used_at == began
    clock.forward(31 * 86400)
    assert service.life.tend().removed == 1
    assert service.users().users == ()


def test_more_memories_than_allowed_are_refused_as_a_whole(make: Make) -> None:
    service = make(max_user_memories=3)
    service.add_many(ALICE, [{"text": "one"}, {"text": "two"}])
    with pytest.raises(LimitReached, match=r"4 memories, more than memory.max_user_memories \(3\)") as refused:
        service.add_many(ALICE, [{"text": "three"}, {"text": "four"}])
    assert refused.value.status == 409 and "/v1/memories/usage" in str(refused.value)
    assert texts(service.list(ALICE).records) == ["one", "two"]
    third = service.add(ALICE, "three")
    with pytest.raises(LimitReached):
        service.add(ALICE, "four")
    service.add(BOB, "another user is not concerned")
    service.update(ALICE, third.id, text="3")
    service.delete(ALICE, third.id)
    service.add(ALICE, "four")
    assert service.holdings(ALICE).memories == 3


def test_bytes_count_the_history_too(make: Make) -> None:
    service = make(max_user_bytes=20_000)
    memory = service.add(ALICE, "x" * 5_000)
    service.update(ALICE, memory.id, text="y" * 5_000)
    service.update(ALICE, memory.id, text="z" * 5_000)
    with pytest.raises(LimitReached, match=r"bytes .* more than memory.max_user_bytes \(20000\)"):
        service.update(ALICE, memory.id, text="w" * 5_000)
    assert service.get(ALICE, memory.id).text == "z" * 5_000
    small = service.add(ALICE, "small")
    with pytest.raises(LimitReached):
        for _ in range(1000):
            service.life.link(ALICE, memory.id, small.id, "part_of")
    with pytest.raises(LimitReached):
        for number in range(100):
            service.life.take_snapshot(ALICE, f"snapshot {number}")
    assert service.holdings(ALICE).size_bytes <= 20_000
    service.life.set_state(ALICE, memory.id, "archived")
    service.delete(ALICE, memory.id)
    service.add(ALICE, "x" * 5_000)


def test_a_document_that_does_not_fit_leaves_the_edition_that_is_there(make: Make) -> None:
    service = make(max_user_memories=4)
    edition = lambda *words: "\n\n".join(f"{word} " * 100 for word in words).encode()  # noqa: E731
    service.documents.put(ALICE, "a.txt", edition("one", "two", "three"), "text/plain")
    before = service.documents.get(ALICE, "a.txt")[1]
    for much in (edition("one", "four", "five", "six"), edition("one", "two", "three", "four", "five")):
        with pytest.raises(LimitReached):
            service.documents.put(ALICE, "a.txt", much, "text/plain")
        assert service.documents.get(ALICE, "a.txt")[1] == before
    with pytest.raises(LimitReached):
        service.documents.put(ALICE, "b.txt", edition("a", "b"), "text/plain")
    assert service.documents.names(ALICE) == ["a.txt"]
    assert maintenance.examine_open(service._store).problems == []


def test_a_rollback_beyond_the_limit_changes_nothing(make: Make) -> None:
    service = make()
    memory = service.add(ALICE, "x" * 1000)
    then = service.life.take_snapshot(ALICE, "then")
    service.update(ALICE, memory.id, text="y" * 1000)
    held = service.holdings(ALICE)
    service._store.close()
    limited = make(max_user_bytes=held.size_bytes + 100)
    with pytest.raises(LimitReached):
        limited.life.roll_back(ALICE, then.id)
    assert limited.get(ALICE, memory.id).text == "y" * 1000


def test_what_is_over_a_lowered_limit_can_be_used_and_reduced(make: Make) -> None:
    service = make()
    ids = [record.id for record in service.add_many(ALICE, [{"text": f"note {n}"} for n in range(5)])]
    service._store.close()
    lowered = make(max_user_memories=2)
    assert len(lowered.search(ALICE, "note")) == 5
    lowered.recall(ALICE, says("note"), session="s")
    lowered.life.used(ALICE, {"late": ids})
    lowered.update(ALICE, ids[0], text="changed")
    assert lowered.remember(ALICE, says("What is a note?")) == []
    with pytest.raises(LimitReached):
        lowered.remember(ALICE, says("My job is baker."))
    for memory_id in ids[:4]:
        lowered.delete(ALICE, memory_id)
    assert texts(lowered.remember(ALICE, says("My job is baker."))) == ["My job is baker."]


def test_what_is_known_already_is_remembered_at_the_limit(make: Make) -> None:
    service = make(max_user_memories=1)
    first = service.remember(ALICE, says("My job is baker."))[0]
    again = service.remember(ALICE, says("My job is baker."))[0]
    assert (again.id, again.uses) == (first.id, 2)
    with pytest.raises(LimitReached):
        service.remember(ALICE, says("My job is pilot."))
    assert texts(service.list(ALICE).records) == ["My job is baker."], "not superseded by what was not stored"


def test_what_is_said_again_counts_although_it_takes_some_bytes(make: Make) -> None:
    service = make(max_user_bytes=1)
    service.limits = UserLimits()
    service.remember(ALICE, says("My job is baker."))
    service.limits = UserLimits(size_bytes=1)
    before = service.holdings(ALICE).size_bytes
    assert service.remember(ALICE, says("My job is baker."))[0].uses == 2
    assert service.holdings(ALICE).size_bytes > before, "else this tests nothing"
    with pytest.raises(LimitReached):
        service.remember(ALICE, says("I like tea."))


def test_over_the_limit_a_memory_can_still_be_hidden_ended_and_unpinned_once(make: Make) -> None:
    service = make()
    kept = service.add(ALICE, "my address", pinned=True).id
    service.limits = UserLimits(size_bytes=1)
    for changes in ({"tags": ["a"]}, {"text": "another"}, {"pinned": False, "priority": 1}):
        with pytest.raises(LimitReached):
            service.update(ALICE, kept, **changes)
    for changes in ({"pinned": True}, {}):  # as it is already
        assert service.update(ALICE, kept, **changes).version == 1
    for changes in ({"pinned": False}, {"sensitivity": "sensitive"}, {"ttl_s": 60.0}):
        changed, held = service.update(ALICE, kept, **changes), service.holdings(ALICE)
        assert service.update(ALICE, kept, **changes) == changed
        assert service.holdings(ALICE) == held
    for changes in ({"pinned": True}, {"sensitivity": "normal"}, {"ttl_s": None}, {"ttl_s": 30.0}):
        with pytest.raises(LimitReached):
            service.update(ALICE, kept, **changes)


STATEMENT = {"sources": [1], "text": "My job is baker.", "type": "profile", "keys": [], "valid_from": None}


def test_the_refiner_asks_nothing_about_who_has_no_room(make: Make) -> None:
    service = make(max_user_memories=1, refiner={"enabled": True})
    service.remember(ALICE, says("My job is baker in the old town, and has been for years."))
    batch = service.refining.next_batch()
    assert batch is not None and not batch.notes and len(batch.left_out) == 1
    assert not service.refining.finish(batch, "", "model")
    assert service.refining.next_batch() is None


def test_the_refiner_adds_nothing_to_what_is_full_meanwhile(make: Make) -> None:
    service = make(max_user_memories=2, refiner={"enabled": True})
    service.remember(ALICE, says("My job is baker in the old town, and has been for years."))
    batch = service.refining.next_batch()
    assert batch is not None and len(batch.notes) == 1
    service.add(ALICE, "Something else.")
    unlike = {**STATEMENT, "text": "The moon is a cheese."}
    outcomes = service.refining.finish(batch, json.dumps({"statements": [STATEMENT, unlike]}), "model")
    assert outcomes == {Outcome.NO_ROOM: 1, Outcome.UNGROUNDED: 1} and service.holdings(ALICE).memories == 2
    assert service.refining.next_batch() is None


def test_users_are_listed_page_by_page_and_each_once(service: MemoryService) -> None:
    shop = [Principal("shop", f"user {number}") for number in range(7)]
    others = [Principal("acme", "x"), Principal("zoo", "y")]
    for who in (*shop, *others):
        service.add(who, "text")

    def pages(tenant: str | None, limit: int, between: Callable[[], Any] = lambda: None) -> list[Principal]:
        listed, after = [], None
        while True:
            page = service.users(tenant=tenant, limit=limit, after=after)
            assert len(page.users) <= limit
            listed += [who for who, _ in page.users]
            assert len(listed) < 100, "it ends"
            if (after := page.next) is None:
                return listed
            between()

    for limit in (1, 3, 7, 8, 100):
        assert pages("shop", limit) == shop
        assert sorted(pages(None, limit), key=str) == sorted([*shop, *others], key=str)
    assert pages("nobody", 10) == []
    new = iter(Principal("shop", f"new {number}") for number in range(100))

    def change() -> None:
        service.add(shop[0], "more")
        service.add(next(new), "text")
        service.delete_all(shop[6])

    listed = pages("shop", 2, change)
    assert [who for who in listed if who in shop] == shop[:6] and len(set(listed)) == len(listed)
    for wrong in ("", "zz", "00", "é"):
        with pytest.raises(RequestError, match="'after'"):
            service.users(after=wrong)
    with pytest.raises(RequestError, match="'limit'"):
        service.users(limit=0)


def test_an_earlier_store_is_counted_when_it_is_opened(make: Make, clock: Clock) -> None:
    service = make()
    for step in everything_that_writes(service):
        step()
    right = service.users()

    def back_to_4(txn: Any, dbs: Any) -> None:
        for key in list(txn.cursor(db=dbs["users"]).iternext(values=False)):
            txn.delete(key, db=dbs["users"])
        txn.put(b"schema_version", b"4", db=dbs["meta"])

    service._store.maintain(back_to_4)
    service._store.close()
    migrated = make()
    assert kept(migrated) == counted_anew(migrated)
    assert {who: (held.memories, held.size_bytes) for who, held in right.users} == kept(migrated)
    assert all(held.last_used_at == clock.now for _, held in migrated.users().users)
    assert maintenance.examine_open(migrated._store).problems == []


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda raw: None,
    "no JSON": lambda raw: raw[:5],
    "of another shape": lambda raw: b"7",
    "wrong": lambda raw: holdings.encode(ALICE, Holdings(77, 1)),
    "of another user": lambda raw: holdings.encode(Principal("acme", "carol"), Holdings(1, 1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_doctor_counts_anew_what_is_damaged(service: MemoryService, damage: str, tmp_path: Any) -> None:
    service.add(ALICE, "one")
    right = kept(service)

    def spoil(txn: Any, dbs: Any) -> None:
        (key,) = txn.cursor(db=dbs["users"]).iternext(values=False)
        value = DAMAGES[damage](txn.get(key, db=dbs["users"]))
        txn.delete(key, db=dbs["users"])
        if value is not None:
            txn.put(key, value, db=dbs["users"])

    service._store.maintain(spoil)
    assert {problem.table for problem in maintenance.examine_open(service._store).problems} == {"users"}
    mended, left = maintenance.repair_open(service._store, tmp_path)
    assert mended and left.problems == [] and kept(service) == right
    service._store.maintain(spoil)
    service.add(ALICE, "two")  # a wrong count stops no write
    assert maintenance.repair_open(service._store, tmp_path)[1].problems == []
    assert kept(service) == counted_anew(service) and kept(service)[ALICE][0] == 2


def test_an_entry_of_nobody_is_taken_out(service: MemoryService, tmp_path: Any) -> None:
    service.add(ALICE, "one")
    nobody = Principal("acme", "nobody")
    entry = holdings.key_of(nobody, tables.number_key(99)), holdings.encode(nobody, Holdings(1, 1))
    service._store.maintain(lambda txn, dbs: txn.put(*entry, db=dbs["users"]))
    mended, left = maintenance.repair_open(service._store, tmp_path)
    assert [problem.text for problem in mended] == ["belongs to no user"] and left.problems == []
    assert set(kept(service)) == {ALICE}
