"""How wide an access may be: what the least aligned of all addresses, strides and sizes allows."""

import pytest
import torch

from memos_vllm.kernels.planes import block_bytes, planes_of
from tests.kernels.kernel_factories import BLOCKS, filled


def width(cache, row_gap=0, offset=0):
    from memos_vllm.kernels.gpu_copy import GpuCopy

    planes = planes_of([cache], BLOCKS)
    matrix = torch.empty(offset + 2 * (block_bytes(planes) + row_gap), dtype=torch.uint8)[offset:].view(2, -1)
    return GpuCopy(planes).variant(matrix[:, : block_bytes(planes)], True)


@pytest.mark.parametrize(
    ("cache", "options", "vec"),
    [
        (filled(2, BLOCKS, 16, 2, 64), {}, 16),
        (filled(2, BLOCKS, 16, 2, 64), {"row_gap": 8}, 8),
        (filled(2, BLOCKS, 16, 2, 64), {"row_gap": 3}, 1),
        (filled(2, BLOCKS, 16, 2, 64), {"offset": 4}, 4),
        (filled(BLOCKS, 16, 2, 60)[:, :, :1], {}, 8),
        (filled(BLOCKS, 16, 2, 80, dtype=torch.float8_e4m3fn)[:, :, :1], {}, 16),
        (filled(BLOCKS, 3, 7), {}, 2),
        (filled(BLOCKS, 3, 7, dtype=torch.uint8), {}, 1),
    ],
    ids=["aligned", "rows_8", "rows_1", "chunk_4", "heads_of_60", "fp8_heads_of_80", "odd", "odd_bytes"],
)
def test_the_least_aligned_decides(cache, options, vec):
    assert width(cache, **options).vec == vec


def test_dimensions_outside_a_run_are_few():
    """A variant is compiled for each number of them: whole blocks have none, and steps of two suffice."""
    assert width(filled(2, BLOCKS, 16, 2, 64)).dims == 0
    assert width(filled(BLOCKS, 2, 16, 64).transpose(1, 2)).dims == 0
    assert width(filled(BLOCKS, 2, 3, 16, 64)[:, :, 1]).dims == 2
    assert width(filled(BLOCKS * 2, 2, 16, 64)).dims == 0
    assert width(filled(BLOCKS, 4, 4, 4, 4, 64)[:, :2, :3, :3, :2]).dims == 4
