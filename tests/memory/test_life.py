"""The life of memories: states, decay, uses, links, merges, snapshots; and that the store agrees with itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from memos_vllm.core.lifecycle import Aging, State
from memos_vllm.errors import Conflict, NotFound, RequestError
from memos_vllm.memory import tables
from memos_vllm.memory.integrity import Examination
from memos_vllm.memory.life import MAX_SNAPSHOTS
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, BOB, Clock, says, texts

DAY = 86400.0


@pytest.fixture
def service(make: Callable[..., MemoryService]) -> Iterator[MemoryService]:
    made = make()
    made._store.aging = Aging(archive_after_s=10 * DAY, remove_after_s=30 * DAY)
    yield made
    assert problems(made) == []


def problems(service: MemoryService) -> list[object]:
    def no_repair(*_: object) -> None:
        raise AssertionError

    with service._store._begin() as txn:
        return Examination(txn, service._store._dbs, no_repair, service._store.aging).run().problems


def states(service: MemoryService) -> list[str]:
    return [str(record.state) for record in service.list(ALICE, include_superseded=True).records]


class TestStates:
    def test_use_activates_and_is_noted(self, service: MemoryService, clock: Clock) -> None:
        record = service.add(ALICE, "I like tea.")
        assert record.state is State.GENERATED
        for _ in range(3):
            clock.forward(60)
            service.life.used(ALICE, {"late": [record.id]}, session="s", scene="scene-1")
        service.life.used(ALICE, {"long_lived": [record.id, "gone"]}, session="s", scene=None)
        assert service.get(ALICE, record.id).state is State.ACTIVATED
        first, second = service.life.events(ALICE, record.id)
        assert (first.kind, first.times, first.detail) == (
            "recalled", 3, {"where": "late", "session": "s", "scene": "scene-1"},
        )  # fmt: skip
        assert (first.last_at - first.at).total_seconds() == 120
        assert second.detail == {"where": "long_lived", "session": "s"}
        cube = service.life.cube(ALICE, record.id)
        assert cube["header"]["behavioural"]["uses"] == 4
        assert cube["header"]["behavioural"]["last_used_at"] == clock.now.isoformat()
        assert cube["payload"]["scenes"] == ["scene-1"]

    def test_the_log_is_bounded(self, service: MemoryService) -> None:
        record = service.add(ALICE, "I like tea.")
        for number in range(tables.EVENTS_KEPT + 5):
            service.life.used(ALICE, {"late": [record.id]}, session=f"s{number}")
        events = service.life.events(ALICE, record.id)
        assert len(events) == tables.EVENTS_KEPT
        assert events[-1].detail["session"] == f"s{tables.EVENTS_KEPT + 4}"

    def test_frozen_is_immutable_until_it_is_released(self, service: MemoryService, clock: Clock) -> None:
        record = service.add(ALICE, "My job is baker.", ttl_s=DAY)
        other = service.add(ALICE, "Bread is good.")
        assert service.life.set_state(ALICE, record.id, "frozen").state is State.FROZEN
        with pytest.raises(Conflict, match="frozen"):
            service.update(ALICE, record.id, text="x")
        for pair in ((record.id, [other.id]), (other.id, [record.id])):
            with pytest.raises(Conflict, match="frozen"):
                service.life.merge(ALICE, *pair)
        with pytest.raises(Conflict):
            service.life.set_state(ALICE, record.id, "archived")
        (new,) = service.remember(ALICE, says("My job is pilot."))
        assert new.supersedes is None
        assert [(link.type, link.source) for link in service.life.links(ALICE, record.id)] == [("contradicts", new.id)]
        clock.forward(100 * DAY)
        service.life.tend()
        assert service.get(ALICE, record.id).text == "My job is baker."
        assert texts(service.search(ALICE, "baker"))[0] == "My job is baker."
        service.life.set_state(ALICE, record.id, "activated")
        service.update(ALICE, record.id, text="My job is cook.")
        service.life.set_state(ALICE, record.id, "frozen")
        service.delete(ALICE, record.id)  # forgetting is the user's right

    def test_archived_is_out_of_recall_and_comes_back_when_used(self, service: MemoryService) -> None:
        record = service.add(ALICE, "I like green tea.")
        service.life.set_state(ALICE, record.id, "archived")
        recall = service.recall(ALICE, says("green tea"))
        assert recall.late == recall.long_lived == ()
        assert service.search(ALICE, "tea") == []
        assert texts(service.search(ALICE, "tea", include_archived=True)) == ["I like green tea."]
        assert texts(service.list(ALICE, state="archived").records) == ["I like green tea."]
        (again,) = service.remember(ALICE, says("I like green tea."))
        assert (again.id, again.state) == (record.id, State.ACTIVATED)
        assert texts(service.recall(ALICE, says("green tea")).long_lived) == ["I like green tea."]

    def test_a_frozen_session_drops_what_was_archived(self, service: MemoryService) -> None:
        record = service.add(ALICE, "I like tea.")
        assert texts(service.recall(ALICE, [], session="s").long_lived) == ["I like tea."]
        service.life.set_state(ALICE, record.id, "archived")
        assert service.recall(ALICE, [], session="s").long_lived == ()

    def test_sensitive_is_found_and_goes_into_no_prompt(self, service: MemoryService) -> None:
        service.add(ALICE, "My pin is 1234.", sensitivity="sensitive", pinned=True)
        recall = service.recall(ALICE, says("what is my pin"))
        assert recall.late == recall.long_lived == ()
        assert texts(service.search(ALICE, "pin")) == ["My pin is 1234."]

    @pytest.mark.parametrize("state", ["merged", "expired", "generated", "x", None, 5])
    def test_only_some_states_can_be_asked_for(self, service: MemoryService, state: object) -> None:
        record = service.add(ALICE, "tea")
        with pytest.raises(RequestError, match="'state' can be set to"):
            service.life.set_state(ALICE, record.id, state)  # type: ignore[arg-type]


class TestTime:
    def test_what_is_not_used_is_archived(self, service: MemoryService, clock: Clock) -> None:
        plain = service.add(ALICE, "plain")
        used = service.add(ALICE, "used")
        dear = service.add(ALICE, "dear", priority=2)
        service.add(ALICE, "pinned", pinned=True)
        service.life.used(ALICE, {"late": [used.id]})
        clock.forward(11 * DAY)
        assert service.life.tend().archived == 1
        assert service.get(ALICE, plain.id).state is State.ARCHIVED
        clock.forward(10 * DAY)
        assert service.life.tend().archived == 1
        assert service.get(ALICE, used.id).state is State.ARCHIVED
        clock.forward(20 * DAY)
        assert service.life.tend().archived == 1
        assert service.get(ALICE, dear.id).state is State.ARCHIVED
        clock.forward(1000 * DAY)
        assert service.life.tend().archived == 0
        assert [event.kind for event in service.life.events(ALICE, plain.id)] == ["archived"]

    def test_expiry_is_at_once_and_the_text_goes_later(self, service: MemoryService, clock: Clock) -> None:
        record = service.add(ALICE, "The door code is 7.", ttl_s=DAY)
        assert record.expires_at == clock.now + timedelta(days=1)
        service.recall(ALICE, says("door"), session="s")
        clock.forward(DAY)
        assert service.search(ALICE, "door", include_archived=True) == []
        assert service.recall(ALICE, says("door"), session="s").long_lived == ()
        assert service.life.tend().expired == 1
        assert service.get(ALICE, record.id).state is State.EXPIRED
        assert service.list(ALICE).records == ()
        clock.forward(30 * DAY)
        assert service.life.tend().removed == 1
        with pytest.raises(NotFound):
            service.get(ALICE, record.id)
        assert service.past_kv_epochs(ALICE) == [0] and list(service.users_with_past_kv()) == [ALICE]

    def test_an_expired_one_can_be_brought_back(self, service: MemoryService, clock: Clock) -> None:
        record = service.add(ALICE, "The door code is 7.", ttl_s=DAY)
        clock.forward(2 * DAY)
        service.life.tend()
        back = service.life.set_state(ALICE, record.id, "activated")
        assert (back.state, back.expires_at) == (State.ACTIVATED, None)
        assert texts(service.search(ALICE, "door")) == ["The door code is 7."]

    def test_new_rules_are_followed(self, service: MemoryService, clock: Clock) -> None:
        service.add(ALICE, "tea")
        service._store.aging = Aging(archive_after_s=50 * DAY)
        clock.forward(20 * DAY)
        assert service.life.tend().archived == 0
        clock.forward(31 * DAY)
        assert service.life.tend().archived == 1

    def test_a_clock_that_goes_back_moves_nothing(self, service: MemoryService, clock: Clock) -> None:
        record = service.add(ALICE, "tea", ttl_s=100 * DAY)
        clock.forward(-10_000 * DAY)
        service.life.used(ALICE, {"late": [record.id]})
        changed = service.update(ALICE, record.id, text="green tea")
        assert service.life.tend().archived == 0
        assert changed.version == 2 and service.life.cube(ALICE, record.id)["header"]["behavioural"]["retention"] == 1.0
        assert texts(service.history(ALICE, record.id)) == ["tea", "green tea"]
        snapshot = service.life.take_snapshot(ALICE, "then")
        assert snapshot.id > record.id

    def test_each_batch_takes_the_longest_overdue(self, service: MemoryService, clock: Clock) -> None:
        for number in range(5):
            service.add((ALICE, BOB)[number % 2], f"tea {number}")
            clock.forward(1)
        clock.forward(11 * DAY)
        assert service.life.tend(limit=3).archived == 3
        assert texts(service.list(ALICE, state="generated").records) == ["tea 4"]
        assert service.life.tend(limit=3).archived == 2

    @pytest.mark.parametrize("ttl_s", [-1, "5", True, float("nan"), float("inf"), 1e12])
    def test_bad_times_to_live(self, service: MemoryService, ttl_s: object) -> None:
        with pytest.raises(RequestError, match="'ttl_s'"):
            service.add(ALICE, "tea", ttl_s=ttl_s)


class TestMerge:
    def test_the_kept_one_has_what_both_had(self, service: MemoryService) -> None:
        kept = service.add(ALICE, "I like tea.", tags=["a"], origin={"source": "one"})
        copy = service.add(ALICE, "Tea is what I like.", tags=["b"], pinned=True, origin={"source": "two"})
        merged = service.life.merge(ALICE, kept.id, [copy.id])
        assert (merged.tags, merged.pinned, merged.uses, merged.version) == (("a", "b"), True, 2, 2)
        old = service.get(ALICE, copy.id)
        assert (old.state, old.superseded_by) == (State.MERGED, kept.id)
        assert texts(service.list(ALICE).records) == ["I like tea."]
        assert {version.origin["source"] for version in service.history(ALICE, kept.id)} == {"one", "two"}
        (link,) = service.life.links(ALICE, kept.id)
        assert (link.type, link.source, link.target) == ("merged_into", copy.id, kept.id)

    def test_near_duplicates_that_are_said_merge(self, service: MemoryService) -> None:
        (first,) = service.remember(ALICE, says("I like green tea."), session="a")
        (second,) = service.remember(ALICE, says("I really like the green tea!"), session="b")
        assert (second.id, second.text, second.uses) == (first.id, "I like green tea.", 2)
        assert [record.session for record in service.history(ALICE, first.id)] == ["b", "a"]
        assert texts(service.search(ALICE, "green tea")) == ["I like green tea."]

    @pytest.mark.parametrize(
        "other", ["I don't like green tea.", "I like black tea.", "I like tea green.", "Green tea likes me."]
    )
    def test_what_says_something_else_does_not(self, service: MemoryService, other: str) -> None:
        service.remember(ALICE, says("I like green tea."))
        service.remember(ALICE, says(other))
        assert len(service.list(ALICE).records) == 2

    def test_a_new_text_is_a_version_and_a_new_epoch(self, service: MemoryService) -> None:
        kept, copy = service.add(ALICE, "tea"), service.add(ALICE, "milk")
        assert service.life.merge(ALICE, kept.id, [copy.id], "tea with milk").text == "tea with milk"
        assert service.kv_epoch(ALICE) == 1

    def test_deleting_the_kept_one_takes_its_copies(self, service: MemoryService) -> None:
        ids = [service.add(ALICE, f"tea {i}").id for i in range(4)]
        service.life.merge(ALICE, ids[1], [ids[0]])
        service.life.merge(ALICE, ids[2], [ids[1]])
        receipt = service.delete(ALICE, ids[2])
        assert set(receipt.records) == set(ids[:3]) and receipt.links == 2
        assert [record.id for record in service.list(ALICE, include_superseded=True).records] == [ids[3]]

    def test_a_copy_can_be_brought_back(self, service: MemoryService) -> None:
        kept, copy = service.add(ALICE, "tea"), service.add(ALICE, "milk")
        service.life.merge(ALICE, kept.id, [copy.id])
        service.life.set_state(ALICE, copy.id, "activated")
        assert texts(service.list(ALICE).records) == ["tea", "milk"]
        assert service.delete(ALICE, kept.id).records == (kept.id,)

    @pytest.mark.parametrize("others", [[], "abc", ["self"], [5], None])
    def test_of_nothing_is_refused(self, service: MemoryService, others: object) -> None:
        kept = service.add(ALICE, "tea")
        with pytest.raises(RequestError, match="'with'"):
            service.life.merge(ALICE, kept.id, [kept.id] if others == ["self"] else others)  # type: ignore[arg-type]

    def test_with_a_strangers_memory_is_not_found(self, service: MemoryService) -> None:
        kept, theirs = service.add(ALICE, "tea"), service.add(BOB, "tea")
        with pytest.raises(NotFound):
            service.life.merge(ALICE, kept.id, [theirs.id])


class TestCorrections:
    def test_a_deleted_correction_leaves_no_dangling_reference(self, service: MemoryService) -> None:
        (old,) = service.remember(ALICE, says("My job is baker."))
        (new,) = service.remember(ALICE, says("My job is pilot."))
        service.delete(ALICE, new.id)
        left = service.get(ALICE, old.id)
        assert left.superseded_by is None and left.valid_to is not None
        assert not left.is_current and service.search(ALICE, "baker") == []
        assert service.life.links(ALICE, old.id) == []
        assert service.remember(ALICE, says("My job is baker."))[0].id != old.id

    def test_a_deleted_one_in_the_middle_closes_the_gap(self, service: MemoryService) -> None:
        ids = [service.remember(ALICE, says(f"My job is {job}."))[0].id for job in ("baker", "cook", "pilot")]
        service.delete(ALICE, ids[1])
        assert texts(service.history(ALICE, ids[2])) == ["My job is baker.", "My job is pilot."]
        assert service.get(ALICE, ids[0]).superseded_by == ids[2]
        assert service.get(ALICE, ids[2]).supersedes == ids[0]


class TestLinks:
    def test_can_be_read_from_both_ends_and_end_in_time(self, service: MemoryService, clock: Clock) -> None:
        ann, bob = service.add(ALICE, "Ann is a baker."), service.add(ALICE, "Bob is a pilot.")
        link = service.life.link(ALICE, ann.id, bob.id, "married_to", valid_from="2020-05-01", origin={"by": "test"})
        assert service.life.links(ALICE, ann.id) == service.life.links(ALICE, bob.id) == [link]
        assert service.life.links(ALICE, ann.id, type="parent_of") == []
        assert service.life.links(ALICE, ann.id, at="2019-01-01T00:00:00Z") == []
        clock.forward(DAY)
        ended = service.life.end_link(ALICE, link.id)
        assert ended.valid_to == clock.now
        assert service.life.links(ALICE, bob.id, at="2021-01-01") == [ended]
        assert service.life.links(ALICE, bob.id, at=clock.now) == []
        service.life.end_link(ALICE, link.id, remove=True)
        assert service.life.links(ALICE, ann.id) == []

    def test_go_with_either_memory(self, service: MemoryService) -> None:
        for place in (0, 1):
            ends = [service.add(ALICE, "a").id, service.add(ALICE, "b").id]
            service.life.link(ALICE, *ends, "related_to")
            assert service.delete(ALICE, ends[place]).links == 1
            assert service.life.links(ALICE, ends[1 - place]) == []

    def test_what_was_derived_is_on_the_receipt(self, service: MemoryService) -> None:
        text, adapter = service.add(ALICE, "tea"), service.add(ALICE, "adapter of tea", type="trajectory")
        service.life.link(ALICE, adapter.id, text.id, "derived_from")
        assert service.life.cube(ALICE, text.id)["payload"]["derived"] == [adapter.id]
        assert service.delete(ALICE, text.id).derived == (adapter.id,)

    def test_are_a_users_own(self, service: MemoryService) -> None:
        mine, theirs = service.add(ALICE, "tea"), service.add(BOB, "tea")
        other = service.add(ALICE, "milk")
        link = service.life.link(ALICE, mine.id, other.id, "related_to")
        for call in (
            lambda: service.life.link(ALICE, mine.id, theirs.id, "related_to"),
            lambda: service.life.links(BOB, mine.id),
            lambda: service.life.end_link(BOB, link.id),
            lambda: service.life.end_link(BOB, "x"),
        ):
            with pytest.raises(NotFound):
                call()

    @pytest.mark.parametrize("type", ["", "Likes", "a b", "1a", "x" * 65, 5, "supersedes", "merged_into"])
    def test_bad_types(self, service: MemoryService, type: object) -> None:
        ids = [service.add(ALICE, "a").id, service.add(ALICE, "b").id]
        with pytest.raises(RequestError):
            service.life.link(ALICE, *ids, type)  # type: ignore[arg-type]

    @pytest.mark.parametrize("times", [("x", None), (None, 5), ("2026-01-02", "2026-01-01"), ("9999-99-99", None)])
    def test_bad_times(self, service: MemoryService, times: tuple[object, object]) -> None:
        ids = [service.add(ALICE, "a").id, service.add(ALICE, "b").id]
        with pytest.raises(RequestError, match=r"valid_(from|to)"):
            service.life.link(ALICE, *ids, "related_to", valid_from=times[0], valid_to=times[1])  # type: ignore[arg-type]

    def test_to_itself_is_refused(self, service: MemoryService) -> None:
        record = service.add(ALICE, "a")
        with pytest.raises(RequestError, match="itself"):
            service.life.link(ALICE, record.id, record.id, "related_to")


class TestSnapshots:
    def test_a_rollback_brings_back_and_loses_nothing(self, service: MemoryService, clock: Clock) -> None:
        tea = service.add(ALICE, "I like tea.", tags=["x"])
        (job,) = service.remember(ALICE, says("My job is baker."))
        twin = service.add(ALICE, "Tea, please.")
        snapshot = service.life.take_snapshot(ALICE, "before")
        assert (snapshot.memories, service.life.snapshots(ALICE)) == (3, [snapshot])
        clock.forward(60)
        service.update(ALICE, tea.id, text="I like milk.", tags=[])
        service.remember(ALICE, says("My job is pilot."))
        service.life.merge(ALICE, tea.id, [twin.id])
        (new,) = service.remember(ALICE, says("I have a cat."))
        after = service.life.take_snapshot(ALICE, "after")
        done = service.life.roll_back(ALICE, snapshot.id)
        assert set(done.restored) == {tea.id, job.id, twin.id} and new.id in done.archived
        current = service.list(ALICE).records
        assert texts(each for each in current if each.state is not State.ARCHIVED) == [
            "I like tea.", "My job is baker.", "Tea, please.",
        ]  # fmt: skip
        assert texts(service.search(ALICE, "job tea milk cat")) != []
        assert "My job is pilot." not in texts(service.search(ALICE, "job"))
        assert texts(service.history(ALICE, tea.id)) == ["I like tea.", "I like milk.", "I like tea."]
        assert service.kv_epoch(ALICE) > 0
        service.life.roll_back(ALICE, after.id)
        assert "My job is pilot." in texts(service.search(ALICE, "job"))
        assert service.get(ALICE, tea.id).text == "I like milk."
        assert service.get(ALICE, twin.id).state is State.MERGED

    def test_a_deleted_memory_is_in_no_snapshot(self, service: MemoryService) -> None:
        record = service.add(ALICE, "secret tea")
        snapshot = service.life.take_snapshot(ALICE, "with it")
        service.life.take_snapshot(ALICE, "again")
        assert service.delete(ALICE, record.id).snapshot_entries == 2
        assert service.life.roll_back(ALICE, snapshot.id).restored == []
        assert service.list(ALICE, include_superseded=True).records == ()

    def test_frozen_ones_stay(self, service: MemoryService) -> None:
        record = service.add(ALICE, "tea")
        snapshot = service.life.take_snapshot(ALICE, "s")
        service.update(ALICE, record.id, text="milk")
        later = service.add(ALICE, "later")
        for each in (record, later):
            service.life.set_state(ALICE, each.id, "frozen")
        assert set(service.life.roll_back(ALICE, snapshot.id).frozen) == {record.id, later.id}
        assert texts(service.list(ALICE).records) == ["milk", "later"]

    def test_are_a_users_own_and_can_be_deleted(self, service: MemoryService) -> None:
        snapshot = service.life.take_snapshot(ALICE, "s")
        assert service.life.snapshots(BOB) == []
        for call in (service.life.roll_back, service.life.remove_snapshot):
            with pytest.raises(NotFound):
                call(BOB, snapshot.id)
        service.life.remove_snapshot(ALICE, snapshot.id)
        assert service.life.snapshots(ALICE) == []

    def test_are_counted(self, service: MemoryService) -> None:
        for number in range(MAX_SNAPSHOTS):
            service.life.take_snapshot(ALICE, str(number))
        with pytest.raises(Conflict, match="delete one"):
            service.life.take_snapshot(ALICE, "one more")

    def test_go_with_everything(self, service: MemoryService) -> None:
        service.add(ALICE, "tea")
        service.life.take_snapshot(ALICE, "s")
        assert service.delete_all(ALICE).snapshot_entries == 1
        assert service.life.snapshots(ALICE) == []


def test_a_cube_has_all_of_its_header(service: MemoryService, tmp_path: Path) -> None:
    record = service.add(ALICE, "tea", tags=["x"], valid_from="2020-01-01", priority=1, origin={"source": "api"})
    service.update(ALICE, record.id, text="green tea")
    cube = service.life.cube(ALICE, record.id)
    assert set(cube) == {"id", "header", "payload", "links", "versions"}
    assert cube["payload"]["text"] == "green tea"
    assert [old["version"] for old in cube["versions"]] == [1]
    descriptive, governance = cube["header"]["descriptive"], cube["header"]["governance"]
    assert descriptive["valid_from"] == "2020-01-01T00:00:00+00:00" and descriptive["origin"] == {"source": "api"}
    assert (governance["priority"], governance["state"], governance["sensitivity"]) == (1, "generated", "normal")
    with pytest.raises(NotFound):
        service.life.cube(BOB, record.id)
