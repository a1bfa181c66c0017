"""A disk that is really full, and one that is read-only. Needs the right to mount."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memos_vllm import doctor
from memos_vllm.errors import DataDirError, StoreFull
from memos_vllm.memory.store import MemoryStore
from tests.memory.memory_factories import ALICE, GIB, make_service, texts

Remount = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Remount]]:
    """A file system of 2 MiB, and how to change it."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield path, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True) and None
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_loses_nothing_and_takes_more_when_there_is_room(disk: tuple[Path, Remount]) -> None:
    path, remount = disk
    service = make_service(path / "memory")
    stored = []
    with pytest.raises(StoreFull, match=r"disk .* is full and nothing of this write was stored"):
        while True:
            stored += [r.id for r in service.add_many(ALICE, [{"text": "tea " * 1000} for _ in range(10)])]
    assert stored and [record.id for record in service.list(ALICE, limit=1000).records] == stored
    assert len(service.search(ALICE, "tea", top_k=5)) == 5
    for _ in range(3):
        with pytest.raises(StoreFull):
            service.add(ALICE, "x" * 2**20)
    remount("size=16m")
    stored.append(service.add(ALICE, "x" * 2**20).id)
    service._store.close()
    assert doctor.main([str(path)]) == doctor.CLEAN
    service = make_service(path / "memory")
    assert [record.id for record in service.list(ALICE, limit=1000).records] == stored
    service._store.close()


def test_nothing_opens_on_a_full_disk_and_the_error_says_so(disk: tuple[Path, Remount]) -> None:
    path, _ = disk
    (path / "other").write_bytes(bytes(2 * 2**20 - 8192))
    with pytest.raises(DataDirError, match=r"no space left|disk is full"):
        MemoryStore(path / "memory", GIB)
    (path / "other").unlink()
    MemoryStore(path / "memory", GIB).close()


def test_a_read_only_disk(disk: tuple[Path, Remount], capsys: pytest.CaptureFixture[str]) -> None:
    path, remount = disk
    service = make_service(path / "memory")
    service.add(ALICE, "tea")
    service._store.close()
    remount("ro")
    with pytest.raises(DataDirError, match="check data_dir"):
        MemoryStore(path / "memory", GIB)
    assert doctor.main([str(path)]) == doctor.CLEAN, "it can still be examined"
    for option in ("--repair", "--compact"):
        assert doctor.main([str(path), option]) == doctor.FAILED
        assert "Read-only" in capsys.readouterr().err
    remount("rw")
    service = make_service(path / "memory")
    assert texts(service.list(ALICE).records) == ["tea"]
    service._store.close()
