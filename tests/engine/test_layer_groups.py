"""Loads in groups of layers on a real engine, with and without asynchronous scheduling, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PUBLISHED_WHOLE = "test_a_hash_is_published_only_after_its_copy_finished"
"""What groups of layers are not: their blocks are found from the first group on, and passes wait for the others."""


@pytest.mark.parametrize("scheduling", ["synchronous", "asynchronous"])
def test_requests_run_while_layers_arrive(scheduling: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no"]
    if scheduling == "asynchronous":
        command += ["-p", "tests.engine.async_scheduling"]
        command += ["tests/engine/test_kv_tiers.py", "-k", f"not {PUBLISHED_WHOLE}"]
    command.append("tests/engine/layer_groups_run.py")  # the last of its tests ends the engine
    environment = {**os.environ, "MEMOS_TEST_LAYER_GROUPS": "2"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout) and "skipped" not in result.stdout, result.stdout[-2000:]
