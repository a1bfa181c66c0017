"""Documents as memories: a new edition changes what has changed, and a deletion leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.core.lifecycle import State
from memos_vllm.errors import DocumentError, NotFound, RequestError
from memos_vllm.memory import maintenance, tables
from memos_vllm.memory.documents import library
from memos_vllm.memory.service import MemoryService
from tests.memory.document_factories import make_pdf, markdown, paragraph
from tests.memory.embedder_factories import TopicEmbedder
from tests.memory.memory_factories import ALICE, BOB, Clock, says, texts

NAME = "guide.md"


def put(service: MemoryService, *subjects: str, **given: Any) -> list[str]:
    """The ids of the pieces."""
    return list(service.documents.put(ALICE, NAME, markdown(*subjects), **given).memories)


def subjects_of(service: MemoryService) -> list[str]:
    _, pieces = service.documents.get(ALICE, NAME)
    return [record.text.split()[2] for record in pieces]  # behind the heading and "The"


def test_pieces_know_where_they_stand(service: MemoryService) -> None:
    (train, _) = put(service, "train", "ferry", tags=["work"], cube="trips")
    record = service.get(ALICE, train)
    assert (record.type, record.tags, record.text) == ("document", ("work",), f"Guide\n{paragraph('train')}")
    place = {"name": NAME, "content_type": "text/markdown", "section": ["Guide"], "offset": 9}
    assert record.origin == {"source": "document", "cube": "trips", "document": place}
    service.documents.put(ALICE, "prices.pdf", make_pdf([["x."], ["Rooms cost 120 euros."]], [("Prices", 1)]))
    (hit,) = service.search(ALICE, "euros rooms", top_k=1)
    assert hit.record.origin["document"] | {"offset": 0} == {
        "name": "prices.pdf", "content_type": "application/pdf", "section": ["Prices"], "page": 2, "offset": 0,
    }  # fmt: skip
    assert [(each.name, each.pieces) for each in service.documents.list(ALICE)] == [(NAME, 2), ("prices.pdf", 2)]


def test_it_is_recalled_with_what_stands_beside_it(service: MemoryService) -> None:
    put(service, "train", "ferry", "plane", "bus")
    recall = service.recall(ALICE, says("And the ferry?"), top_k=3)
    assert recall.long_lived == () and "ferry" in recall.late[0].record.text
    assert {hit.why["retrievers"]["link"]["type"] for hit in recall.late[1:]} == {"followed_by"}


class TestANewEdition:
    def test_of_the_same_text_writes_nothing(self, service: MemoryService) -> None:
        ids = put(service, "train", "ferry")
        before = service.memory_version(ALICE)
        assert put(service, "train", "ferry") == ids
        assert service.memory_version(ALICE) == before

    def test_supersedes_what_has_changed_and_keeps_the_rest(self, service: MemoryService, clock: Clock) -> None:
        train, ferry, plane = put(service, "train", "ferry", "plane", pinned=True, tags=["work"])
        epoch = service.kv_epoch(ALICE)
        clock.forward(60)
        stored = service.documents.put(ALICE, NAME, markdown("bus", "train", "boat", "plane"))
        assert (stored.kept, stored.added, stored.superseded, stored.ended) == (2, 1, 1, 0)
        assert [stored.memories[1], stored.memories[3]] == [train, plane]
        old, boat = service.get(ALICE, ferry), service.get(ALICE, stored.memories[2])
        assert (old.superseded_by, old.valid_to, boat.supersedes) == (boat.id, clock.now, ferry)
        assert (boat.pinned, boat.tags) == (True, ("work",))
        assert [record.id for record in service.history(ALICE, boat.id)] == [ferry, boat.id]
        assert service.get(ALICE, train).version == 1 and service.kv_epoch(ALICE) == epoch
        assert not service.search(ALICE, "ferry")
        assert subjects_of(service) == ["bus", "train", "boat", "plane"]

    def test_ends_what_it_no_longer_has(self, service: MemoryService, clock: Clock) -> None:
        train, ferry = put(service, "train", "ferry")
        assert service.documents.put(ALICE, NAME, markdown("train")).ended == 1
        old = service.get(ALICE, ferry)
        assert (old.superseded_by, old.valid_to) == (None, clock.now)
        assert put(service, "train", "ferry")[0] == train and subjects_of(service) == ["train", "ferry"]

    def test_keeps_the_order_of_pieces_that_moved(self, service: MemoryService) -> None:
        ids = put(service, "train", "ferry", "plane")
        assert sorted(put(service, "plane", "train", "ferry")) == sorted(ids)
        assert subjects_of(service) == ["plane", "train", "ferry"]
        links = service.life.links(ALICE, ids[0], type="followed_by")
        valid = {(each.source, each.target) for each in links if each.valid_to is None}
        assert valid == {(ids[2], ids[0]), (ids[0], ids[1])}

    def test_brings_back_what_was_archived_and_leaves_what_is_frozen(self, service: MemoryService) -> None:
        train, ferry = put(service, "train", "ferry")
        service.life.set_state(ALICE, train, "archived")
        service.life.set_state(ALICE, ferry, "frozen")
        put(service, "train", "boat")
        assert service.get(ALICE, train).state is State.ACTIVATED
        assert service.get(ALICE, ferry).is_current, "a frozen memory is beside the new edition"

    def test_embeds_only_what_is_new(self, make: Callable[..., MemoryService]) -> None:
        embedder = TopicEmbedder()
        service = make(embedder=embedder)
        put(service, "train", "ferry")
        embedder.embedded.clear()
        put(service, "train", "boat")
        assert [text.split()[2] for text in embedder.embedded] == ["boat"]

    def test_can_be_rolled_back(self, service: MemoryService) -> None:
        put(service, "train", "ferry")
        snapshot = service.life.take_snapshot(ALICE, "before")
        put(service, "train", "boat")
        service.life.roll_back(ALICE, snapshot.id)
        assert [hit.record.text.split()[2] for hit in service.search(ALICE, "ferry boat", top_k=1)] == ["ferry"]
        put(service, "train", "ferry")
        assert "boat" not in " ".join(texts(service.search(ALICE, "boat described", include_archived=True)))


class TestDeleting:
    def test_takes_every_edition_and_says_so(self, service: MemoryService) -> None:
        put(service, "train", "ferry", pinned=True)
        service.documents.put(ALICE, NAME, markdown("train", "boat"))
        service.recall(ALICE, says("x"), session="s")
        service.life.take_snapshot(ALICE, "now")
        other = service.documents.put(ALICE, "other.md", markdown("train")).memories
        receipt = service.documents.delete(ALICE, NAME)
        assert (len(receipt.records), receipt.sessions, receipt.kv_epoch) == (3, 2, 1)
        assert receipt.snapshot_entries == 3 and receipt.links == 3 and receipt.postings > 0
        assert [record.id for record in service.list(ALICE, include_superseded=True).records] == other
        with pytest.raises(NotFound, match="no document"):
            service.documents.delete(ALICE, NAME)

    def test_all_memories_takes_documents_too(self, service: MemoryService) -> None:
        put(service, "train")
        service.delete_all(ALICE)
        assert service.documents.list(ALICE) == []
        assert len(put(service, "train")) == 1

    def test_a_single_piece_leaves_the_others(self, service: MemoryService) -> None:
        train, ferry = put(service, "train", "ferry")
        service.delete(ALICE, train)
        assert [record.id for record in service.documents.get(ALICE, NAME)[1]] == [ferry]


def test_nobody_else_has_it(service: MemoryService) -> None:
    put(service, "train")
    assert service.documents.list(BOB) == [] and service.search(BOB, "train") == []
    for call in (service.documents.get, service.documents.delete):
        with pytest.raises(NotFound):
            call(BOB, NAME)
    assert subjects_of(service) == ["train"]


def test_what_a_document_says_the_user_has_not_said(service: MemoryService) -> None:
    claim = "My job is pilot."
    service.documents.put(ALICE, "ann.txt", claim.encode())
    (said,) = service.remember(ALICE, says("My job is baker."))
    assert said.supersedes is None and texts(service.documents.get(ALICE, "ann.txt")[1]) == [claim]
    (same,) = service.remember(ALICE, says(claim))
    assert said.type == same.type == "fact" and same.supersedes == said.id
    service.documents.delete(ALICE, "ann.txt")
    assert texts(service.list(ALICE).records) == [claim]


@pytest.mark.parametrize(
    ("name", "data", "given", "words", "status"),
    [
        ("", b"x", {}, "'name'", 400),
        ("a\nb.txt", b"x", {}, "printable", 400),
        ("a.txt", b"x" * 1001, {}, "max_bytes", 413),
        ("a.txt", b"x", {"tags": "work"}, "'tags'", 400),
        ("a.txt", b"x", {"pinned": 1}, "'pinned'", 400),
        ("a.txt", b"x", {"cube": ""}, "'cube'", 400),
        ("a.exe", b"x", {}, "cannot read", 415),
        ("a.md", b"\n".join(b"# %d\nx" % number for number in range(60)), {}, "pieces", 413),
    ],
)
def test_what_cannot_be_taken_is_refused_and_loses_nothing(
    make: Callable[..., MemoryService],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    data: bytes,
    given: dict[str, Any],
    words: str,
    status: int,
) -> None:
    service = make(documents={"max_bytes": 1000})
    service.documents.put(ALICE, "a.txt", b"It stays.")
    monkeypatch.setattr(library, "MAX_PIECES", 50)
    with pytest.raises(RequestError, match=words) as caught:
        service.documents.put(ALICE, name, data, **given)
    assert caught.value.status == status and isinstance(caught.value, DocumentError | RequestError)
    assert texts(service.list(ALICE).records) == ["It stays."]


def test_the_doctor_mends_the_table_of_pieces(tmp_path: Path, make: Callable[..., MemoryService]) -> None:
    service = make()
    train, ferry = put(service, "train", "ferry")

    def damage(txn: Any, dbs: Any) -> None:
        key = next(iter(txn.cursor(db=dbs["pieces"]).iternext(values=False)))
        txn.delete(key, db=dbs["pieces"])
        txn.put(key[:8] + bytes(16) + key[24:], b"", db=dbs["pieces"])

    service._store.maintain(damage)
    problems = maintenance.examine_open(service._store).problems
    assert {problem.table for problem in problems} == {"pieces"} and len(problems) == 2
    maintenance.repair_open(service._store, tmp_path)
    assert maintenance.examine_open(service._store).problems == []
    assert [record.id for record in service.documents.get(ALICE, NAME)[1]] == [train, ferry]


@pytest.mark.parametrize("where", ["lmdb"], indirect=True)  # a database is as new as its first version: schema 3
def test_a_store_without_documents_gets_the_table(tmp_path: Path, make: Callable[..., MemoryService]) -> None:
    service = make()
    tea = service.add(ALICE, "I like tea.")

    def back_to_2(txn: Any, dbs: Any) -> None:
        txn.drop(dbs["pieces"])
        txn.put(b"schema_version", b"2", db=dbs["meta"])

    service._store.maintain(back_to_2)
    service._store.close()
    renewed = make()
    put(renewed, "train")
    assert renewed.get(ALICE, tea.id) == tea and subjects_of(renewed) == ["train"]
    renewed._store.close()
    assert maintenance.examine(tmp_path / "memory").problems == []
    assert tables.SCHEMA_VERSION >= 3
