"""Names, versions, rights, numbers and files of adapters."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.adapters import provenance, records
from memos_vllm.adapters.records import Scope
from memos_vllm.adapters.registry import AdapterRegistry
from memos_vllm.errors import AdapterError, AdapterUnavailable, Forbidden, NotFound
from memos_vllm.types import Principal
from tests.adapters.adapter_factories import ALICE, BASE, BOB, EVE, adapter_folder, open_registry


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return open_registry(tmp_path / "registry")


def folders(registry: AdapterRegistry) -> set[str]:
    return {folder.name for folder in (registry.root / "objects").iterdir()}


def add(registry: AdapterRegistry, tmp_path: Path, who=ALICE, name="style", seed=0, **options):  # type: ignore[no-untyped-def]
    folder = tmp_path / f"{who.user}-{name}-{seed}-{len(list(tmp_path.iterdir()))}"
    return registry.register(who, name, adapter_folder(folder, seed), **options)


# -- rights -------------------------------------------------------------------------------------


def test_a_private_adapter_is_its_owners(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path)
    assert registry.find(ALICE, "style")[1].version == 1
    for stranger in (BOB, EVE):
        assert registry.list(stranger) == []
        for call in (registry.find, registry.delete, registry.set_profile):
            with pytest.raises(NotFound):
                call(stranger, "style")


def test_the_digest_of_anothers_adapter_is_no_key_to_it(registry: AdapterRegistry, tmp_path: Path) -> None:
    version = add(registry, tmp_path).version()
    for reference in (version.lora_name, version.digest, "../style", "objects/" + version.digest, "style@0", ""):
        with pytest.raises((NotFound, AdapterError)):
            registry.find(EVE, reference)


def test_sharing_ends_at_the_tenant(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path, scope=Scope.TENANT)
    assert registry.find(BOB, "style")[0].owner == ALICE
    assert "origin" not in registry.find(BOB, "style")[0].as_json(BOB)["versions"][0]
    with pytest.raises(NotFound):
        registry.find(EVE, "style")
    with pytest.raises(NotFound):
        registry.delete(BOB, "style")


def test_a_shared_name_cannot_be_taken_over(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path, scope=Scope.TENANT)
    with pytest.raises(Forbidden, match="somebody else"):
        add(registry, tmp_path, who=BOB, seed=1, scope=Scope.TENANT)
    add(registry, tmp_path, who=BOB, seed=1)
    assert registry.find(BOB, "style")[0].owner == BOB, "his own goes before the shared one"
    assert registry.find(ALICE, "style")[0].owner == ALICE


def test_sharing_with_all_is_the_operators_to_allow(tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match="may_share_with_all"):
        add(open_registry(tmp_path / "one"), tmp_path, scope=Scope.ALL)
    registry = open_registry(tmp_path / "two", may_share_with_all=["shop"])
    add(registry, tmp_path, scope=Scope.ALL)
    assert registry.find(EVE, "style")[0].owner == ALICE


# -- versions and numbers -----------------------------------------------------------------------


def test_a_name_has_versions_and_any_can_be_current(registry: AdapterRegistry, tmp_path: Path) -> None:
    first, second = (add(registry, tmp_path, seed=seed).version() for seed in (0, 1))
    assert registry.find(ALICE, "style")[1] == second and registry.find(ALICE, "style@1")[1] == first
    assert registry.select(ALICE, "style", 1).version() == first
    assert add(registry, tmp_path, seed=2).current == 3
    with pytest.raises(NotFound):
        registry.select(ALICE, "style", 9)


def test_the_same_content_sent_twice_is_one_version(registry: AdapterRegistry, tmp_path: Path) -> None:
    assert add(registry, tmp_path) == add(registry, tmp_path)


def test_numbers_are_those_of_the_content_in_every_process(tmp_path: Path) -> None:
    one = add(open_registry(tmp_path / "one"), tmp_path).version()
    other = add(open_registry(tmp_path / "two"), tmp_path, name="other").version()
    assert one.digest == other.digest
    assert one.lora_int_id == other.lora_int_id == int(one.digest, 16) & 0x7FFFFFFF
    assert one.lora_name != other.lora_name, "KV of another deployment, or from before a deletion, is not this one's"


def test_a_number_is_never_two_contents(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "first_id", lambda digest: records.LAST_ID)
    versions = [add(registry, tmp_path, name=f"n{seed}", seed=seed).version() for seed in range(3)]
    assert [each.lora_int_id for each in versions] == [records.LAST_ID, records.FIRST_ID, records.FIRST_ID + 1]
    registry.delete(ALICE, "n0")
    assert add(registry, tmp_path, name="n3", seed=3).version().lora_int_id == records.FIRST_ID + 2
    assert add(registry, tmp_path, name="n4", seed=0).version().lora_int_id == records.LAST_ID, "its old number"


def test_numbers_leave_room_for_vllms_own() -> None:
    assert records.first_id(bytes(32)) == records.FIRST_ID > 0
    assert records.first_id(b"\xff" * 32) == records.LAST_ID == 0x7FFFFFFF


def test_the_same_content_of_two_owners_has_two_names_and_one_number(registry: AdapterRegistry, tmp_path: Path) -> None:
    """What one of them computed goes with his version, and does not slow the other down."""
    one, other = (add(registry, tmp_path, who=who).version() for who in (ALICE, BOB))
    assert one.lora_int_id == other.lora_int_id and one.lora_name != other.lora_name


def test_content_that_comes_back_has_a_new_name(registry: AdapterRegistry, tmp_path: Path) -> None:
    before = add(registry, tmp_path).version()
    for version in registry.delete(ALICE, "style").contents:
        assert registry.remove_files(version)
    after = add(registry, tmp_path).version()
    assert before.digest == after.digest and before.lora_name != after.lora_name


# -- use ----------------------------------------------------------------------------------------


def test_files_stay_while_a_request_uses_them(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path)
    with registry.use(ALICE, "style") as used:
        (version,) = registry.delete(ALICE, "style").contents
        assert not registry.wait_until_free(version, timeout_s=0) and not registry.remove_files(version)
        assert (used.folder / "adapter_model.safetensors").exists()
        with pytest.raises(NotFound), registry.use(ALICE, "style"):
            pass
    assert registry.wait_until_free(version, timeout_s=0) and registry.remove_files(version)
    assert folders(registry) == set()


def test_a_deletion_that_was_faster_than_the_lock_is_noticed(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, tmp_path)
    holding = registry.files.holding

    def slow(digest: str):  # type: ignore[no-untyped-def]
        registry.delete(ALICE, "style")
        return holding(digest)

    monkeypatch.setattr(registry.files, "holding", slow)
    with pytest.raises(NotFound), registry.use(ALICE, "style"):
        pass
    assert registry.files.num_held == 0


def hold(root: Path, held: multiprocessing.Event, let_go: multiprocessing.Event) -> None:  # type: ignore[valid-type]
    with open_registry(root).use(ALICE, "style"):
        held.set()
        let_go.wait(30)


def test_another_process_holds_them_too(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path)
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(registry.root, held, let_go))
    process.start()
    assert held.wait(30)
    (version,) = registry.delete(ALICE, "style").contents
    assert not registry.remove_files(version)
    let_go.set()
    process.join(30)
    assert registry.remove_files(version)


def test_content_that_another_name_has_stays(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path)
    add(registry, tmp_path, who=BOB)
    removed = registry.delete(ALICE, "style")
    assert removed.references == ("style@1",) and len(removed.versions) == 1 and removed.contents == ()
    with registry.use(BOB, "style") as used:
        assert used.folder.exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_files_are_not_served(registry: AdapterRegistry, tmp_path: Path, damage: str) -> None:
    version = add(registry, tmp_path).version()
    with registry.use(ALICE, "style"):
        pass
    path = registry.root / "objects" / version.digest / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(raw if damage == "flip" else raw[:-1])
    with pytest.raises(AdapterUnavailable, match="register it again"), registry.use(ALICE, "style"):
        pass
    add(registry, tmp_path)
    with registry.use(ALICE, "style") as used:
        assert (used.folder / "adapter_model.safetensors").stat().st_size == len(raw), "registering repairs it"


def test_an_adapter_for_another_model_is_not_served(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path)
    registry.close()
    other = open_registry(registry.root, fingerprint="e" * 64)
    with pytest.raises(AdapterUnavailable, match="another model"), other.use(ALICE, "style"):
        pass


def test_a_server_without_lora_keeps_what_there_is_and_takes_nothing(tmp_path: Path) -> None:
    registry = open_registry(tmp_path / "r")
    add(registry, tmp_path)
    registry.close()
    registry = open_registry(tmp_path / "r", base=None)
    assert [adapter.name for adapter in registry.list(ALICE)] == ["style"]
    with pytest.raises(AdapterError, match="--enable-lora"):
        add(registry, tmp_path, seed=1)


# -- profiles and provenance --------------------------------------------------------------------


def test_a_default_goes_with_its_adapter(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path, scope=Scope.TENANT)
    add(registry, tmp_path, who=EVE, seed=1)
    for who in (ALICE, BOB, EVE):
        registry.set_profile(who, "style")
    assert registry.delete(ALICE, "style").profiles == 2
    assert [registry.profile(who) for who in (ALICE, BOB, EVE)] == [None, None, "style"]


def distilled(*ids: str, who: Principal = ALICE, took_s: float = 1) -> dict[str, Any]:
    memories = [{"id": each, "version": 1, "fingerprint": "f"} for each in ids]
    return {"distilled": {"tenant": who.tenant, "user": who.user, "memories": memories, "took_s": took_s}}


def test_withdrawing_a_memory_removes_what_was_distilled_from_it(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path, name="hand-made")
    add(registry, tmp_path, name="knows", seed=1, origin=distilled("m1"))
    add(registry, tmp_path, name="knows", seed=2, origin=distilled("m1", "m2"))
    assert registry.distilled_from(ALICE, "m1") == ["knows@1", "knows@2"] and registry.distilled_from(BOB, "m1") == []
    assert registry.withdraw(BOB, ["m2"]).references == ()
    assert registry.withdraw(ALICE, ["m2"]).references == ("knows@2",)
    assert registry.find(ALICE, "knows")[1].version == 1, "the newest of the rest is current"
    assert [source["id"] for source in registry.sources(ALICE)] == ["m1"] and registry.sources(BOB) == []
    assert registry.distilled_users() == {ALICE}
    assert registry.withdraw(ALICE, ["m1"]).references == ("knows@1",)
    assert [adapter.name for adapter in registry.list(ALICE)] == ["hand-made"]
    assert registry.distilled_users() == set() and registry.sources(ALICE) == []


def test_one_name_is_withdrawn_and_others_stay(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path, name="one", origin=distilled("m1"))
    add(registry, tmp_path, name="two", seed=1, origin=distilled("m1"), scope=Scope.TENANT)
    add(registry, tmp_path, name="two", seed=2, who=BOB, origin=distilled("m1", who=BOB, took_s=7))
    assert registry.distilled_users() == {ALICE, BOB} and registry.distillation_s() == 7
    assert sorted(registry.withdraw(ALICE, ["m1"]).references) == ["one@1", "two@1"]
    assert registry.distilled_users() == {BOB} and registry.distilled_from(BOB, "m1") == ["two@1"]
    registry.delete(BOB, "two")
    assert registry.distilled_users() == set() and registry.distillation_s() is None


def test_looking_for_a_users_distilled_adapters_reads_no_adapter(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happens with each deletion by anybody, and each minute for every user: reading all would take minutes."""
    for who in (ALICE, BOB, EVE):
        add(registry, tmp_path, who=who, origin=distilled("m1", who=who))
    decoded = []
    decode = records.decode
    monkeypatch.setattr(records, "decode", lambda raw: (decoded.append(raw), decode(raw))[1])
    assert registry.distilled_users() == {ALICE, BOB, EVE} and registry.distillation_s() == 1
    assert [source["id"] for source in registry.sources(BOB)] == ["m1"]
    assert registry.distilled_from(BOB, "m1") == ["style@1"] and registry.withdraw(BOB, ["m2"]).references == ()
    assert decoded == []


def test_an_index_from_before_gets_to_know_what_was_distilled(registry: AdapterRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path, origin=distilled("m1"))
    known = registry.sources(ALICE)
    with registry._index._env.begin(write=True) as txn:
        table = registry._index._env.open_db(provenance.TABLE, txn=txn)
        txn.drop(table, delete=False)
        txn.put(b"left by another release", b"{}", db=table)
    assert registry.sources(ALICE) == []
    registry.close()
    again = open_registry(registry.root)
    assert again.sources(ALICE) == known and again.distilled_users() == {ALICE}
    before = again.stamp()
    again.close()
    assert open_registry(registry.root).stamp() == before, "what is right is not written again"


# -- limits and crashes -------------------------------------------------------------------------


def test_the_budget_holds(tmp_path: Path) -> None:
    registry = open_registry(tmp_path / "r", disk_bytes=400)
    add(registry, tmp_path)
    with pytest.raises(AdapterError, match="no room") as caught:
        add(registry, tmp_path, seed=1)
    assert caught.value.status == 507 and len(folders(registry)) == 1


def test_what_a_crash_left_is_removed_at_the_next_start(registry: AdapterRegistry, tmp_path: Path) -> None:
    kept = add(registry, tmp_path).version().digest
    (registry.root / "incoming" / "half").mkdir()
    (registry.root / "objects" / ("0" * 64)).mkdir()
    registry.close()
    again = open_registry(registry.root)
    assert folders(again) == {kept} and not list((again.root / "incoming").iterdir())


def test_a_registration_that_fails_leaves_nothing(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("crash")

    monkeypatch.setattr(registry._index.names, "put", fail)
    with pytest.raises(RuntimeError):
        add(registry, tmp_path)
    assert folders(registry) == set() and registry.list(ALICE) == []


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "a" * 65, "default", "a@1", "-a"])
def test_names_that_are_none(registry: AdapterRegistry, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="name"):
        registry.register(ALICE, name, adapter_folder(tmp_path / "x"))
    assert BASE.max_rank == 8
