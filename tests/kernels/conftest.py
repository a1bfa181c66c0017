"""Which implementation a test runs on.

Every test that copies takes the fixture ``device`` and runs once per implementation. Triton's kernels run on CPU in its
interpreter, which has to be chosen before Triton is imported: ``test_interpreter.py`` starts a process
of its own for it. With a GPU they run there too.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from memos_vllm.kernels import kv_copy


def _round_bfloat16_like_a_gpu() -> None:
    """The interpreter truncates to bfloat16 and loses its subnormal values; GPUs round to nearest and keep them."""
    from triton import language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.left_shift(values.view(np.uint16), 16, dtype=np.uint32)
        return original(values, source, target, rounding_mode)

    interpreter._convert_float = convert


if os.environ.get("TRITON_INTERPRET") == "1":
    PATHS = ["interpreter"]
    _round_bfloat16_like_a_gpu()
else:
    # torch alone copies blocks, but looks at no values.
    PATHS = ["cpu", "torch", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc) -> None:
    if "path" in metafunc.fixturenames:
        plain = metafunc.module.__name__.endswith("test_kv_copy")
        metafunc.parametrize("path", [path for path in PATHS if path != "torch" or plain], indirect=True)


@pytest.fixture
def path(request, monkeypatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kv_copy, "_copy_for", kv_copy.TorchCopy)
    if request.param == "interpreter":
        from memos_vllm.kernels.gpu_copy import GpuCopy
        from memos_vllm.kernels.gpu_heads import GpuHeads

        monkeypatch.setattr(kv_copy, "_copy_for", GpuCopy)
        monkeypatch.setattr(kv_copy, "_heads_for", lambda heads, layout, copy: GpuHeads(heads, layout))
    return request.param


@pytest.fixture
def device(path) -> str:
    return "cuda" if path == "cuda" else "cpu"
