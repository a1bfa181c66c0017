"""Activation memory with asynchronous scheduling: the tests of the tiers, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.conftest import ROOT


def test_the_tiers_hold_with_asynchronous_scheduling() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.engine.async_scheduling"]
    command += ["tests/engine/test_kv_tiers.py", "--show-capture=no"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    steps = re.search(r"(\d+) steps with asynchronous scheduling", result.stdout)
    assert steps and int(steps[1]) > 100, result.stdout[-2000:]
