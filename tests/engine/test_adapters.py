"""KV of one LoRA adapter is never another's, in no tier (``adapter_run`` is the engine)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.engine.adapter_run import BLOCK_SIZE, NUM_BLOCKS, RESULT_FILE

HIT = NUM_BLOCKS * BLOCK_SIZE


@pytest.fixture(scope="module")
def run(recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("adapters")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.engine.adapter_run", str(recall_model), str(folder)],
        cwd=ROOT,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads((folder / RESULT_FILE).read_text())


@pytest.fixture(params=["host", "disk"])
def tier(run: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What happened with KV in one tier, by scenario and request."""
    return run[request.param]


def said(answer: dict[str, Any]) -> Any:
    return answer["tokens"], answer["logprobs"]


def test_an_adapter_finds_its_own_kv_again(tier: dict[str, Any]) -> None:
    answers = tier["adapters"]
    assert answers["first"]["cached"] == 0 and answers["again"]["cached"] == HIT
    assert said(answers["again"]) == said(answers["first"])


@pytest.mark.parametrize("stranger", ["other", "base"])
def test_neither_another_adapter_nor_the_base_model_finds_it(tier: dict[str, Any], stranger: str) -> None:
    answers = tier["adapters"]
    assert answers[stranger]["cached"] == 0
    assert answers[stranger]["logprobs"] != answers["first"]["logprobs"], "the adapters must matter for this test"


def test_the_same_name_and_path_with_other_content_finds_nothing(tier: dict[str, Any]) -> None:
    answers = tier["changed"]
    assert answers["first"]["cached"] == answers["changed"]["cached"] == 0
    assert said(answers["changed"]) != said(answers["first"])


def test_content_that_comes_back_finds_its_kv(tier: dict[str, Any]) -> None:
    answers = tier["changed"]
    assert answers["back"]["cached"] == HIT and said(answers["back"]) == said(answers["first"])


def test_an_adapter_that_is_loaded_in_place_never_finds_what_it_was(tier: dict[str, Any]) -> None:
    """Even vLLM's number of the adapter stays the same."""
    answers = tier["in_place"]
    assert answers["changed"]["cached"] == 0
    assert said(answers["back"]) == said(answers["first"])


def test_after_loading_in_place_a_plain_request_finds_nothing_older(tier: dict[str, Any]) -> None:
    """It looks like one before the reload: same name, path and number."""
    answers = tier["in_place"]
    assert said(answers["after"]) == said(answers["changed"]) != said(answers["first"])


def test_without_the_digest_wrong_kv_would_be_found(tier: dict[str, Any]) -> None:
    """vLLM's own hash cannot tell the contents apart, so the tests above do test our key."""
    answers = tier["without_digest"]
    assert answers["changed"]["cached"] == HIT
