"""KV of engines that are gone is removed at start, and nothing else is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from memos_vllm.store import gone_engines
from memos_vllm.store.disk_index import DiskIndex
from memos_vllm.store.gone_engines import remove_gone
from memos_vllm.store.ops import path_for_rank
from tests.store.store_factories import make_identity, make_keys, random_rows, write_chunk

IDENTITY = make_identity()


def fill(kv: Path, number: int, close: bool = True) -> DiskIndex:
    """As an engine leaves its directory: an index and a chunk's file."""
    index = DiskIndex(kv / f"dp{number}", IDENTITY, 10**6, 1)
    chunk = index.plan_write(make_keys(number + 1), 64, b"tag")
    path = path_for_rank(chunk.path, 0)
    write_chunk(path, random_rows(1, 64), make_keys(number + 1), IDENTITY, 0)
    assert index.commit(chunk.chunk)
    if close:
        index.close()
    return index


def left(kv: Path) -> list[str]:
    return sorted(each.name for each in kv.iterdir())


def test_of_four_engines_two_are_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 1, 2, 3, 10):
        fill(tmp_path, number)
    (tmp_path / "dp3" / "index.damaged-1").mkdir()
    (tmp_path / "dp3" / "index.opening").write_text("")
    ((tmp_path / "dp3").glob("*/??").__next__() / ".chunk.tmp").write_text("")
    before = sorted((tmp_path / "dp1").rglob("*"))
    with caplog.at_level(logging.INFO):
        remove_gone(tmp_path, 2)
    assert left(tmp_path) == ["dp0", "dp1"] and sorted((tmp_path / "dp1").rglob("*")) == before
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3 and "dp10 was removed" in caplog.text
    remove_gone(tmp_path, 2)
    assert len(caplog.records) == 3
    index = DiskIndex(tmp_path / "dp1", IDENTITY, 10**6, 1)
    assert len(index) == 1
    index.close()


def test_without_a_kv_directory_there_is_nothing_to_do(tmp_path: Path) -> None:
    remove_gone(tmp_path / "kv", 1)
    assert left(tmp_path) == []


def another_file(root: Path) -> None:
    (root / "notes.txt").write_text("mine")


def a_file_among_chunks(root: Path) -> None:
    next(root.glob("*/??")).joinpath("model.safetensors").write_text("mine")


def a_link_among_chunks(root: Path) -> None:
    next(root.glob("*/??")).joinpath("ab" * 20 + ".-.r0.safetensors").symlink_to("/nowhere")


def no_lock(root: Path) -> None:
    (root / "lock").unlink()


def a_mount(root: Path) -> None:
    """Told by ``ismount``, which a test cannot have in earnest."""


@pytest.mark.parametrize("harm", [another_file, a_file_among_chunks, a_link_among_chunks, no_lock, a_mount])
def test_what_is_not_certainly_an_engines_is_left_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    fill(tmp_path, 1)
    harm(tmp_path / "dp1")
    if harm is a_mount:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "index")
    before = sorted((tmp_path / "dp1").rglob("*"))
    remove_gone(tmp_path, 1)
    assert sorted((tmp_path / "dp1").rglob("*")) == before and "dp1 is not removed" in caplog.text


@pytest.mark.parametrize("name", ["dp", "dp01", "dp1.old", "dpx", "old-dp1"])
def test_another_name_is_left(tmp_path: Path, name: str) -> None:
    fill(tmp_path, 1)
    (tmp_path / "dp1").rename(tmp_path / name)
    remove_gone(tmp_path, 1)
    assert left(tmp_path) == [name] and (tmp_path / name / "lock").is_file()


def test_a_link_to_a_directory_is_left(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", 1)
    (tmp_path / "dp1").symlink_to(tmp_path / "elsewhere" / "dp1")
    remove_gone(tmp_path, 1)
    assert (tmp_path / "dp1" / "lock").is_file()


def test_an_engine_that_still_runs_keeps_its_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a server that was killed."""
    index = fill(tmp_path, 1, close=False)
    remove_gone(tmp_path, 1)
    assert left(tmp_path) == ["dp1"] and "a process has it open" in caplog.text
    index.close()
    remove_gone(tmp_path, 1)
    assert left(tmp_path) == []


def test_what_was_not_removed_whole_is_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 1)
    remove = gone_engines.shutil.rmtree
    done: list[Path] = []

    def fails(path: Path) -> None:
        if done:
            raise OSError(5, "Input/output error")
        done.append(path)
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(gone_engines.shutil, "rmtree", fails)
        remove_gone(tmp_path, 1)
    assert done and left(tmp_path) == ["dp1"] and "could not be removed" in caplog.text
    remove_gone(tmp_path, 1)
    assert left(tmp_path) == []
