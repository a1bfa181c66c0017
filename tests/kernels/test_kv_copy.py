"""Block copies against the plain reference: every layout, every dtype, exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm.kernels import kv_copy
from memos_vllm.kernels.kv_copy import BlockCopier, block_bytes, gather_blocks, planes_of, scatter_blocks

BLOCKS = 11
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]
ID_LISTS = [[], [0], [10], [3, 4, 5, 6], [7, 6, 5], [9, 1, 2, 0, 8, 7, 3]]
POISON = 0xA5


def filled(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random bits, NaNs among them: a copy must not look at values."""
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * width), dtype=torch.uint8).view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def poisoned(rows: int, row_bytes: int, gap: int = 0) -> torch.Tensor:
    return torch.full((rows, row_bytes + gap), POISON, dtype=torch.uint8)[:, :row_bytes]


# name -> KV caches of three layers, as vLLM registers them
LAYOUTS = {
    "cpu": lambda dtype: [filled(BLOCKS, 2, 16, 2 * 24, dtype=dtype) for _ in range(3)],
    "kv_apart": lambda dtype: [filled(2, BLOCKS, 16, 2, 24, dtype=dtype) for _ in range(3)],
    "hnd_seen_as_nhd": lambda dtype: [filled(BLOCKS, 2, 2, 16, 24, dtype=dtype).transpose(2, 3) for _ in range(3)],
    "small_kernel_blocks": lambda dtype: [filled(BLOCKS * 4, 2, 4, 24, dtype=dtype) for _ in range(3)],
    "kv_apart_small_kernel_blocks": lambda dtype: [filled(2, BLOCKS * 2, 8, 2, 24, dtype=dtype) for _ in range(3)],
    "mla": lambda dtype: [filled(BLOCKS, 16, 72, dtype=dtype) for _ in range(3)],
    "layers_interleaved": lambda dtype: list(filled(BLOCKS, 3, 2, 16, 48, dtype=dtype).unbind(1)),
    "last_dimension_strided": lambda dtype: [filled(BLOCKS, 16, 5, dtype=dtype).transpose(1, 2) for _ in range(3)],
    "odd": lambda dtype: [filled(BLOCKS, 3, 7, dtype=dtype), filled(BLOCKS, 1, 1, dtype=dtype)],
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(params=["cpu", "generic"], autouse=True)
def path(request, monkeypatch):
    """Both implementations run on CPU; a GPU takes the generic one."""
    if request.param == "generic":
        real = BlockCopier.__init__

        def without_arrays(self, planes):
            real(self, planes)
            self._arrays = None

        monkeypatch.setattr(BlockCopier, "__init__", without_arrays)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_equals_the_reference(layout, dtype):
    planes = planes_of(layout(dtype), BLOCKS)
    for ids in [*ID_LISTS, [4, 4, 2, 4]]:
        out, expected = poisoned(len(ids), block_bytes(planes), gap=13), poisoned(len(ids), block_bytes(planes))
        whole = out._base
        gather_blocks(planes, ids, out)
        kv_copy.gather_reference(planes, ids, expected)
        assert torch.equal(out, expected)
        assert bool((whole[:, block_bytes(planes) :] == POISON).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_equals_the_reference_and_leaves_other_blocks(layout, dtype):
    for ids in ID_LISTS:
        caches = layout(dtype)
        twins = [cache.clone() for cache in caches]
        planes, twin_planes = planes_of(caches, BLOCKS), planes_of(twins, BLOCKS)
        chunk = torch.randint(0, 256, (len(ids), block_bytes(planes)), dtype=torch.uint8)
        scatter_blocks(chunk, planes, ids)
        kv_copy.scatter_reference(chunk, twin_planes, ids)
        for plane, twin in zip(planes, twin_planes, strict=True):
            assert torch.equal(bits(plane), bits(twin))


def test_a_chunk_moves_between_stride_orders():
    """Saved from HND, loaded into NHD: equal in logical order."""
    source = planes_of([filled(BLOCKS, 2, 16, 24).transpose(1, 2)], BLOCKS)
    target = planes_of([filled(BLOCKS, 16, 2, 24)], BLOCKS)
    chunk = poisoned(BLOCKS, block_bytes(source))
    gather_blocks(source, range(BLOCKS), chunk)
    scatter_blocks(chunk, target, range(BLOCKS))
    assert torch.equal(bits(source[0]), bits(target[0]))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_and_ids_in_any_order(data):
    planes = planes_of(list(filled(BLOCKS, 2, 3, 5).unbind(1)), BLOCKS)
    ids = data.draw(st.lists(st.integers(0, BLOCKS - 1), unique=True))
    rows = data.draw(st.permutations(range(BLOCKS)))[: len(ids)]
    copier = BlockCopier(planes)
    chunk = poisoned(BLOCKS, copier.block_bytes)
    if copier._arrays is None:
        return  # rows other than 0..n are for host memory
    copier.gather(ids, chunk, rows)
    expected = poisoned(BLOCKS, copier.block_bytes)
    for row, block in zip(rows, ids, strict=True):
        kv_copy.gather_reference(planes, [block], expected[row : row + 1])
    assert torch.equal(chunk, expected)
    before = [bits(plane).clone() for plane in planes]
    for plane in planes:
        plane[ids] = 0
    copier.scatter(chunk, ids, rows)
    assert all(torch.equal(bits(plane), old) for plane, old in zip(planes, before, strict=True))


def test_planes_share_memory_and_shared_layers_count_once():
    cache = filled(2, BLOCKS * 2, 4, 6)
    planes = planes_of([cache, cache, cache.view(cache.shape)], BLOCKS)
    assert [tuple(plane.shape) for plane in planes] == [(BLOCKS, 2, 4, 6)] * 2
    assert [plane.data_ptr() for plane in planes] == [cache[0].data_ptr(), cache[1].data_ptr()]
    assert kv_copy.describe_planes(planes) == ("bfloat16[2,4,6]",) * 2


def test_block_ids_past_two_gib():
    """Virtual memory only: the offset of the last block does not fit 32 bits."""
    planes = planes_of([torch.empty(2**20 + 1, 4096, dtype=torch.uint8)], 2**20 + 1)
    chunk = torch.randint(0, 256, (1, 4096), dtype=torch.uint8)
    scatter_blocks(chunk, planes, [2**20])
    out = poisoned(1, 4096)
    gather_blocks(planes, [2**20], out)
    assert torch.equal(out, chunk)


@pytest.mark.parametrize("shape", [(7, 16, 8), (2, 7, 16), (3, BLOCKS, 16), (0, 4), ()], ids=str)
def test_a_shape_without_blocks_is_refused(shape):
    with pytest.raises(ValueError, match="count 11 blocks"):
        planes_of([torch.empty(shape)], BLOCKS)


def test_an_ambiguous_shape_is_refused():
    with pytest.raises(ValueError, match="both of the first two"):
        planes_of([torch.empty(2, 4, 16)], 2)
