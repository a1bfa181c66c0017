"""How wide an access may be: what the least aligned of all addresses allows. How much of the GPU a launch takes."""

import pytest
import torch

from memos_vllm.kernels import kv_copy
from memos_vllm.kernels.heads import HeadShape, heads_of
from memos_vllm.kernels.kv_copy import DEFAULT_PROGRAMS, BlockCopier
from memos_vllm.kernels.planes import block_bytes, planes_of
from memos_vllm.kernels.rotary import RotaryShift
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


class Launches:
    """In a kernel's place: notes how many programs it is launched with."""

    def __init__(self):
        self.programs = []

    def __getitem__(self, grid):
        self.programs.append(grid[0])
        return lambda *args, **kwargs: None


@pytest.fixture
def launches(monkeypatch):
    """Kernels are counted instead of run."""
    from memos_vllm.kernels import gpu_copy, gpu_heads

    launches = Launches()
    for module, kernel in ((gpu_copy, "copy_blocks"), (gpu_heads, "encode_slabs"), (gpu_heads, "scatter_slabs")):
        monkeypatch.setattr(module, kernel, launches)
    monkeypatch.setattr(kv_copy, "_copy_for", gpu_copy.GpuCopy)
    monkeypatch.setattr(kv_copy, "_heads_for", lambda heads, layout, copy: gpu_heads.GpuHeads(heads, layout))
    return launches


def make_copier(fp8, layers=4, tokens=16, heads=8):
    caches = [filled(2, BLOCKS, tokens, heads, 64) for _ in range(layers)]
    return BlockCopier(planes_of(caches, BLOCKS), heads_of(caches, BLOCKS, HeadShape(heads, 64, "NHD")), fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_launch_takes_a_few_sms_however_much_there_is_to_copy(launches, fp8):
    """And no more than there is work for, and never none."""
    copier = make_copier(fp8)
    rows = torch.empty(100, copier.row_bytes, dtype=torch.uint8)
    ids = [number % BLOCKS for number in range(100)]
    copier.gather(ids, rows)
    copier.scatter(rows[:BLOCKS], range(BLOCKS))
    assert launches.programs == [DEFAULT_PROGRAMS] * 2 and 1 < DEFAULT_PROGRAMS <= 16, "of the 108 or more of a GPU"
    copier.gather(ids, rows, num_programs=3)
    copier.scatter(rows[:BLOCKS], range(BLOCKS), num_programs=3)
    assert launches.programs[2:] == [3, 3]
    small = make_copier(fp8, layers=1, tokens=4, heads=1)
    small.gather([0], torch.empty(1, small.row_bytes, dtype=torch.uint8))
    small.warm_up()
    assert launches.programs[4:] == [1] * (5 if fp8 else 3)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_launch_sends_the_gpu_one_table_and_another_one_only_for_a_shift(launches, fp8, monkeypatch):
    """Each is a small copy that stands in the way of the large ones."""
    from memos_vllm.kernels.uploads import Uploads

    sent = []
    monkeypatch.setattr(Uploads, "send", lambda self, table: (sent.append(table), table)[1])
    copier, ids = make_copier(fp8), [1, 2, 3]
    rows = torch.empty(3, copier.row_bytes, dtype=torch.uint8)
    copier.gather(ids, rows)
    assert len(sent) == 1
    copier.scatter(rows, ids)
    assert len(sent) == 2
    copier.scatter(rows, ids, shift=RotaryShift.by(1, torch.ones(32)))
    assert len(sent) == 4 and len(launches.programs) == 3
