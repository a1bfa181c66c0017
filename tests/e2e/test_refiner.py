"""The refiner on a server of its own: the served model is asked at idle, by way of vLLM's chat endpoint and engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import serve
from memos_vllm.integration.metrics import series_key
from tests.e2e.conftest import ALICE, Memos

pytestmark = pytest.mark.e2e

CONFIG = """
data_dir: {data_dir}
memory:
  refiner: {{enabled: true, tokens_per_hour: 1600, prompt_tokens: 512, max_tokens: 512}}
kv:
  host_bytes: 64MiB
  disk_bytes: 0
"""
# The recall model knows no JSON, and writes blanks wherever JSON allows them.
FLAGS = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
TOLD = "My job is baker."
CALLS = series_key("memos:refiner_calls_total", "ended")
FIRST_TOKENS = "memos:time_to_first_token_seconds_count"


@pytest.fixture(scope="module")
def refining(recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memos]:
    folder = tmp_path_factory.mktemp("refining")
    config = folder / "memos.yaml"
    config.write_text(CONFIG.format(data_dir=folder / "data"))
    with serve(recall_model, plugin=True, config=config, extra=FLAGS) as server:
        yield Memos(server)


def test_the_model_is_asked_at_idle_and_the_original_stays(refining: Memos) -> None:
    refining.chat(ALICE, TOLD)
    deadline = time.monotonic() + 60
    while not (metrics := refining.metrics())[CALLS]:
        assert time.monotonic() < deadline, "the model was never asked"
        time.sleep(0.1)
    status = refining.call("GET", "/v1/memos/status").json()
    tokens = {kind: metrics[series_key("memos:refiner_tokens_total", kind)] for kind in ("prompt", "generation")}
    assert tokens["prompt"] > 100 and tokens["generation"] > 2
    assert status["refiner"] == {"enabled": True, "tokens_left": 1600 - sum(tokens.values())}
    assert sum(value for name, value in metrics.items() if name.startswith(FIRST_TOKENS)) == 1, "the chat's alone"
    records = refining.call("GET", "/v1/memories").json()["data"]
    assert records[0]["text"] == TOLD and all(each["origin"]["source"] == "refiner" for each in records[1:])
    assert "baker" in refining.answer(ALICE, "What is my job?")
