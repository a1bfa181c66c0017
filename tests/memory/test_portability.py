"""All of a user's memories leave one store and enter another, whichever engine keeps it."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.errors import LimitReached, RequestError
from memos_vllm.memory import maintenance, portable
from memos_vllm.memory.service import MemoryService
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB, Clock, make_service, says, texts

UNICODE = '私の好きな飲み物は烏龍茶です 🍵 \u2028 é "quoted" \\ \t'
DAY_S = 86400.0


@pytest.fixture
def source(tmp_path: Path, clock: Clock) -> Iterator[MemoryService]:
    made = make_service(tmp_path / "source", clock=clock)
    yield made
    made._store.close()


def export(service: MemoryService, who: Principal = ALICE) -> bytes:
    file = io.BytesIO()
    service.portability.export(who, file)
    return file.getvalue()


def take(service: MemoryService, data: bytes, who: Principal = ALICE) -> dict[str, Any]:
    return service.portability.take(who, io.BytesIO(data)).as_json()


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().split("\n") if line]


def join(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in values).encode()


def body(data: bytes) -> list[dict[str, Any]]:
    """All but the header; without whose it is."""
    told = lines(data)[1:]
    for part in (part for line in told for part in line.values()):
        part.pop("tenant", None)
        part.pop("user", None)
    return told


def fill(service: MemoryService, clock: Clock, who: Principal = ALICE) -> None:
    """Something of every kind: corrected, changed, merged, frozen, archived, with an end, linked, a document."""
    for job in ("baker", "pilot"):
        service.remember(who, says(f"My job is {job}."), session="s1")
        clock.forward(60)
    note = service.add(who, UNICODE, tags=["tea", "茶"], pinned=True, priority=2, session="s2", valid_from="2020-01-01")
    service.update(who, note.id, text="I drink oolong.", sensitivity="sensitive", ttl_s=9 * DAY_S)
    kept, copy = (
        service.add(who, "I like tea."),
        service.add(who, "Tea is good.", origin={"cube": "c", "speaker": "Ann"}),
    )
    service.life.merge(who, kept.id, [copy.id], "I like good tea.")
    frozen, archived = service.add(who, "Frozen."), service.add(who, "Archived.", type="preference")
    service.life.set_state(who, frozen.id, "frozen")
    service.life.set_state(who, archived.id, "archived")
    link = service.life.link(who, frozen.id, archived.id, "part_of", origin={"by": "me"})
    service.life.end_link(who, link.id)
    service.life.link(who, kept.id, note.id, "related_to", valid_from="2021-01-01", valid_to="2022-01-01")
    service.life.used(who, {"late": [kept.id]})
    document = "\n\n".join(f"# Part {n}\n\n" + f"{word} " * 50 for n, word in enumerate(("alpha", "beta", "gamma")))
    service.documents.put(who, "guide.md", document.encode(), tags=["doc"])
    service.documents.put(who, "guide.md", document.replace("beta", "delta").encode())


def assert_sound(service: MemoryService) -> None:
    assert maintenance.examine_open(service._store).problems == []


def test_a_round_trip_over_both_engines_keeps_everything(
    source: MemoryService, make: Callable[..., MemoryService], tmp_path: Path, clock: Clock
) -> None:
    fill(source, clock)
    source.add(BOB, "What Bob said.")
    told = export(source)
    clock.forward(DAY_S)
    target, back = make(), make_service(tmp_path / "back", clock=clock)
    receipt = take(target, told)
    take(back, export(target, ALICE), Principal("other", "somebody"))
    assert body(export(target)) == body(told) == body(export(back, Principal("other", "somebody")))
    header = lines(told)[0]
    assert receipt == {
        "object": "import", "memories": header["memories"], "known": 0, "versions": header["versions"],
        "links": header["links"], "mapped": {},
    }  # fmt: skip
    assert header["memories"] > 10 and header["versions"] >= 2 and header["links"] >= 5
    assert "What Bob said." not in told.decode()
    for service in (target, back):
        assert_sound(service)
    assert target.list(BOB, include_superseded=True).records == ()
    back._store.close()


def test_what_arrived_lives_on_as_at_home(source: MemoryService, service: MemoryService, clock: Clock) -> None:
    fill(source, clock)
    take(service, export(source))
    assert texts(service.search(ALICE, "pilot"))[0] == "My job is pilot."
    assert [each.name for each in service.documents.list(ALICE)] == ["guide.md"]
    assert [each.text for each in service.documents.get(ALICE, "guide.md")[1]] == [
        each.text for each in source.documents.get(ALICE, "guide.md")[1]
    ]
    (job,) = (each for each in service.list(ALICE).records if each.text == "My job is pilot.")
    assert texts(service.history(ALICE, job.id)) == ["My job is baker.", "My job is pilot."]
    service.remember(ALICE, says("My job is farmer."))
    assert service.get(ALICE, job.id).superseded_by is not None
    assert service.add(ALICE, "Later.").id > max(each.id for each in service.list(ALICE).records[:-1])
    used = next(each for each in service.list(ALICE).records if each.text == "I like good tea.")
    assert service.life.cube(ALICE, used.id)["header"]["behavioural"]["uses"] == 1
    service.delete_all(ALICE)
    assert_sound(service)


def test_the_same_file_again_changes_nothing(service: MemoryService, source: MemoryService, clock: Clock) -> None:
    fill(source, clock)
    told = export(source)
    first = take(service, told)
    before, seq, held = export(service), service.memory_version(ALICE), service.holdings(ALICE)
    clock.forward(DAY_S)
    again = take(service, told)
    assert again == {**first, "memories": 0, "versions": 0, "links": 0, "known": first["memories"]}
    assert body(export(service)) == body(before) and service.memory_version(ALICE) == seq
    assert service.holdings(ALICE) == held


def test_what_was_changed_since_stays_and_what_was_deleted_comes_back(service: MemoryService) -> None:
    changed, deleted = service.add(ALICE, "I like tea."), service.add(ALICE, "I like milk.")
    told = export(service)
    service.update(ALICE, changed.id, text="I like cocoa.")
    service.delete(ALICE, deleted.id)
    assert take(service, told) == {
        "object": "import", "memories": 1, "known": 1, "versions": 0, "links": 0, "mapped": {},
    }  # fmt: skip
    assert texts(service.list(ALICE).records) == ["I like cocoa.", "I like milk."]
    assert texts(service.search(ALICE, "milk")) == ["I like milk."]
    assert_sound(service)


def test_an_id_that_another_memory_has_is_mapped_the_same_each_time(service: MemoryService) -> None:
    own, other = service.add(ALICE, "I like tea."), service.add(ALICE, "Other.")
    service.life.link(ALICE, own.id, other.id, "part_of")
    told = join([
        {kind: {**part, "text": "I like milk."} if kind == "memory" and part["id"] == own.id else part
         for kind, part in line.items()} for line in lines(export(service))
    ])  # fmt: skip
    receipt = take(service, told)
    assert (receipt["memories"], receipt["known"], list(receipt["mapped"])) == (1, 1, [own.id])
    new = receipt["mapped"][own.id]
    assert service.get(ALICE, new).text == "I like milk." and service.get(ALICE, own.id).text == "I like tea."
    assert [(link.source, link.target) for link in service.life.links(ALICE, new)] == [(new, other.id)]
    service.update(ALICE, new, text="I like cocoa.")
    again = take(service, told)
    assert (again["memories"], again["links"], again["mapped"]) == (0, 0, receipt["mapped"])
    assert_sound(service)


def change(place: int, kind: str, **values: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda told: told[place][kind].update(values)


ID = "019b7f3c-0000-7000-8000-000000000000"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda told: told.__setitem__(0, {"x": 1}), "line 1: this is no export"),
        (lambda told: told[0].update(version=2), "format version 2, and this server reads versions up to 1"),
        (lambda told: told[0].update(memories=None), "'memories' must be a whole number"),
        (lambda told: told.pop(), "the file was cut off or changed"),
        (lambda told: told.insert(2, told[1]), "stands twice"),
        (lambda told: told.__setitem__(2, {"note": {}}), "line 3: a line has 'memory'"),
        (change(2, "memory", text=" "), "line 3: 'text' is empty"),
        (change(2, "memory", text="\ud800"), "half of a surrogate pair"),
        (change(2, "memory", origin={"x": "\ud800"}), "valid Unicode"),
        (change(2, "memory", origin={"document": {"name": "x"}}), "'origin.document'"),
        (change(2, "memory", id="x"), "'id' must be an id"),
        (change(2, "memory", id="ffffffff-ffff-7fff-bfff-ffffffffffff"), "'id' must be an id"),
        (change(2, "memory", id="4c5b0b8e-9d44-4c2e-8f0c-0d6f3c0c9f11"), "'id' must be an id"),
        (change(2, "memory", type="dream"), "unknown type"),
        (change(2, "memory", state="lost"), "unknown state"),
        (change(2, "memory", state=["x"]), "unknown state"),
        (change(2, "memory", created_at=None), "'created_at' is missing"),
        (change(2, "memory", created_at=7), "'created_at' must be a time"),
        (change(2, "memory", expires_at="9999-01-01"), "between the years"),
        (change(2, "memory", version=0), "'version' must be a whole number"),
        (change(2, "memory", uses=2**40), "'uses' must be a whole number"),
        (change(2, "memory", colour="red"), "unknown field 'colour'"),
        (change(2, "memory", superseded_by=ID), "'superseded_by' stands without 'valid_to'"),
        (change(2, "memory", superseded_by=ID, valid_to="2026-01-01"), "which is not in it"),
        (change(2, "usage", uses=-1), "'uses' must be a whole number"),
        (change(3, "version", version=9), "must be an earlier one"),
        (change(-1, "link", to=ID), "which is not in it"),
        (change(-1, "link", type="X"), "the type of a link"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_written(
    service: MemoryService, source: MemoryService, edit: Callable[[list[dict[str, Any]]], Any], words: str
) -> None:
    first, second = source.add(ALICE, "I like tea."), source.add(ALICE, "I like milk.")
    source.update(ALICE, second.id, priority=1)
    source.life.link(ALICE, first.id, second.id, "part_of")
    told = lines(export(source))
    edit(told)
    with pytest.raises(RequestError, match=words) as caught:
        take(service, "".join(json.dumps(each) + "\n" for each in told).encode())
    assert "\n" not in str(caught.value) and caught.value.status == 400
    assert service.holdings(ALICE).memories == 0 and service.memory_version(ALICE) == (0, 0)


@pytest.mark.parametrize("line", [b"{", b"\xff\n", b'{"memory": {"uses": NaN}}\n', b"[" * 100_000, b"[]\n", b"7"])
def test_what_is_no_json_is_refused(service: MemoryService, source: MemoryService, line: bytes) -> None:
    source.add(ALICE, "I like tea.")
    with pytest.raises(RequestError, match="line 2 is no JSON"):
        take(service, export(source).replace(b'\n{"memory', b"\n" + line.strip() + b'\n{"memory', 1))
    assert service.holdings(ALICE).memories == 0


def test_a_circle_of_successors_is_refused(service: MemoryService, source: MemoryService) -> None:
    for job in ("baker", "pilot"):
        source.remember(ALICE, says(f"My job is {job}."))
    told = lines(export(source))
    first, second = told[1]["memory"], told[2]["memory"]
    second.update(superseded_by=first["id"], valid_to=first["valid_to"])
    with pytest.raises(RequestError, match="back to it"):
        take(service, join(told))


def test_a_line_is_not_read_beyond_its_limit(
    service: MemoryService, source: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.add(ALICE, "x" * 2000)
    told = export(source)
    monkeypatch.setattr(portable, "MAX_LINE_BYTES", 1000)
    with pytest.raises(RequestError, match="line 2 has more than 1000 bytes"):
        take(service, told)


@pytest.mark.parametrize("limit", [{"max_user_memories": 2}, {"max_user_bytes": 900}])
def test_limits_hold_as_a_whole(make: Callable[..., MemoryService], source: MemoryService, limit: Any) -> None:
    for number in range(3):
        source.add(ALICE, f"Note {number}. " + "x" * 200)
    service = make(**limit)
    with pytest.raises(LimitReached, match=next(iter(limit))):
        take(service, export(source))
    assert service.holdings(ALICE).memories == 0


def test_of_too_many_memories_the_rest_is_not_read(make: Callable[..., MemoryService], source: MemoryService) -> None:
    for number in range(3):
        source.add(ALICE, f"Note {number}.")
    with pytest.raises(LimitReached, match="would have 3 memories"):
        take(make(max_user_memories=2), export(source) + b"no JSON\n")


def test_two_memories_do_not_become_one(service: MemoryService) -> None:
    own = service.add(ALICE, "I like tea.")
    header, line = lines(export(service))
    line["memory"]["text"] = "I like milk."
    told = join([header, line])
    new = take(service, told)["mapped"][own.id]
    service.delete(ALICE, new)
    twin = {**line, "memory": {**line["memory"], "id": new}}
    with pytest.raises(RequestError, match=f"would have the id {new}"):
        take(service, join([{**header, "memories": 2}, line, twin]))
    assert len(service.list(ALICE).records) == 1


def test_limits_count_what_is_there(make: Callable[..., MemoryService], source: MemoryService) -> None:
    service = make(max_user_memories=2)
    service.add(ALICE, "One.")
    source.add(ALICE, "Two.")
    two = export(source)
    source.add(ALICE, "Three.")
    with pytest.raises(LimitReached):
        take(service, export(source))
    assert take(service, two)["memories"] == 1


def test_links_agree_with_what_is_here(service: MemoryService, source: MemoryService) -> None:
    """A correction was taken back here; the file's link does not make it true again."""
    for job in ("baker", "pilot"):
        source.remember(ALICE, says(f"My job is {job}."))
    told = export(source)
    take(service, told)
    old, new = (each.id for each in service.list(ALICE, include_superseded=True).records)
    service.delete(ALICE, new)
    take(service, told)
    assert service.get(ALICE, old).superseded_by is None
    assert_sound(service)
    without = [line for line in lines(told) if "link" not in line]
    take(service, join([{**without[0], "links": 0}, *without[1:]]), BOB)
    assert_sound(service)


def test_thousands_pass_in_bounded_memory(make: Callable[..., MemoryService], tmp_path: Path) -> None:
    """The file of 5,000 memories of 2 KB is 12 MB; beside it stays what one line and the ids need."""
    source, service = make_service(tmp_path / "source"), make()
    source.add_many(ALICE, [{"text": f"Note {number}. " + "word " * 400} for number in range(5000)])
    with open(tmp_path / "told", "w+b") as file:
        tracemalloc.start()
        source.portability.export(ALICE, file)
        exported = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert file.tell() > 12_000_000 and exported < 1_000_000
        service.portability._take_in = lambda who: None  # the index is in memory, however its memories came
        tracemalloc.start()
        assert service.portability.take(ALICE, file).memories == 5000
        imported = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert imported < 20_000_000
    assert service.holdings(ALICE) == replace(source.holdings(ALICE), last_used_at=service.holdings(ALICE).last_used_at)
    source._store.close()
