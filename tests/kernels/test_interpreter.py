"""Triton's kernels on CPU, through the tests of this folder, in a process whose Triton interprets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_the_kernels_pass_interpreted():
    tests = [str(HERE / f"test_{name}.py") for name in ("kv_copy", "fp8", "rotary")]
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-k", "interpreter", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 50
