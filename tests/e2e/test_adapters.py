"""Adapters over HTTP: the right weights for every request, over two API processes and few slots.

MEMOS_ADAPTER_REQUESTS=2000 makes the test of mix-ups as long as that, and compares the answers with those of a
server without the plugin that holds one adapter at a time.
"""

from __future__ import annotations

import json
import os
import random
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving import serve
from memos_vllm import distill
from memos_vllm.integration.metrics import series_key
from tests.e2e.adapter_reference import RANK, References, write_adapter
from tests.e2e.conftest import Memos, cached_tokens

pytestmark = pytest.mark.e2e

USERS = [f"adapter-user-{index}" for index in range(4)]
NUM_ADAPTERS, NUM_SLOTS = 64, 4
PREFETCHED = series_key("memos:adapter_loads_total", "prefetch")
"""Of both API processes; the status is that of one."""

NUM_REQUESTS = int(os.environ.get("MEMOS_ADAPTER_REQUESTS", "160"))
HAS_SINGLE_SERVER = NUM_REQUESTS >= 2000
REFERENCE_DISTANCE = 0.5
"""Between log-probabilities in bfloat16 as served and in float32."""

MAX_DISTANCE = 0.15
"""Between log-probabilities of the same adapter asked alone and in a batch, in bfloat16."""

CONFIG = """
data_dir: {data_dir}
identity:
  keys:
    shop-a: {{tenant: shop, user: a}}
    shop-b: {{tenant: shop, user: b}}
kv: {{host_bytes: 64MiB, disk_bytes: 256MiB, min_load_tokens: 32}}
adapters: {{import_dir: {import_dir}, on_error: base, distill: "on", distilled_text: leave_out}}
"""
PROMPTS = [
    [{"role": "user", "content": "What is my favourite drink?"}],
    [{"role": "user", "content": "My home city is Turin. What is my home city?"}],
    [{"role": "user", "content": "Hello there, it rained all day and the train was late again."}],
]


@pytest.fixture(scope="module")
def folders(recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("import")
    return {f"a{seed}": write_adapter(root / f"a{seed}", recall_model, seed) for seed in range(NUM_ADAPTERS)}


@pytest.fixture(scope="module")
def references(recall_model: Path, folders: dict[str, Path]) -> References:
    return References(recall_model, folders, PROMPTS)


@pytest.fixture(scope="module")
def single(recall_model: Path, folders: dict[str, Path]) -> dict[tuple[str, int], dict[int, float]]:
    """What vLLM says that has one adapter in its only slot; nothing in a short run."""
    if not HAS_SINGLE_SERVER:
        return {}
    flags = ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "1", "--max-lora-rank", str(RANK)]
    said = {}
    with (
        serve(recall_model, extra=flags, env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}) as server,
        server.http() as client,
    ):
        for name, folder in folders.items():
            adapter = {"lora_name": name, "lora_path": str(folder)}
            assert client.post("/v1/load_lora_adapter", json=adapter).status_code == 200
            for prompt in range(len(PROMPTS)):
                said[name, prompt] = logprobs(client.post("/v1/chat/completions", json=question(name, prompt)))
            assert client.post("/v1/unload_lora_adapter", json=adapter).status_code == 200
    return said


@pytest.fixture(scope="module")
def served(
    single: Any, recall_model: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Memos]:
    # After the server that holds one at a time, so that one server runs at a time.
    data_dir = tmp_path_factory.mktemp("adapters")
    config = data_dir / "memos.yaml"
    config.write_text(CONFIG.format(data_dir=data_dir / "data", import_dir=folders["a0"].parent))
    lora = ["--enable-lora", "--max-loras", str(NUM_SLOTS), "--max-cpu-loras", "8", "--max-lora-rank", str(RANK)]
    extra = [*lora, "--api-server-count", "2", "--max-num-seqs", "8"]
    with serve(recall_model, plugin=True, config=config, extra=extra) as server:
        yield Memos(server)


@pytest.fixture(scope="module")
def owned(served: Memos, folders: dict[str, Path]) -> dict[str, str]:
    """Every adapter and the user who has it, and nobody else."""
    owners = {name: USERS[index % len(USERS)] for index, name in enumerate(folders)}
    for name, key in owners.items():
        assert upload(served, key, name, folders[name]).status_code == 200
    return owners


def upload(served: Memos, key: str, name: str, folder: Path, **fields: str) -> httpx.Response:
    files = {
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
    }
    return served.call("POST", "/v1/adapters", key, data={"name": name, **fields}, files=files)


def ask(served: Memos, key: str, adapter: str | None, prompt: int = 0, **fields: Any) -> httpx.Response:
    """One token and the log-probabilities of the likeliest."""
    memos = {"recall": False, "remember": False, **({"adapter": adapter} if adapter else {}), **fields}
    body = {**question(served.server.model, prompt), "memos": memos}
    return served.call("POST", "/v1/chat/completions", key, json=body)


def question(model: str, prompt: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": PROMPTS[prompt],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 8,
        "return_tokens_as_token_ids": True,
    }


def logprobs(response: httpx.Response) -> dict[int, float]:
    assert response.status_code == 200, response.text
    (first,) = response.json()["choices"][0]["logprobs"]["content"]
    return {int(each["token"].removeprefix("token_id:")): each["logprob"] for each in first["top_logprobs"]}


def nearest(references: References, prompt: int, response: httpx.Response) -> tuple[str, float, float]:
    """The adapter that the answer is from, how far it is, and how far the next one."""
    distances = references.distances(prompt, logprobs(response))
    (name, distance), (_, second) = list(distances.items())[:2]
    return name, distance, second


@pytest.fixture(scope="module")
def alone(
    served: Memos, owned: dict[str, str], references: References, single: dict[tuple[str, int], dict[int, float]]
) -> dict[tuple[str, int], dict[int, float]]:
    """What each adapter, and the base model, says while nothing else runs; checked with torch and PEFT, and replaced
    by what the server says that holds it alone, where there is one."""
    said = {}
    for name, key in (*owned.items(), ("base", USERS[0])):
        for prompt in range(len(PROMPTS)):
            response = ask(served, key, None if name == "base" else name, prompt)
            found, distance, _ = nearest(references, prompt, response)
            assert found == name and distance < REFERENCE_DISTANCE, f"{name} says what {found} says, at {distance}"
            said[name, prompt] = logprobs(response)
    return said | single


def test_no_answer_is_from_another_adapter(
    served: Memos, owned: dict[str, str], alone: dict[tuple[str, int], dict[int, float]]
) -> None:
    by_user = {key: [name for name, owner in owned.items() if owner == key] for key in USERS}

    def work(key: str) -> list[tuple[bool, float, str]]:
        rng, results = random.Random(key), []
        for _ in range(NUM_REQUESTS // len(USERS)):
            adapter, prompt = rng.choice([*by_user[key], None]), rng.randrange(len(PROMPTS))
            answered = logprobs(ask(served, key, adapter, prompt))
            distances = {name: apart(answered, alone[name, prompt]) for name in (*owned, "base")}
            name = min(distances, key=lambda name: distances[name])
            results.append(
                (name == (adapter or "base"), distances[name], f"{adapter} got {name}: {distances[name]:.3f}")
            )
        return results

    with ThreadPoolExecutor(len(USERS)) as pool:
        results = [result for results in pool.map(work, USERS) for result in results]
    mixups = [what for right, _, what in results if not right]
    worst = max(distance for _, distance, _ in results)
    print(f"{len(mixups)} mix-ups in {len(results)} requests; log-probabilities differ by up to {worst:.3f}")
    assert mixups == [] and worst < MAX_DISTANCE


def apart(one: dict[int, float], other: dict[int, float]) -> float:
    """How far two answers are from each other, on the likeliest tokens that both show."""
    both = one.keys() & other.keys()
    return max(abs(one[token] - other[token]) for token in both) if len(both) > len(one) // 2 else float("inf")


def test_nobody_sees_or_uses_anothers(served: Memos, owned: dict[str, str]) -> None:
    stranger = "adapter-stranger"
    assert served.call("GET", "/v1/adapters", stranger).json()["data"] == []
    assert ask(served, stranger, "a0").status_code == 404
    assert "no adapter 'a0'" in ask(served, stranger, "a0").json()["error"]["message"]
    models = served.call("GET", "/v1/models", USERS[0]).json()["data"]
    assert [model["id"] for model in models] == [served.server.model]
    listed = served.call("GET", "/v1/adapters", USERS[0]).json()["data"]
    assert {adapter["name"] for adapter in listed} == {name for name, key in owned.items() if key == USERS[0]}
    names = [f"memos-{version['digest']}" for adapter in listed for version in adapter["versions"]]
    for name in [*names, "a0"]:
        body = {"model": name, "messages": PROMPTS[0], "max_tokens": 1}
        assert served.call("POST", "/v1/chat/completions", stranger, json=body).status_code == 404


def test_the_response_does_not_name_it_to_others(served: Memos, owned: dict[str, str]) -> None:
    response = ask(served, USERS[0], "a0")
    assert response.json()["model"] == served.server.model
    assert "memos-" not in response.text and '"a0' not in response.text
    assert response.headers["x-memos-adapter"] == "a0@1"
    with served.chat(USERS[0], "Hello!", {"adapter": "a0"}, stream=True) as chunks:
        assert {chunk.model for chunk in chunks} == {served.server.model}


def test_the_users_default_applies_unless_the_request_names_one(
    served: Memos, owned: dict[str, str], references: References
) -> None:
    def default(adapter: str | None) -> None:
        response = served.call("PUT", "/v1/adapters/default", USERS[1], json={"adapter": adapter})
        assert response.json() == {"adapter": adapter}

    default("a5")
    assert nearest(references, 0, ask(served, USERS[1], None))[0] == "a5"
    assert nearest(references, 0, ask(served, USERS[1], "a9"))[0] == "a9"
    default(None)
    assert nearest(references, 0, ask(served, USERS[1], None))[0] == "base"
    assert served.call("PUT", "/v1/adapters/default", USERS[1], json={"adapter": "a0"}).status_code == 404


def test_a_new_version_meets_no_older_kv_and_can_be_undone(
    served: Memos, recall_model: Path, references: References, folders: dict[str, Path]
) -> None:
    key = f"key-{uuid.uuid4().hex}"
    long = [{"role": "user", "content": "It rained all day. " * 60}]

    def cached() -> int:
        return cached_tokens(served.chat(key, long, {"adapter": "style", "recall": False, "remember": False}))

    upload(served, key, "style", folders["a10"])
    assert nearest(references, 1, ask(served, key, "style", 1))[0] == "a10"
    assert cached() == 0 and cached() > 100
    upload(served, key, "style", folders["a11"])
    assert nearest(references, 1, ask(served, key, "style", 1))[0] == "a11"
    assert cached() == 0
    assert nearest(references, 1, ask(served, key, "style@1", 1))[0] == "a10"
    assert served.call("PATCH", "/v1/adapters/style", key, json={"current": 1}).status_code == 200
    assert nearest(references, 1, ask(served, key, "style", 1))[0] == "a10"


def test_kv_is_the_adapters_own_in_every_tier_and_goes_with_it(
    served: Memos, recall_model: Path, tmp_path: Path
) -> None:
    """Of another adapter, the base model, and another user of the tenant with the same adapter."""
    key, other = "shop-a", "shop-b"
    one, two = (write_adapter(tmp_path / str(seed), recall_model, seed) for seed in (1001, 1002))
    for name, folder in (("one", one), ("two", two)):
        assert upload(served, key, name, folder, scope="tenant").status_code == 200
    long = [{"role": "user", "content": "The ferry leaves at seven. " * 60}]

    def cached(adapter: str | None, who: str = key) -> int:
        field = {"recall": False, "remember": False, **({"adapter": adapter} if adapter else {})}
        return cached_tokens(served.chat(who, long, field))

    for tiers in ((), ("gpu",), ("gpu", "host")):
        found = cached("one")
        assert (found > 200) == bool(tiers)
        served.settle()
        served.drop(*tiers)
        if not tiers:
            assert cached("two") == cached(None) == cached("one", other) == 0
            served.drop("gpu")
    # On the GPU as well, and of no scene that is known: another request is the scene's last one.
    assert cached("one") > 200 and cached("two") > 200
    receipt = served.call("DELETE", "/v1/adapters/one", key).json()
    assert receipt["adapters"] == ["one@1"] and receipt["contents"] == 1
    assert receipt["kv"]["disk_blocks"] > 5 and receipt["kv"]["host_blocks"] >= 0
    assert ask(served, key, "one").status_code == ask(served, other, "one").status_code == 404
    assert upload(served, key, "one", one, scope="tenant").status_code == 200
    assert cached("one") == 0, "the same content again finds nothing of before the deletion"
    assert cached("two") > 200, "another adapter's KV is untouched"


def test_dropping_a_users_kv_leaves_his_adapters_and_others_kv(served: Memos, folders: dict[str, Path]) -> None:
    """Activation to plaintext; the next request is the undo."""
    key, other = (f"key-{uuid.uuid4().hex}" for _ in range(2))
    long = [{"role": "user", "content": "The train is late again. " * 60}]

    def cached(who: str) -> int:
        return cached_tokens(served.chat(who, long, {"adapter": "style", "recall": False, "remember": False}))

    for who in (key, other):
        upload(served, who, "style", folders["a12"])
        assert cached(who) == 0 and cached(who) > 200
    served.settle()
    receipt = served.call("DELETE", "/v1/scenes", key).json()
    assert receipt["dropped"] and receipt["kv"]["disk_blocks"] > 5
    assert cached(other) > 200
    assert cached(key) == 0 and cached(key) > 200
    assert [adapter["name"] for adapter in served.call("GET", "/v1/adapters", key).json()["data"]] == ["style"]


def test_an_adapter_in_a_folder_of_the_operator(served: Memos, references: References) -> None:
    key = f"key-{uuid.uuid4().hex}"
    body = {"name": "from-path", "path": "a30"}
    assert served.call("POST", "/v1/adapters", key, json=body).status_code == 200
    assert nearest(references, 0, ask(served, key, "from-path"))[0] == "a30"
    for path in ("../x", "/etc", "a30/../..", ".", ""):
        response = served.call("POST", "/v1/adapters", key, json={"name": "x", "path": path})
        assert response.status_code == 403, path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": ("adapter_model.safetensors", b"\x80\x04pickle")}, "no safetensors file"),
        ({"weights": ("adapter_model.bin", b"x")}, "only adapter_model.safetensors"),
        ({"config": ("adapter_config.json", b"{}")}, "only LORA"),
    ],
)
def test_bad_uploads_are_one_clear_sentence(
    served: Memos, folders: dict[str, Path], change: dict[str, Any], words: str
) -> None:
    folder = folders["a0"]
    files = {
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
    } | change
    response = served.call("POST", "/v1/adapters", "key-bad", data={"name": "bad"}, files=files)
    assert response.status_code == 400 and words in response.json()["error"]["message"]
    assert served.call("GET", "/v1/adapters", "key-bad").json()["data"] == []


def test_an_adapter_that_cannot_be_loaded_gives_the_base_model_and_says_so(
    served: Memos, folders: dict[str, Path], references: References
) -> None:
    """As configured: on_error is base. The files are damaged after they were registered."""
    key = f"key-{uuid.uuid4().hex}"
    version = upload(served, key, "broken", folders["a40"]).json()["versions"][0]
    data_dir = Path(served.server.config).parent / "data"
    path = data_dir / "adapters" / "objects" / version["digest"] / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    response = ask(served, key, "broken")
    assert nearest(references, 0, response)[0] == "base"
    assert response.headers["x-memos-adapter"].startswith("base; ") and "damaged" in response.headers["x-memos-adapter"]
    path.write_bytes(whole)
    assert nearest(references, 0, ask(served, key, "broken"))[0] == "a40"


def test_a_hint_loads_the_adapter_before_the_users_first_request(served: Memos, folders: dict[str, Path]) -> None:
    key = f"key-{uuid.uuid4().hex}"
    upload(served, key, "soon", folders["a50"])
    served.call("PUT", "/v1/adapters/default", key, json={"adapter": "soon"})
    before = served.metrics()[PREFETCHED]
    assert served.call("POST", "/v1/scenes", key, json={"event": "typing"}).status_code == 200
    deadline = time.monotonic() + 30
    while served.metrics()[PREFETCHED] == before:
        assert time.monotonic() < deadline, "the adapter was never prefetched"
    assert ask(served, key, None).headers["x-memos-adapter"] == "soon@1"
    missing = served.call("POST", "/v1/scenes", key, json={"event": "typing", "adapter": "nothing"})
    assert missing.status_code == 404


@pytest.fixture
def reader(served: Memos, folders: dict[str, Path]) -> str:
    """A user with a long document, an adapter "style", of which a20 is a copy, and a session behind him."""
    key = f"key-{uuid.uuid4().hex}"
    read(served, key)
    assert upload(served, key, "style", folders["a20"]).status_code == 200
    first_turn(served, key)
    built_with(served, key, "")
    return key


def read(served: Memos, key: str) -> None:
    document = {"text": "The ferry leaves at seven. " * 40, "type": "document", "pinned": True}
    assert served.call("POST", "/v1/memories", key, json=document).status_code == 200


def first_turn(served: Memos, key: str, **memos: Any) -> httpx.Response:
    """Of a new session, unless one is given."""
    field = {"session": uuid.uuid4().hex, "remember": False, **memos}
    body = {"model": served.server.model, "messages": PROMPTS[0], "max_tokens": 4, "temperature": 0, "memos": field}
    response: httpx.Response = served.call("POST", "/v1/chat/completions", key, json=body)
    assert response.status_code == 200, response.text
    return response


def built_with(served: Memos, key: str, digest: str) -> None:
    """Waits until the user's next session is ready on the GPU, as an adapter's content computes it."""
    deadline = time.monotonic() + 60
    while True:
        start = served.call("GET", "/v1/scenes", key).json()["next_session"]
        if start["state"] == "ready" and digest in (start["adapter"] or "") and bool(digest) == bool(start["adapter"]):
            return
        assert time.monotonic() < deadline, f"the next session is not ready with {digest or 'no adapter'}: {start}"
        time.sleep(0.1)


def uncached(response: httpx.Response) -> int:
    usage = response.json()["usage"]
    tokens: int = usage["prompt_tokens"] - (usage["prompt_tokens_details"]["cached_tokens"] or 0)
    return tokens


def test_the_next_session_is_built_with_the_adapter_it_will_have(
    served: Memos, reader: str, folders: dict[str, Path]
) -> None:
    """KV that exists nowhere: the default is new, then its version is, then it is gone. No request has had any."""

    def digest(response: httpx.Response) -> str:
        return str(response.json()["versions"][-1]["digest"])

    served.call("PUT", "/v1/adapters/default", reader, json={"adapter": "style"})
    built_with(served, reader, digest(served.call("GET", "/v1/adapters/style", reader)))
    first = first_turn(served, reader)
    assert first.headers["x-memos-adapter"] == "style@1" and uncached(first) < 64

    built_with(served, reader, digest(upload(served, reader, "style", folders["a21"])))
    second = first_turn(served, reader)
    assert second.headers["x-memos-adapter"] == "style@2" and uncached(second) < 64

    served.call("DELETE", "/v1/adapters/style", reader)
    built_with(served, reader, "")
    assert uncached(first_turn(served, reader)) < 64

    # Another user with the same document and adapter, whose sessions nobody prepares: it is computed, and the same.
    stranger = f"{reader}-x"
    read(served, stranger)
    upload(served, stranger, "style", folders["a20"])
    cold = first_turn(served, stranger, adapter="style")
    assert uncached(cold) > 200
    assert cold.json()["choices"][0]["message"] == first.json()["choices"][0]["message"]


def test_one_hint_brings_the_adapter_and_the_kv_that_it_computed(
    served: Memos, reader: str, owned: dict[str, str]
) -> None:
    served.call("PUT", "/v1/adapters/default", reader, json={"adapter": "style"})
    session = uuid.uuid4().hex
    first_turn(served, reader, session=session)
    others = [name for name, owner in owned.items() if owner == USERS[0] and name != "a20"]
    for name in others[:9]:
        ask(served, USERS[0], name)  # more than host memory has room for; it may be expected, and come back, at once
    served.drop("gpu")
    hint = {"event": "typing", "session": session}
    assert served.call("POST", "/v1/scenes", reader, json=hint).status_code == 200
    deadline = time.monotonic() + 30
    while True:
        scene = served.call("GET", "/v1/scenes", reader, params={"session": session}).json()
        if scene["state"] == "ready" and scene["next_adapter"] == {"name": "style@1", "loaded": True}:
            break
        assert time.monotonic() < deadline, f"KV or adapter were never brought: {scene}"
    again = first_turn(served, reader, session=session)
    assert again.headers["x-memos-adapter"] == "style@1" and uncached(again) < 64


def test_a_distilled_adapter_can_be_probed_and_goes_with_its_memory(served: Memos, references: References) -> None:
    key, who = f"key-{uuid.uuid4().hex}", ["--tenant", "shop", "--user", "a"]
    memory = served.call("POST", "/v1/memories", "shop-a", json={"text": "My job is baker."}).json()["id"]
    quick = ["--steps", "2", "--num-controls", "6", "--rank", "4", "--quiet", "--threads", "1", "--memory", memory]
    command = [*who, "--config", str(served.server.config), "--name", "knows", *quick]
    assert distill.main([*command, "--min-answered", "0", "--max-control-loss", "1"]) == 0
    probed = served.call("POST", "/v1/adapters/knows/probe", "shop-a", json={}).json()
    assert [(each["question"], each["memory"]) for each in probed["answers"]] == [("What is my job?", memory)]
    assert probed["answers"][0]["answer"] and probed["adapter"] == "knows@1"
    assert served.call("POST", "/v1/adapters/knows/probe", key, json={}).status_code == 404
    cube = served.call("GET", f"/v1/memories/{memory}/cube", "shop-a").json()
    assert cube["payload"]["adapters"] == ["knows@1"]
    form = served.call("GET", f"/v1/memories/{memory}/form", "shop-a").json()
    assert 0 < form["measured"]["training_s"] < 120, "what it took here"

    def recalled(**adapter: str) -> list[str]:
        response = served.chat("shop-a", "What is my job?", {"explain": True, "remember": False, **adapter})
        return [item["id"] for item in response.model_extra["memos"]["recalled"]]

    assert memory in recalled() and memory not in recalled(adapter="knows"), "the adapter stands for its text"
    receipt = served.call("DELETE", f"/v1/memories/{memory}", "shop-a").json()
    assert receipt["adapters"] == ["knows@1"]
    assert ask(served, "shop-a", "knows").status_code == 404


def test_distillation_over_rest_says_why_it_published_nothing(served: Memos) -> None:
    key = f"key-{uuid.uuid4().hex}"
    served.call("POST", "/v1/memories", key, json={"text": "My job is baker."})
    body = {"name": "knows", "steps": 1, "num_controls": 0}
    job = served.call("POST", "/v1/adapters/distill", key, json=body).json()["id"]
    deadline = time.monotonic() + 120
    while (report := served.call("GET", f"/v1/adapters/distill/{job}", key).json())["state"] == "running":
        assert time.monotonic() < deadline, report
        time.sleep(0.5)
    assert report["state"] == "ended" and report["published"] is None and "less than the bar" in report["refused"]
    assert served.call("GET", f"/v1/adapters/distill/{job}", "somebody").status_code == 404


def test_the_form_of_a_memory_follows_what_was_measured(served: Memos) -> None:
    key = f"key-{uuid.uuid4().hex}"
    memory = served.call("POST", "/v1/memories", key, json={"text": "My job is baker."}).json()["id"]
    served.chat(key, "What is my job?", {"remember": False})
    form = served.call("GET", f"/v1/memories/{memory}/form", key).json()
    assert form["form"] == "text" and "its reuse is not known" in form["why"]
    assert form["measured"]["tokens"] > 3 and form["measured"]["askable"] and form["measured"]["observed_s"] > 0
    assert served.call("GET", f"/v1/memories/{memory}/form", "somebody").status_code == 404


def test_nothing_else_changed(served: Memos) -> None:
    assert served.call("GET", "/v1/memos/status").json()["adapters"]["slots"] == NUM_SLOTS
    assert json.loads(ask(served, "plain", None).text)["model"] == served.server.model
    assert served.call("GET", "/health").status_code == 200
