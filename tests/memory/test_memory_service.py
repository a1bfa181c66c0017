"""The memory service: what a user adds, reads, changes and deletes, and what others cannot."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.errors import NotFound, RequestError
from memos_vllm.memory import records, sessions, tables
from memos_vllm.memory.service import MemoryService, estimate_tokens
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB, Clock, says, texts

Make = Callable[..., MemoryService]


def test_a_record_holds_what_was_given(service: MemoryService, clock: Clock) -> None:
    origin = {"source": "api", "nested": [1, None]}
    added = service.add(ALICE, " tea\n", type="profile", pinned=True, tags=["a", "b", "a"], session="s", origin=origin)
    read = service.get(ALICE, added.id)
    assert read == added
    assert (read.text, read.type, read.pinned, read.tags, read.session) == (" tea\n", "profile", True, ("a", "b"), "s")
    assert (read.tenant, read.user, read.version, read.created_at, read.origin) == (
        "acme",
        "alice",
        1,
        clock.now,
        origin,
    )
    assert json.loads(json.dumps(read.as_json()))["tags"] == ["a", "b"]


def test_add_stores_what_it_is_told(service: MemoryService) -> None:
    for text in ("My name is Ann.", "My name is Ann.", "My name is Eve."):
        service.add(ALICE, text)
    assert len(service.list(ALICE).records) == 3


@given(st.text(min_size=1).filter(str.strip))
def test_any_text_comes_back(text: str) -> None:
    record = records.MemoryRecord(
        records.MemoryId("x"), "t", "u", "fact", text, False, (text,), None, records.utc_now(), records.utc_now()
    )
    assert records.decode(records.encode(record)) == record


class TestIds:
    def test_grow_even_if_the_clock_goes_backwards(self, service: MemoryService, clock: Clock) -> None:
        ids = []
        for step in (0, 5, -1000, 0, 0, -10_000_000, 1):
            clock.forward(step)
            ids.append(service.add(ALICE, "tea").id)
        assert ids == sorted(set(ids))
        assert [record.id for record in service.list(ALICE).records] == ids

    def test_never_come_back(self, service: MemoryService, clock: Clock) -> None:
        gone = service.add(ALICE, "tea").id
        service.delete_all(ALICE)
        clock.forward(-10_000_000)
        assert service.add(ALICE, "tea").id > gone

    @given(st.integers(0, 2**48 - 1), st.integers(0, 2**74 - 2), st.datetimes(records.datetime(1971, 1, 1)))
    def test_are_version_7_and_above_the_last(self, time: int, rest: int, now: records.datetime) -> None:
        last = uuid.UUID(int=time << 80 | 7 << 76 | (rest >> 62) << 64 | 2 << 62 | rest & (1 << 62) - 1)
        new = records.next_id(last, now)
        assert new > last
        assert (new.version, new.variant) == (7, uuid.RFC_4122)


class TestList:
    def test_pages(self, service: MemoryService) -> None:
        for number in range(7):
            service.add(ALICE, f"tea {number}")
        pages, after = [], None
        while True:
            page = service.list(ALICE, limit=3, after=after)
            pages.append(texts(page.records))
            if (after := page.next) is None:
                break
        assert pages == [["tea 0", "tea 1", "tea 2"], ["tea 3", "tea 4", "tea 5"], ["tea 6"]]

    def test_a_full_last_page_has_no_next(self, service: MemoryService) -> None:
        service.add(ALICE, "tea")
        assert service.list(ALICE, limit=1).next is None

    def test_what_is_superseded_is_left_out_in_every_state(self, service: MemoryService) -> None:
        (old,) = service.remember(ALICE, says("My job is baker."))
        service.life.used(ALICE, {"late": [old.id]})
        (new,) = service.remember(ALICE, says("My job is pilot."))
        service.life.used(ALICE, {"late": [new.id]})
        assert texts(service.list(ALICE, state="activated").records) == [new.text]
        everything = service.list(ALICE, state="activated", include_superseded=True).records
        assert texts(everything) == [old.text, new.text]

    def test_what_is_over_is_listed_by_its_state(self, service: MemoryService, clock: Clock) -> None:
        kept, merged = service.add(ALICE, "tea"), service.add(ALICE, "green tea")
        service.life.merge(ALICE, kept.id, [merged.id], None)
        service.add(ALICE, "milk", ttl_s=1)
        clock.forward(2)
        service.life.tend()
        assert texts(service.list(ALICE).records) == ["tea"]
        assert texts(service.list(ALICE, state="merged").records) == ["green tea"]
        assert texts(service.list(ALICE, state="expired").records) == ["milk"]
        assert len(service.list(ALICE, include_superseded=True).records) == 3

    def test_filters(self, service: MemoryService) -> None:
        service.add(ALICE, "one", type="tool_schema", tags=["x"], session="s")
        service.add(ALICE, "two")
        assert texts(service.list(ALICE, type="tool_schema").records) == ["one"]
        assert texts(service.list(ALICE, tag="x").records) == ["one"]
        assert texts(service.list(ALICE, session="s").records) == ["one"]
        assert texts(service.list(ALICE, type="working").records) == []


class TestUpdate:
    def test_makes_a_version_and_keeps_the_old_one(self, service: MemoryService, clock: Clock) -> None:
        old = service.add(ALICE, "tea", tags=["a"])
        clock.forward(60)
        new = service.update(ALICE, old.id, text="coffee", type="profile", pinned=True, tags=[])
        assert (new.version, new.text, new.type, new.pinned, new.tags) == (2, "coffee", "profile", True, ())
        assert (new.created_at, new.updated_at) == (old.created_at, clock.now)
        assert service.get(ALICE, old.id) == new
        assert service.history(ALICE, old.id) == [old, new]

    def test_changes_only_what_is_given(self, service: MemoryService) -> None:
        old = service.add(ALICE, "tea", type="profile", pinned=True, tags=["a"])
        new = service.update(ALICE, old.id, pinned=False)
        assert (new.text, new.type, new.pinned, new.tags, new.version) == ("tea", "profile", False, ("a",), 2)

    def test_what_it_has_already_changes_nothing(self, service: MemoryService, clock: Clock) -> None:
        values: dict[str, Any] = {"text": "tea", "type": "profile", "pinned": True, "tags": ["a", "b"], "priority": 1}
        old = service.add(ALICE, **values, sensitivity="sensitive", valid_from="2020-01-01")
        seq, held = service.memory_version(ALICE), service.holdings(ALICE)
        clock.forward(60)
        more = {"tags": ["a", "b", "a"], "sensitivity": "sensitive", "valid_from": "2020-01-01T00:00:00Z", "ttl_s": 0}
        assert service.update(ALICE, old.id, **{**values, **more}) == old == service.get(ALICE, old.id)
        assert service.history(ALICE, old.id) == [old]
        assert (service.memory_version(ALICE), service.holdings(ALICE)) == (seq, held)
        assert service.update(ALICE, old.id, tags=["b", "a"]).version == 2
        assert service.update(ALICE, old.id, ttl_s=60.0).version == 3
        clock.forward(1)
        assert service.update(ALICE, old.id, ttl_s=60.0).version == 4, "it ends later"

    def test_a_new_text_has_a_new_kv_epoch(self, service: MemoryService) -> None:
        record = service.add(ALICE, "tea")
        service.update(ALICE, record.id, text="tea", pinned=True)
        assert service.kv_epoch(ALICE) == 0
        service.update(ALICE, record.id, text="coffee")
        assert service.kv_epoch(ALICE) == 1

    def test_the_new_text_is_what_repetitions_are_found_by(self, service: MemoryService) -> None:
        record = service.add(ALICE, "I like tea.")
        service.update(ALICE, record.id, text="I like milk.")
        assert service.remember(ALICE, says("I like milk."))[0].id == record.id
        assert service.remember(ALICE, says("I like tea."))[0].id != record.id


class TestDelete:
    def test_removes_everything_and_says_so(self, service: MemoryService) -> None:
        record = service.add(ALICE, "green tea secret")
        kept = service.add(ALICE, "black tea")
        service.update(ALICE, record.id, text="white tea secret")
        service.update(ALICE, record.id, pinned=True)
        service.recall(ALICE, says("tea"), session="s")
        receipt = service.delete(ALICE, record.id)
        assert receipt.as_json() == {
            "tenant": "acme", "user": "alice",
            "records": [record.id], "versions": 2, "postings": 3, "sessions": 1, "links": 0, "snapshot_entries": 0,
            "derived": [], "kv_epoch": 2,
        }  # fmt: skip
        assert texts(service.search(ALICE, "secret tea")) == ["black tea"]
        assert texts(service.recall(ALICE, says("tea"), session="s").long_lived) == ["black tea"]
        assert service.list(ALICE, include_superseded=True).records == (kept,)
        with pytest.raises(NotFound):
            service.get(ALICE, record.id)
        with pytest.raises(NotFound):
            service.history(ALICE, record.id)
        assert b"secret" not in everything(service)
        claims = service._store.examine(lambda txn, dbs: list(txn.cursor(db=dbs["current"])))
        assert len(claims) == 2, "what is left says one text, exactly and nearly"

    def test_all(self, service: MemoryService) -> None:
        for text in ("secret one", "secret two", "secret three"):
            record = service.add(ALICE, text)
        service.update(ALICE, record.id, text="secret 3")
        service.add(BOB, "of bob")
        service.recall(ALICE, says("secret"), session="s")
        receipt = service.delete_all(ALICE)
        assert (len(receipt.records), receipt.versions, receipt.postings, receipt.sessions) == (3, 1, 6, 1)
        assert receipt.kv_epoch == service.kv_epoch(ALICE) == 2
        assert service.list(ALICE, include_superseded=True).records == ()
        assert b"secret" not in everything(service)
        assert texts(service.list(BOB).records) == ["of bob"]
        assert service.kv_epoch(BOB) == 0

    def test_a_deleted_memory_can_be_told_again(self, service: MemoryService) -> None:
        (record,) = service.remember(ALICE, says("My name is Ann."))
        service.delete(ALICE, record.id)
        (again,) = service.remember(ALICE, says("My name is Ann."))
        assert again.id != record.id and again.uses == 1

    @pytest.mark.parametrize("told", ["My name is Ann.", "It is late."])
    def test_what_was_said_before_it_is_not_stored_after_it(self, service: MemoryService, told: str) -> None:
        service.add(ALICE, "tea")
        as_of = service.memory_version(ALICE)
        service.delete_all(ALICE)
        assert service.remember(ALICE, says(told), as_of=as_of) == []
        assert service.list(ALICE, include_superseded=True).records == ()
        assert service.remember(ALICE, says(told), as_of=service.memory_version(ALICE))

    def test_what_a_new_user_said_before_it_is_not_stored_after_it(self, service: MemoryService) -> None:
        as_of = service.memory_version(ALICE)
        service.delete_all(ALICE)
        assert service.remember(ALICE, says("My name is Ann."), as_of=as_of) == []

    def test_of_a_part_takes_nothing_of_what_is_being_said(self, service: MemoryService) -> None:
        tea, milk = service.add(ALICE, "tea"), service.add(ALICE, "milk")
        as_of = service.memory_version(ALICE)
        service.delete(ALICE, tea.id)
        service.update(ALICE, milk.id, text="cocoa")
        service.delete_all(BOB)
        assert service.remember(ALICE, says("My name is Ann."), as_of=as_of)

    def test_where_the_log_does_not_reach_back_nothing_comes_back(
        self, service: MemoryService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tables, "CHANGES_KEPT", 4)
        as_of = service.memory_version(ALICE)
        service.delete_all(ALICE)
        for text in "abcdef":
            service.add(ALICE, text)
        assert service.remember(ALICE, says("My name is Ann."), as_of=as_of) == []

    def test_of_nothing_is_an_empty_receipt(self, service: MemoryService) -> None:
        assert service.delete_all(ALICE).records == ()


def everything(service: MemoryService) -> bytes:
    """All keys and values that can be reached in the store."""
    with service._store._begin() as txn:
        return b"\n".join(part for db in service._store._dbs.values() for item in txn.cursor(db=db) for part in item)


class TestRemember:
    def test_only_the_last_user_message(self, service: MemoryService) -> None:
        conversation = [*says("I like tea."), {"role": "assistant", "content": "I like it too."}, *says("I like milk.")]
        assert texts(service.remember(ALICE, conversation)) == ["I like milk."]

    def test_keeps_provenance(self, service: MemoryService) -> None:
        conversation = [*says("Hello!"), {"role": "assistant", "content": "Hello!"}, *says("I like tea.")]
        (record,) = service.remember(ALICE, conversation, session="s", request="chatcmpl-1")
        assert record.session == "s"
        assert record.origin == {
            "source": "chat", "session": "s", "request": "chatcmpl-1", "rule": "statement",
            "role": "user", "message": 2, "digest": hashlib.blake2b(b"I like tea.", digest_size=16).hexdigest(),
        }  # fmt: skip

    def test_counts_a_repetition(self, service: MemoryService, clock: Clock) -> None:
        (first,) = service.remember(ALICE, says("I like green tea."))
        clock.forward(60)
        (again,) = service.remember(ALICE, says("i  LIKE green\u00a0tea."))
        assert (again.id, again.text, again.uses, again.version) == (first.id, first.text, 2, 1)
        assert again.updated_at == clock.now
        assert service.list(ALICE).records == (again,)

    def test_a_repetition_within_one_message(self, service: MemoryService) -> None:
        assert [record.uses for record in service.remember(ALICE, says("I like tea. I like tea."))] == [1, 2]
        assert len(service.list(ALICE).records) == 1

    def test_a_correction_supersedes(self, service: MemoryService, clock: Clock) -> None:
        (old,) = service.remember(ALICE, says("My favourite drink is oolong tea."))
        clock.forward(60)
        (new,) = service.remember(ALICE, says("My favorite drink is green tea now."))
        assert new.supersedes == old.id
        superseded = service.get(ALICE, old.id)
        assert (superseded.superseded_by, superseded.valid_to, superseded.version) == (new.id, clock.now, 1)
        assert texts(service.recall(ALICE, says("drink")).long_lived) == [new.text]
        assert texts(service.search(ALICE, "oolong green drink")) == [new.text]
        assert texts(service.list(ALICE).records) == [new.text]
        assert texts(service.list(ALICE, include_superseded=True).records) == [old.text, new.text]
        assert texts(service.history(ALICE, new.id)) == [old.text, new.text]

    def test_the_same_claim_in_other_words_is_a_repetition(self, service: MemoryService) -> None:
        (first,) = service.remember(ALICE, says("My favourite drink is green tea."))
        assert service.remember(ALICE, says("my favorite drink is green tea now!"))[0].id == first.id

    def test_back_and_forth_keeps_the_last(self, service: MemoryService) -> None:
        for drink in ("tea", "milk", "tea"):
            service.remember(ALICE, says(f"My favourite drink is {drink}."))
        assert texts(service.list(ALICE).records) == ["My favourite drink is tea."]
        assert len(service.list(ALICE, include_superseded=True).records) == 3

    def test_what_can_be_true_together_stays(self, service: MemoryService) -> None:
        service.remember(
            ALICE, says("My cat is black. My cat is ill. My favourite drink is tea. Bob's favourite drink is milk.")
        )
        assert len(service.list(ALICE).records) == 4

    def test_a_pin_passes_on(self, service: MemoryService) -> None:
        service.add(ALICE, "My name is Ann.", pinned=True)
        assert service.remember(ALICE, says("My name is Eve."))[0].pinned

    def test_others_claims_are_not_superseded(self, service: MemoryService) -> None:
        service.remember(BOB, says("My name is Bob."))
        service.remember(ALICE, says("My name is Ann."))
        assert texts(service.list(BOB).records) == ["My name is Bob."]

    def test_a_long_paste_is_one_document(self, service: MemoryService) -> None:
        (record,) = service.remember(ALICE, says("I like tea. " * 80_000))
        assert (record.type, record.pinned) == ("document", False)
        assert service.recall(ALICE, says("hello")).long_lived == ()

    @pytest.mark.parametrize("messages", [[], says(None), says("Hello!"), says([{"type": "image_url"}]), says("   ")])
    def test_nothing_worth_keeping(self, service: MemoryService, messages: Any) -> None:
        assert service.remember(ALICE, messages) == []
        assert service.stats()["users"] == 0

    @pytest.mark.parametrize("text", ["I like \ud800 tea.", "x" * (2**20 + 1)])
    def test_what_cannot_be_stored_is_an_error(self, service: MemoryService, text: str) -> None:
        with pytest.raises(RequestError):
            service.remember(ALICE, says(text))


OTHERS = [
    BOB,
    Principal("other", "alice"),
    Principal("acmealice", ""),
    Principal("acm", "ealice"),
    Principal("acme\0", "alice"),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_users_are_apart(service: MemoryService, other: Principal) -> None:
    record = service.add(ALICE, "green tea")
    absent = str(uuid.uuid4())
    for memory_id in (record.id, absent):
        for call in (service.get, service.history, service.delete, lambda who, i: service.update(who, i, text="x")):
            with pytest.raises(NotFound) as error:
                call(other, memory_id)
            assert str(error.value) == f"no memory {memory_id!r}"
    assert service.list(other).records == ()
    assert service.list(other, after=record.id).records == ()
    assert service.search(other, "green tea") == []
    assert service.recall(other, says("green tea")).late == service.recall(other, says("tea")).long_lived == ()
    assert service.delete_all(other).records == ()
    assert service.get(ALICE, record.id) == record
    assert service.kv_epoch(ALICE) == 0


@pytest.mark.parametrize("spell", [str.upper, "{{{}}}".format, "urn:uuid:{}".format, " {}".format, "{}\0".format])
def test_an_id_has_one_spelling(service: MemoryService, spell: Callable[[str], str]) -> None:
    record = service.add(ALICE, "tea")
    with pytest.raises(NotFound):
        service.get(ALICE, spell(record.id))


@pytest.mark.parametrize("memory_id", ["", "x", "\ud800", "x" * 10_000, "\0"])
def test_ids_that_are_none(service: MemoryService, memory_id: str) -> None:
    service.add(ALICE, "tea")
    with pytest.raises(NotFound):
        service.get(ALICE, memory_id)


@pytest.mark.parametrize(
    "arguments",
    [
        {"text": ""},
        {"text": " \n"},
        {"text": 5},
        {"text": None},
        {"text": "é" * (2**19 + 1)},
        {"text": "\ud800"},
        {"text": "x", "type": "song"},
        {"text": "x", "type": None},
        {"text": "x", "pinned": 1},
        {"text": "x", "tags": "abc"},
        {"text": "x", "tags": 5},
        {"text": "x", "tags": [5]},
        {"text": "x", "tags": [""]},
        {"text": "x", "tags": ["x" * 257]},
        {"text": "x", "tags": ["\ud800"]},
        {"text": "x", "tags": [str(i) for i in range(10_001)]},
        {"text": "x", "session": ""},
        {"text": "x", "session": 5},
    ],
    ids=lambda arguments: str(arguments)[:40],
)
def test_bad_input_is_refused_and_nothing_stored(service: MemoryService, arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        service.add(ALICE, **arguments)
    assert str(error.value) and "\n" not in str(error.value)
    assert service.stats()["memories"] == 0


@pytest.mark.parametrize(
    "arguments", [{"limit": 0}, {"limit": 1001}, {"limit": True}, {"limit": "5"}, {"type": "song"}, {"after": "x"}]
)
def test_bad_list_arguments(service: MemoryService, arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        service.list(ALICE, **arguments)


def test_limits_are_reached(service: MemoryService) -> None:
    tags = [str(number) for number in range(10_000)]
    record = service.add(ALICE, "x" * 2**20, tags=tags)
    assert service.get(ALICE, record.id).tags == tuple(tags)


def test_tokens_are_estimated_by_bytes() -> None:
    assert [estimate_tokens(text) for text in ("", "a", "abcd", "abcde", "茶茶", "\ud800")] == [0, 1, 1, 2, 2, 1]


def test_threads_share_a_service(service: MemoryService) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            who = (ALICE, BOB)[number % 2]
            for i in range(10):
                record = service.add(who, f"tea {number} {i}")
                assert record.id in {hit.record.id for hit in service.search(who, f"{number} {i}", top_k=100)}
                service.recall(who, says("tea"), session=f"s{i}")
                if i % 3 == 0:
                    service.delete(who, record.id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert service.stats()["memories"] == 6 * 6


@pytest.mark.parametrize(
    "ending",
    [{"type": "working", "session": "s1"}, {"ttl_s": 3600}, {"ttl_s": 1}, {"type": "trajectory"}],
    ids=["working", "ends", "expired", "trajectory"],
)
@pytest.mark.parametrize(
    ("noted", "said"),
    [
        ("My favourite drink is oolong tea.", "My favourite drink is oolong tea."),
        ("I'm allergic to peanuts.", "I am allergic to peanuts!"),
    ],
    ids=["same", "near"],
)
def test_what_is_said_outlives_what_ends(
    service: MemoryService, clock: Clock, ending: dict[str, Any], noted: str, said: str
) -> None:
    service.add(ALICE, noted, **ending)
    clock.forward(60)
    (kept,) = service.remember(ALICE, says(said), session="s2")
    assert (kept.expires_at, kept.uses) == (None, 1)
    assert kept.type in ("fact", "preference")
    clock.forward(86_400)
    service.life.tend()
    assert texts(service.recall(ALICE, says("hello")).long_lived) == [said]


def test_a_claim_supersedes_what_ends_but_no_note_of_a_session(service: MemoryService) -> None:
    ends = service.add(ALICE, "My city is Rome.", ttl_s=3600)
    note = service.add(ALICE, "My city is Bern.", type="working", session="s1", pinned=True)
    (said,) = service.remember(ALICE, says("My city is Oslo."))
    assert (said.supersedes, said.pinned) == (ends.id, False)
    assert service.get(ALICE, note.id).is_current


def test_a_deletion_of_many_reads_each_session_once(service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    first = service.add(ALICE, "I like tea.")
    service.documents.put(ALICE, "a.txt", "\n\n".join(f"Piece {n} " + "word " * 60 for n in range(10)).encode())
    for session in ("s1", "s2", "s3"):
        service.recall(ALICE, says("hi"), session=session)
    read: list[bytes] = []
    decode = sessions.decode
    monkeypatch.setattr(sessions, "decode", lambda raw: read.append(raw) or decode(raw))
    assert len(service.documents.delete(ALICE, "a.txt").records) == 10
    assert len(read) == 3
    assert service.delete(ALICE, first.id).sessions == 3


def test_the_size_is_what_stats_say_and_grows(service: MemoryService) -> None:
    before = service.store_size()
    service.add_many(ALICE, [{"text": f"tea {number} " * 100} for number in range(200)])
    after = service.store_size()
    assert 0 < before.used_bytes < after.used_bytes == service.stats()["file_bytes"]
    assert after.limit_bytes == service.stats().get("max_map_bytes")
