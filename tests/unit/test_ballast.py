"""A user can be deleted on a disk that is really full. Needs the right to mount."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.config import MemoryConfig
from memos_vllm.errors import StoreFull
from memos_vllm.integration import documents, engine_channel, memories
from memos_vllm.integration.ballast import SIZE_BYTES, Ballast
from memos_vllm.integration.caretaker import Caretaker
from memos_vllm.integration.predictor_file import ForgottenOwners
from memos_vllm.integration.state import MemosState
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.store import MemoryStore
from tests.unit.test_memory_routes import Engine, data, state_with

NUM_MEMORIES = 300


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def state(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemosState]:
    monkeypatch.setattr(engine_channel, "call", Engine().call)
    store = MemoryStore(disk / "memory", 2**30)
    made = state_with(MemoryService(store, MemoryConfig()), disk)
    forgotten = ForgottenOwners(disk / "forgotten_owners", b"secret")
    made.planner = SimpleNamespace(forget=lambda who: forgotten.add(str(who)))  # type: ignore[assignment]
    yield made
    store.close()
    made.adapters.registry.close()


@pytest.fixture
def client(state: MemosState) -> TestClient:
    """Of a user with some memories, on a disk that has been filled up to the last byte."""
    app = FastAPI()
    for module in (documents, memories):
        app.include_router(module.router)
    app.state.memos = state
    made = TestClient(app, headers={"authorization": "Bearer carol"}, raise_server_exceptions=False)
    texts = [{"text": f"Note {number}. " + "word " * 100} for number in range(NUM_MEMORIES)]
    assert made.post("/v1/memories", json={"memories": texts}).status_code == 200
    return made


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_without_it_a_full_disk_stops_every_deletion(client: TestClient, disk: Path) -> None:
    fill(disk)
    memory = data(client.get("/v1/memories"))[0]["id"]
    for path in ("/v1/memories", f"/v1/memories/{memory}"):
        assert client.delete(path).status_code == 507
    assert len(data(client.get("/v1/memories?limit=1000"))) == NUM_MEMORIES


@pytest.mark.parametrize("what", ["everything", "one"])
def test_it_is_given_to_a_deletion_and_made_again(client: TestClient, state: MemosState, disk: Path, what: str) -> None:
    asyncio.run(Caretaker(state).look_after())
    fill(disk)
    path, left = "/v1/memories", 0
    if what == "one":
        path, left = f"{path}/{data(client.get(path))[0]['id']}", NUM_MEMORIES - 1
    receipt = client.delete(path)
    assert receipt.status_code == 200 and receipt.json()["records"], receipt.text
    assert len(data(client.get("/v1/memories?limit=1000"))) == left
    assert not (disk / "ballast").exists()
    state.ballast.keep()
    assert not (disk / "ballast").exists(), "there is no room yet"
    (disk / "filler").unlink()
    state.ballast.keep()
    assert (disk / "ballast").stat().st_blocks * 512 >= SIZE_BYTES


def test_what_it_does_not_help_is_told(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast", 2**16)
    ballast.keep()
    tried = []

    def remove(*args: object) -> None:
        tried.append(args)
        raise StoreFull("the map is full")

    for times in (2, 3):  # it is given once
        with pytest.raises(StoreFull):
            ballast.lend(remove, "alice")
        assert tried == [("alice",)] * times


def test_a_disk_that_takes_none_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.posix_fallocate", full)
    Ballast(tmp_path / "ballast", 2**16).keep()
    assert list(tmp_path.iterdir()) == []
