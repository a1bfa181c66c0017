"""The fp8 form of KV: bit for bit as the reference, and within the bound that its docstring derives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.kernels import fp8
from memos_vllm.kernels.heads import HeadShape, heads_of
from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.kernels.planes import planes_of
from memos_vllm.kernels.reference import gather_fp8_reference, scatter_heads_reference
from tests.kernels.generated import GENERATED, every_head_size_with_one_of
from tests.kernels.kernel_factories import BLOCKS, LAYOUTS, MLA, POISON, VALUE_DTYPES, bits, filled, shape_of


class Store:
    """KV caches of one layout beside a copier with fp8."""

    def __init__(self, device, layout, dtype, tokens, num_heads, head_size):
        caches = layout.caches(lambda *shape: filled(*shape, dtype=dtype).to(device), tokens, num_heads, head_size)
        self.caches = caches
        self.planes = planes_of(self.caches, BLOCKS)
        self.heads = heads_of(self.caches, BLOCKS, shape_of(layout, num_heads, head_size))
        self.copier = BlockCopier(self.planes, self.heads, fp8=True)
        self.device = device

    def rows(self, num_rows, gap=0):
        whole = torch.full((num_rows, self.copier.row_bytes + gap), POISON, dtype=torch.uint8, device=self.device)
        return whole[:, : self.copier.row_bytes]


def normal(*shape, dtype):
    """Values as KV has them: heads of different size, some outliers."""
    values = torch.randn(shape) * torch.exp(torch.randn(*shape[:-1], 1))
    return torch.where(torch.rand(shape) < 0.01, values * 50, values).to(dtype)


class OneBlock:
    """Values ``[heads, tokens, size]`` as K and V of block 0 of one layer."""

    def __init__(self, device, values):
        self.cache = values.expand(2, BLOCKS, *values.shape).contiguous().to(device)
        planes = planes_of([self.cache], BLOCKS)
        self.heads = heads_of([self.cache], BLOCKS, HeadShape(values.shape[0], values.shape[2], "HND"))
        self.copier = BlockCopier(planes, self.heads, fp8=True)

    def encode(self):
        """The row that it is saved as."""
        row = torch.full((1, self.copier.row_bytes), POISON, dtype=torch.uint8, device=self.cache.device)
        self.copier.gather([0], row)
        return row

    def decode(self, row):
        """K as loaded from a row, and its scales ``[heads, 1, 1]``."""
        self.copier.scatter(row, [0])
        scales = self.copier.layout.scales(row[0], 0, self.heads[0])
        return self.cache[0, 0].cpu(), fp8.scale_of(scales.cpu())[:, None, None]


def check(store, ids, rows, gap, programs):
    """Gathers blocks ``ids`` to ``rows`` and scatters them back, beside the reference."""
    chunk, expected = store.rows(BLOCKS, gap), store.rows(BLOCKS, gap)
    store.copier.gather(ids, chunk, rows, num_programs=programs)
    for row, block in zip(rows, ids, strict=True):
        gather_fp8_reference(store.heads, store.copier.layout, [block], expected[row : row + 1])
    assert torch.equal(chunk._base, expected._base)

    different = dict(zip(ids, rows, strict=True))
    before = [cache.clone() for cache in store.caches]
    store.copier.scatter(chunk, list(different), list(different.values()), num_programs=programs)
    found = [cache.clone() for cache in store.caches]
    for cache, old in zip(store.caches, before, strict=True):
        cache.copy_(old)
    for block, row in different.items():
        scatter_heads_reference(chunk[row : row + 1], store.heads, store.copier.layout, [block])
    for cache, result in zip(store.caches, found, strict=True):
        assert torch.equal(cache.isnan(), result.isnan())
        assert torch.equal(bits(cache.nan_to_num(0)), bits(result.nan_to_num(0)))
    untouched = [block for block in range(BLOCKS) if block not in different]
    for now, then in zip(planes_of(found, BLOCKS), planes_of(before, BLOCKS), strict=True):
        assert torch.equal(bits(now[untouched]), bits(then[untouched]))


@pytest.mark.parametrize("name", [*LAYOUTS, "mla"])
def test_every_layout_equals_the_reference(name, device):
    layout, num_heads = (MLA, 1) if name == "mla" else (LAYOUTS[name], 3)
    check(Store(device, layout, torch.bfloat16, 8, num_heads, 24), [7, 2, 10, 2], [1, 4, 3, 0], 0, 8)


@GENERATED
@given(data=st.data())
def test_any_shape_equals_the_reference(device, data):
    """Random bits, NaNs and infinities among them; odd sizes, repeated ids, rows in any order."""
    mla = data.draw(st.booleans())
    layout = MLA if mla else LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    dtype = data.draw(st.sampled_from(VALUE_DTYPES))
    tokens, num_heads = data.draw(st.integers(1, 17)), 1 if mla else data.draw(st.integers(1, 3))
    head_size = data.draw(st.sampled_from([1, 5, 64, 80, 96, 128, 192, 256]))
    ids = data.draw(st.lists(st.integers(0, BLOCKS - 1), max_size=6))
    rows = data.draw(st.permutations(range(BLOCKS)))[: len(ids)]
    store = Store(device, layout, dtype, tokens, num_heads, head_size)
    check(store, ids, rows, data.draw(st.integers(0, 17)), data.draw(st.sampled_from([1, 2, 1000])))


@pytest.mark.parametrize(("head_size", "dtype", "name"), every_head_size_with_one_of(VALUE_DTYPES, list(LAYOUTS)))
def test_every_head_size_and_dtype_equals_the_reference(head_size, dtype, name, device):
    """Also where few shapes are generated."""
    check(Store(device, LAYOUTS[name], dtype, 5, 3, head_size), [7, 2, 10, 2], [1, 4, 3, 0], 16, 2)


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_a_round_trip_stays_within_the_bound(dtype, device):
    values = normal(4, 16, 96, dtype=dtype)
    block = OneBlock(device, values)
    result, scale = block.decode(block.encode())
    error = (result.double() - values.double()).abs()
    bound = fp8.error_bound(values, scale)
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.9, "the bound is larger than it has to be"
    amax = values.double().abs().amax(dim=(1, 2), keepdim=True)
    assert bool((amax <= 448 * scale).all()) and bool((amax > 224 * scale).all())


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_the_bound_holds_at_the_ends_of_the_range(dtype, size, device):
    """Subnormal values, values of very different size, and values that rounding could carry past the largest."""
    info = torch.finfo(dtype)
    scale = {"tiny": info.smallest_normal / 4, "small": info.smallest_normal * 300, "large": info.max}[size]
    values = (torch.rand(8, 4, 16, dtype=torch.float64) * 2 - 1) * scale
    values[:, 0, :8] *= torch.exp2(-torch.arange(8.0))
    values[0, 0, 0] = info.max if size == "large" else scale
    values = values.to(dtype)
    block = OneBlock(device, values)
    result, scale = block.decode(block.encode())
    assert bool(result.isfinite().all())
    assert bool(((result.double() - values.double()).abs() <= fp8.error_bound(values, scale)).all())


def test_every_bfloat16_value(device):
    """All of them, in heads of one binade of both signs each, so that normal and subnormal codes occur."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for values in (every.view(256, 16, 16), every.view(16, 16, 256).transpose(0, 2).contiguous()):
        block = OneBlock(device, values)
        row, expected = block.encode(), block.encode()
        gather_fp8_reference(block.heads, block.copier.layout, [0], expected)
        assert torch.equal(row, expected)


def test_encoding_what_was_decoded_changes_nothing(device):
    block = OneBlock(device, normal(4, 16, 64, dtype=torch.bfloat16))
    first, _ = block.decode(block.encode())
    second, _ = block.decode(block.encode())
    assert torch.equal(bits(first), bits(second))


def test_what_is_not_finite_becomes_nan_and_spoils_nothing_else(device):
    values = normal(2, 16, 64, dtype=torch.bfloat16)
    spoilt = values.clone()
    spoilt[0, 0, 0], spoilt[0, 1, 1], spoilt[0, 2, 2] = float("nan"), float("inf"), float("-inf")
    block = OneBlock(device, spoilt)
    result, scale = block.decode(block.encode())
    assert torch.equal(result.isnan(), ~spoilt.isfinite())
    finite = spoilt.isfinite()
    error = (result.double() - values.double()).abs()
    assert bool((error <= fp8.error_bound(values, scale))[finite].all())


def test_half_the_bytes(device):
    """Per head and block one byte more, and padding to 16 bytes per row."""
    store = Store(device, LAYOUTS["kv_apart_nhd"], torch.bfloat16, 16, 8, 128)
    heads = 2 * 2 * 8
    assert store.copier.row_bytes == store.copier.block_bytes // 2 + heads
    odd = Store(device, LAYOUTS["kv_apart_nhd"], torch.bfloat16, 1, 1, 5)
    row = odd.rows(1)
    odd.copier.gather([0], row)
    assert odd.copier.row_bytes == 32 and bool((row[0, 20 + 4 :] == 0).all())


def test_block_ids_past_two_gib(device):
    """Virtual memory only; 2 MiB lie between blocks."""
    blocks = 2**11 + 1
    memory = torch.empty(blocks, 2**20, dtype=torch.bfloat16, device=device)
    cache = memory[:, : 2 * 16 * 2 * 64].view(blocks, 2, 16, 2 * 64)
    heads = heads_of([cache], blocks, HeadShape(2, 64, "HND"))
    copier = BlockCopier(planes_of([cache], blocks), heads, fp8=True)
    values = normal(2, 16, 128, dtype=torch.bfloat16).to(device)
    cache[blocks - 1] = values
    row = torch.zeros(1, copier.row_bytes, dtype=torch.uint8, device=device)
    copier.gather([blocks - 1], row)
    cache[blocks - 1] = 0
    copier.scatter(row, [blocks - 1])
    assert torch.allclose(cache[blocks - 1].float(), values.float(), rtol=2**-4, atol=0.05)
