"""``memos doctor`` of adapters: files that are gone or damaged, and an index that cannot be read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from memos_vllm import doctor
from memos_vllm.adapters import examination
from memos_vllm.adapters.examination import examine_adapters
from tests.adapters.adapter_factories import ALICE, BOB, adapter_folder, open_registry
from tests.memory.memory_factories import make_service


@pytest.fixture
def digests(tmp_path: Path) -> list[str]:
    """Two contents in a data directory's registry, the first under two names."""
    registry = open_registry(tmp_path / "adapters")
    made = [
        registry.register(who, name, adapter_folder(tmp_path / "sent" / name, seed)).version().digest
        for who, name, seed in ((ALICE, "style", 0), (BOB, "tone", 0), (ALICE, "other", 1))
    ]
    registry.close()
    assert made[0] == made[1] != made[2]
    return made[1:]


def test_a_sound_registry(tmp_path: Path, digests: list[str]) -> None:
    before = {file: file.read_bytes() for file in (tmp_path / "adapters").rglob("*") if file.is_file()}
    report = examine_adapters(tmp_path / "adapters")
    assert (report.contents, report.problems, report.notes) == (2, [], [])
    before.pop(tmp_path / "adapters" / "index" / "lock.mdb")  # where readers say that they read
    assert {file: file.read_bytes() for file in before} == before


def test_no_registry_is_no_problem(tmp_path: Path) -> None:
    assert examine_adapters(tmp_path / "adapters") == examination.AdapterReport()
    assert not (tmp_path / "adapters").exists()


def test_files_that_are_not_what_was_registered(tmp_path: Path, digests: list[str]) -> None:
    objects = tmp_path / "adapters" / "objects"
    with open(objects / digests[0] / "adapter_model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    shutil.rmtree(objects / digests[1])
    (objects / ("0" * 64)).mkdir()
    report = examine_adapters(tmp_path / "adapters")
    assert sorted(line.split(";")[0] for line in report.problems) == [
        "adapters other@1 of shop/alice: its files are gone",
        "adapters style@1 of shop/alice: its files are damaged",
        "adapters tone@1 of shop/bob: its files are damaged",
    ]
    assert len(report.notes) == 1 and "1 contents that no name has" in report.notes[0]


def test_what_a_server_deletes_meanwhile_is_no_problem(
    tmp_path: Path, digests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = examination._problem

    def delete_first(folder: Path, digest: str) -> str | None:
        if folder.name == digests[1] and folder.exists():
            registry = open_registry(tmp_path / "adapters")
            (gone,) = registry.delete(ALICE, "other").contents
            assert registry.remove_files(gone)
            registry.close()
        return problem(folder, digest)

    monkeypatch.setattr(examination, "_problem", delete_first)
    assert examine_adapters(tmp_path / "adapters").problems == []


@pytest.mark.parametrize("harm", ["truncated", "overwritten", "a record"])
def test_an_index_that_cannot_be_read(tmp_path: Path, digests: list[str], harm: str) -> None:
    data = tmp_path / "adapters" / "index" / "data.mdb"
    raw = data.read_bytes()
    if harm == "truncated":
        os.truncate(data, len(raw) // 2)
    elif harm == "overwritten":
        data.write_bytes(bytes(len(raw)))
    else:
        data.write_bytes(raw.replace(b'"versions"', b'"Versions"'))
    (problem,) = examine_adapters(tmp_path / "adapters").problems
    assert "index of adapters" in problem and "restore it from a backup" in problem
    assert ("truncated" in problem) is (harm == "truncated"), "found before a page beyond the end is touched"


def test_the_command_tells_of_them(tmp_path: Path, digests: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make_service(tmp_path / "memory")._store.close()
    assert doctor.main([str(tmp_path)]) == doctor.CLEAN
    assert "adapters: 2\nall is well" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "adapters" / "objects" / digests[0])
    for options in ([], ["--repair"]):
        assert doctor.main([str(tmp_path), *options]) == doctor.PROBLEMS
        assert "style@1 of shop/alice: its files are gone" in capsys.readouterr().out
