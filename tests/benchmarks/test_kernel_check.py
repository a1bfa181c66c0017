"""The check itself: it passes on CPU, and fails where a kernel is wrong."""

import itertools

import pytest
import torch

from benchmarks import kernel_check
from memos_vllm.kernels.kv_copy import BlockCopier
from tests.kernels.kernel_factories import DTYPES

EVERY = kernel_check.cases


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One in 40 cases: the tests of the kernels run them all."""
    monkeypatch.setattr(kernel_check, "cases", lambda device: itertools.islice(EVERY(device), 0, None, 40))


def test_it_passes_on_cpu(capsys):
    assert kernel_check.main(["--device", "cpu"]) == 0
    assert " cases, 0 failed" in capsys.readouterr().out


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
