"""The check itself: it passes on CPU, and fails where a kernel is wrong."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import kernel_check
from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.store.host_memory import RowGroup
from tests.conftest import ROOT
from tests.kernels.kernel_factories import DTYPES

EVERY = kernel_check.cases


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One in 40 cases: the tests of the kernels run them all."""
    monkeypatch.setattr(kernel_check, "cases", lambda device: itertools.islice(EVERY(device), 0, None, 40))


def test_it_passes_on_cpu(capsys):
    assert kernel_check.main(["--device", "cpu"]) == 0
    assert " cases, 0 failed" in capsys.readouterr().out


def test_processes_share_the_cases_and_each_case_has_its_verdict(monkeypatch, tmp_path, capsys):
    some = [case for case in EVERY("cpu") if case.kernel in ("copy of odd", "copy of mla")]
    monkeypatch.setattr(kernel_check, "cases", lambda device: some)
    file = tmp_path / "check.json"
    assert kernel_check.main(["--device", "cpu", "--jobs", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    expected = sorted(case.name for case in some)
    assert sorted(row["case"] for row in rows) == expected and all(row["ok"] for row in rows)
    assert f"{len(expected)} cases, 0 failed" in capsys.readouterr().out


def test_cases_that_compile_alike_are_found_by_what_they_compile():
    by_kernel = {}
    for case in EVERY("cuda"):
        by_kernel.setdefault(case.kernel, []).append(case.name)
    assert {"fp8", "neox shift"} == {name.partition(",")[0] for name in by_kernel if "copy" not in name} - {
        "gptj shift"
    }
    assert any("pinned" in name for name in by_kernel["fp8, 128, torch.bfloat16"])
    assert len(by_kernel) > kernel_check.MOST_JOBS


@pytest.mark.parametrize("broken", ["gather", "scatter"])
def test_a_wrong_copy_is_found(broken, monkeypatch, capsys):
    right = getattr(BlockCopier, broken)

    def wrong(self, first, second, *args, **kwargs):
        return right(self, *((first[::-1], second) if broken == "gather" else (first, second[::-1])), *args, **kwargs)

    monkeypatch.setattr(BlockCopier, broken, wrong)
    assert kernel_check.main(["--device", "cpu"]) == 1
    assert "FAILED copy" in capsys.readouterr().out


def test_a_case_that_raises_has_failed_and_the_others_run(monkeypatch, capsys):
    def refuses(device, name, *_):
        if name == "odd":
            raise RuntimeError("out of shared memory")
        return 0.0

    monkeypatch.setattr(kernel_check, "_copy", refuses)
    monkeypatch.setattr(kernel_check, "cases", lambda device: (case for case in EVERY(device) if "copy, " in case.name))
    assert kernel_check.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED copy, odd, torch.uint8, device: RuntimeError: out of shared memory" in out
    assert f"{len(list(kernel_check.cases('cpu')))} cases, {len(DTYPES)} failed" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert kernel_check.main([]) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_another_package_of_that_name_does_not_hide_the_tests_factories(tmp_path):
    """Some environments have a package ``tests`` of somebody's, and a folder that is none would come after it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    command = [sys.executable, "-m", "benchmarks.kernel_check", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_kernel_is_run_on_memory_that_could_not_be_locked(monkeypatch):
    rows = torch.zeros(1, 16, dtype=torch.uint8)
    kernel_check.reachable(RowGroup(rows, [0], pinned=True), "cuda")
    with pytest.raises(RuntimeError, match="ulimit -l"):
        kernel_check.reachable(RowGroup(rows, [0]), "cuda")
    asked = []
    monkeypatch.setattr(kernel_check, "reachable", lambda group, device: asked.append(group.pinned))
    assert kernel_check._host_pool("cpu") == 0 and asked == [False]


@pytest.mark.parametrize("gpu_is_lost", [False, True])
def test_after_an_error_of_the_gpu_the_other_cases_of_the_process_are_not_blamed(monkeypatch, gpu_is_lost):
    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(kernel_check, "_ended_by", [])
    monkeypatch.setattr(kernel_check, "_wait", lambda device: fail() if gpu_is_lost else None)
    first, second = kernel_check.Case("wrong", "k", fail), kernel_check.Case("right", "k", lambda: 0.0)
    assert "illegal" in kernel_check.check(first, "cuda").error
    verdict = kernel_check.check(second, "cuda")
    if gpu_is_lost:
        assert not verdict.ok and verdict.error.startswith("not run: 'wrong'")
    else:
        assert verdict.ok
