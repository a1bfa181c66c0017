"""The check itself: it passes on CPU, and fails where a kernel is wrong."""

import itertools

import pytest
import torch

from benchmarks import kernel_check
from memos_vllm.kernels.kv_copy import BlockCopier


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One in 40 cases: the tests of the kernels run them all."""
    every = kernel_check.cases
    monkeypatch.setattr(kernel_check, "cases", lambda device: itertools.islice(every(device), 0, None, 40))


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert kernel_check.main([]) == 2
    assert "there is no GPU" in capsys.readouterr().err
