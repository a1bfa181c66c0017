"""The fp8 store under a real engine, through the command that reports what it changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_the_command_reports_half_the_bytes_and_a_small_divergence(tmp_path: Path) -> None:
    """The command itself fails unless every block of a prefix came from the store."""
    command = [sys.executable, "-m", "benchmarks.fp8_divergence", "--preset", "smoke", "--json", str(tmp_path / "r")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    floor, fp8 = json.loads((tmp_path / "r").read_text())["rows"]
    assert (floor["arm"], fp8["arm"]) == ("floor", "fp8") and fp8["n"] == 3
    assert 0.5 < fp8["stored_bytes"] / fp8["block_bytes"] < 0.53
    assert 0 < fp8["max_logprob_diff"] < 1.0, "it went through fp8, and not astray"
    assert floor["mean_logprob_diff"] < fp8["mean_logprob_diff"] < 0.1
    assert fp8["equal_tokens"] > 0.9
