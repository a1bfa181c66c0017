"""The REST interface of adapters without an engine: uploads, paths, rights, receipts, distillation jobs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from memos_vllm.config import IdentityConfig, MemosConfig
from memos_vllm.errors import NotFound
from memos_vllm.integration import adapters, distillations, engine_channel
from memos_vllm.integration.adapter_gate import AdapterGate
from memos_vllm.integration.identity import resolve
from memos_vllm.integration.memory_metrics import MemoryMetrics
from memos_vllm.types import Principal
from tests.adapters.adapter_factories import adapter_folder, open_registry

ALICE, BOB = {"Authorization": "Bearer alice"}, {"Authorization": "Bearer bob"}


class FakeEngine:
    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_loras=2, max_cpu_loras=4))
        self.removed: list[int] = []
        self.forgotten: list[str] = []

    async def remove_lora(self, number: int) -> bool:
        self.removed.append(number)
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()

    async def call(client: Any, op: str, payload: Any = None) -> list[dict[str, Any]]:
        assert op == "forget_adapter"
        engine.forgotten.append(payload["lora_name"])
        return [{"gpu_blocks": 2, "host_blocks": 3, "disk_blocks": 5, "scenes": 0}]

    monkeypatch.setattr(engine_channel, "call", call)
    return engine


@pytest.fixture
def client(engine: FakeEngine, tmp_path: Path) -> Iterator[TestClient]:
    settings = {"import_dir": str(tmp_path / "import"), "max_bytes": 4096}
    config = MemosConfig.model_validate({"data_dir": str(tmp_path / "data"), "adapters": settings})
    registry = open_registry(tmp_path / "data" / "adapters", max_bytes=4096)
    app = FastAPI()
    app.include_router(distillations.router)
    app.include_router(adapters.router)
    gate = AdapterGate(engine, registry, config.adapters, MemoryMetrics())  # type: ignore[arg-type]

    def distillable(who: Any, memory_id: str) -> Any:
        raise NotFound(f"no memory {memory_id!r}")

    service = SimpleNamespace(distillable=distillable)
    app.state.memos = SimpleNamespace(config=config, adapters=gate, service=service, cut_reports=lambda who: None)
    with TestClient(app) as client:
        yield client
    registry.close()


def upload(client: TestClient, folder: Path, name: str = "style", headers: Any = ALICE, **files: Any) -> Any:
    parts = {
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
    } | files
    return client.post(
        "/v1/adapters", data={"name": name}, files={k: v for k, v in parts.items() if v}, headers=headers
    )


def message(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


def test_an_upload_is_listed_for_its_owner_alone(client: TestClient, tmp_path: Path) -> None:
    added = upload(client, adapter_folder(tmp_path / "a")).json()
    assert added["name"] == "style" and added["owned"] and len(added["versions"]) == 1
    assert client.get("/v1/adapters", headers=ALICE).json() == {"object": "list", "data": [added], "default": None}
    assert client.get("/v1/adapters", headers=BOB).json()["data"] == []
    assert client.get("/v1/adapters/style@1", headers=ALICE).json() == added
    assert message(client.get("/v1/adapters/style", headers=BOB), 404) == "no adapter 'style'"
    assert "Authorization: Bearer" in message(client.get("/v1/adapters"), 401)


def test_versions_and_the_default(client: TestClient, tmp_path: Path) -> None:
    for seed in range(2):
        upload(client, adapter_folder(tmp_path / f"a{seed}", seed))
    assert client.patch("/v1/adapters/style", json={"current": 1}, headers=ALICE).json()["current"] == 1
    assert message(client.patch("/v1/adapters/style", json={"current": 3}, headers=ALICE), 404)
    assert client.put("/v1/adapters/default", json={"adapter": "style@2"}, headers=ALICE).status_code == 200
    assert client.get("/v1/adapters/default", headers=ALICE).json() == {"adapter": "style@2"}
    assert message(client.put("/v1/adapters/default", json={"adapter": "style"}, headers=BOB), 404)
    assert client.put("/v1/adapters/default", json={"adapter": None}, headers=ALICE).json() == {"adapter": None}


def test_a_deletion_says_what_was_where(client: TestClient, engine: FakeEngine, tmp_path: Path) -> None:
    upload(client, adapter_folder(tmp_path / "a"))
    client.put("/v1/adapters/default", json={"adapter": "style"}, headers=ALICE)
    assert message(client.delete("/v1/adapters/style", headers=BOB), 404)
    receipt = client.delete("/v1/adapters/style", headers=ALICE).json()
    assert receipt == {
        "deleted": True,
        "adapters": ["style@1"],
        "profiles": 1,
        "contents": 1,
        "files_pending": 0,
        "kv": {"gpu_blocks": 2, "host_blocks": 3, "disk_blocks": 5},
    }
    assert len(engine.removed) == len(engine.forgotten) == 1
    assert not list((tmp_path / "data" / "adapters" / "objects").iterdir())


def test_what_another_still_has_stays(client: TestClient, engine: FakeEngine, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a")
    upload(client, folder)
    upload(client, folder, headers=BOB)
    assert client.delete("/v1/adapters/style", headers=ALICE).json()["contents"] == 0
    assert engine.removed == [] and len(engine.forgotten) == 1, "but the KV that it computed goes"
    assert client.get("/v1/adapters/style", headers=BOB).status_code == 200


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        ({"weights": ("adapter_model.safetensors", b"\x80\x04pickle")}, 400, "no safetensors file"),
        ({"weights": ("adapter_model.bin", b"x")}, 400, "only adapter_model.safetensors"),
        ({"weights": None}, 400, "no file 'weights'"),
        ({"config": ("adapter_config.json", b"{}")}, 400, "only LORA"),
        ({"weights": ("adapter_model.safetensors", bytes(5000))}, 413, "adapters.max_bytes"),
    ],
)
def test_bad_uploads(client: TestClient, tmp_path: Path, files: Any, status: int, words: str) -> None:
    assert words in message(upload(client, adapter_folder(tmp_path / "a"), **files), status)
    assert client.get("/v1/adapters", headers=ALICE).json()["data"] == []


def test_an_upload_that_is_too_large_is_refused_before_it_is_read(client: TestClient) -> None:
    huge = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(10**12), **ALICE}
    assert "adapters.max_bytes" in message(client.post("/v1/adapters", content=b"", headers=huge), 413)
    chunked = {"Content-Type": "multipart/form-data; boundary=x", **ALICE}
    assert "Content-Length" in message(client.post("/v1/adapters", content=iter([b""]), headers=chunked), 411)


def test_an_upload_needs_its_name(client: TestClient, tmp_path: Path) -> None:
    assert "'name'" in message(upload(client, adapter_folder(tmp_path / "a"), name="../x"), 400)
    assert "reserved" in message(upload(client, adapter_folder(tmp_path / "b"), name="default"), 400)


def test_a_path_stays_below_what_the_operator_set(client: TestClient, tmp_path: Path) -> None:
    root = tmp_path / "import"
    adapter_folder(root / "inside" / "a")
    adapter_folder(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")

    def add(path: str) -> Any:
        return client.post("/v1/adapters", json={"name": "style", "path": path}, headers=ALICE)

    assert add("inside/a").status_code == 200 and add(str(root / "inside" / "a")).status_code == 200
    for path in ("../outside", "link", str(tmp_path / "outside"), ".", "", "inside/../..", "/"):
        assert "must stay below" in message(add(path), 403), path
    assert "no adapter folder" in message(add("nothing"), 400)
    assert "no path" in message(add("a\0b"), 400)


def test_without_a_folder_of_the_operator_only_uploads_are_taken(client: TestClient) -> None:
    state = client.app.state.memos  # type: ignore[attr-defined]
    section = state.config.adapters.model_copy(update={"import_dir": None})
    state.config = state.config.model_copy(update={"adapters": section})
    response = client.post("/v1/adapters", json={"name": "style", "path": "/etc"}, headers=ALICE)
    assert "uploads only" in message(response, 403)


def test_probing_is_the_owners_and_needs_a_record(client: TestClient, tmp_path: Path) -> None:
    upload(client, adapter_folder(tmp_path / "a"))
    assert "only the owner of a distilled adapter" in message(
        client.post("/v1/adapters/style/probe", json={}, headers=ALICE), 400
    )
    assert message(client.post("/v1/adapters/style/probe", json={}, headers=BOB), 404)


def test_probing_asks_the_store_off_the_event_loop(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = client.app.state.memos  # type: ignore[attr-defined]
    asked: list[tuple[str, str]] = []

    def salt(who: Principal) -> str:
        asked.append((threading.current_thread().name, who.user))
        return "salt"

    async def answer(request: Any, _: Any) -> Any:
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=request.cache_salt))])

    async def use(*_: Any) -> Any:
        return SimpleNamespace(header="knows@1", active=nullcontext, close=lambda: None)

    state.salt = salt
    state.adapters.use = use
    client.app.state.openai_serving_chat = SimpleNamespace(create_chat_completion=answer)  # type: ignore[attr-defined]
    who = resolve({"authorization": "Bearer alice"}, IdentityConfig()).principal
    questions = [{"question": "What is my job?", "memory": "m"}]
    distilled = {"tenant": who.tenant, "user": who.user, "memories": [], "questions": questions}
    state.adapters.registry.register(who, "knows", adapter_folder(tmp_path / "k"), origin={"distilled": distilled})
    probed = client.post("/v1/adapters/knows/probe", json={}, headers=ALICE).json()
    assert [each["answer"] for each in probed["answers"]] == ["salt"]
    ((thread, user),) = asked
    assert user == "default" and thread.startswith("asyncio_"), "a thread of to_thread's"


def test_distillation_is_off_unless_the_operator_wants_it(client: TestClient) -> None:
    assert "adapters.distill" in message(client.post("/v1/adapters/distill", json={"name": "x"}, headers=ALICE), 403)


def test_a_distillation_job_reports_to_its_owner(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is replaced by one that writes a report, as the real one does."""
    state = client.app.state.memos  # type: ignore[attr-defined]
    section = state.config.adapters.model_copy(update={"distill": "on"})
    state.config = state.config.model_copy(update={"adapters": section})
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\nwhile [ "$1" != --report ]; do shift; done\nwhile [ ! -e %s ]; do sleep 0.05; done\n'
        'echo \'{"published": null, "refused": "so"}\' > $2.tmp\nmv $2.tmp $2\n' % (tmp_path / "go")
    )
    script.chmod(0o755)
    monkeypatch.setattr(distillations.sys, "executable", str(script))
    body = {"name": "knows", "memories": ["m1"]}
    assert message(client.post("/v1/adapters/distill", json=body, headers=ALICE), 404) == "no memory 'm1'"
    started = client.post("/v1/adapters/distill", json={"name": "knows"}, headers=ALICE).json()
    assert started["state"] == "running"
    path = f"/v1/adapters/distill/{started['id']}"
    assert client.get(path, headers=ALICE).json()["state"] == "running"
    assert "is running" in message(client.post("/v1/adapters/distill", json={"name": "b"}, headers=BOB), 409)
    assert message(client.get(path, headers=BOB), 404) and message(client.get(path + "/..", headers=ALICE), 404)
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 20
    while (report := client.get(path, headers=ALICE).json())["state"] == "running":
        assert time.monotonic() < deadline
    assert report == {"id": started["id"], "state": "ended", "published": None, "refused": "so"}
    assert json.loads(next((tmp_path / "data/adapters/distillations").glob("*.owner.json")).read_text())
