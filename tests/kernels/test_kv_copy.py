"""Block copies against the plain reference: every layout, every dtype, exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.kernels.heads import HeadShape, heads_of
from memos_vllm.kernels.kv_copy import (
    BlockCopier,
    block_bytes,
    describe_planes,
    gather_blocks,
    planes_of,
    scatter_blocks,
)
from memos_vllm.kernels.reference import gather_reference, scatter_reference
from memos_vllm.store.fragments import fragment_views
from tests.kernels.generated import GENERATED, INTERPRETED, every_head_size_with_one_of
from tests.kernels.kernel_factories import (
    BLOCKS,
    DTYPES,
    ID_LISTS,
    LAYOUTS,
    MLA,
    ODD_LAYOUTS,
    POISON,
    bits,
    filled,
    poisoned,
)

FEW_DTYPES = DTYPES[:1] if INTERPRETED else DTYPES


def caches_of(name, dtype, device, tokens=8, heads=2, head_size=24):
    def make(*shape):
        return filled(*shape, dtype=dtype).to(device)

    if name in ODD_LAYOUTS:
        return ODD_LAYOUTS[name](make)
    return {**LAYOUTS, "mla": MLA}[name].caches(make, tokens, heads, head_size)


@pytest.fixture(params=[*LAYOUTS, "mla", *ODD_LAYOUTS])
def layout(request):
    return request.param


@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_gather_equals_the_reference(layout, dtype, device):
    planes = planes_of(caches_of(layout, dtype, device), BLOCKS)
    width = block_bytes(planes)
    for ids, gap in zip([*ID_LISTS, [4, 4, 2, 4]], [0, 13, 16, 2, 8, 4, 1], strict=True):
        expected = poisoned(len(ids), width).to(device)
        whole = torch.full((len(ids), width + gap), POISON, dtype=torch.uint8, device=device)
        out = whole[:, :width]
        gather_blocks(planes, ids, out)
        gather_reference(planes, ids, expected)
        assert torch.equal(out, expected)
        assert bool((whole[:, width:] == POISON).all())


@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_scatter_equals_the_reference_and_leaves_other_blocks(layout, dtype, device):
    for ids in ID_LISTS:
        caches = caches_of(layout, dtype, device)
        twins = [cache.clone() for cache in caches]
        planes, twin_planes = planes_of(caches, BLOCKS), planes_of(twins, BLOCKS)
        chunk = torch.randint(0, 256, (len(ids), block_bytes(planes)), dtype=torch.uint8).to(device)
        scatter_blocks(chunk, planes, ids)
        scatter_reference(chunk, twin_planes, ids)
        for plane, twin in zip(planes, twin_planes, strict=True):
            assert torch.equal(bits(plane), bits(twin))


@GENERATED
@given(data=st.data())
def test_any_shape_any_rows_any_order(device, data):
    """Odd sizes, one block, repeated ids, rows of a larger matrix that lie apart, few programs or many."""
    dtype = data.draw(st.sampled_from(DTYPES))
    name = data.draw(st.sampled_from([*LAYOUTS, "mla"]))
    tokens, heads = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 3))
    head_size = data.draw(st.sampled_from([1, 5, 64, 80, 96, 128, 192, 256]))
    planes = planes_of(caches_of(name, dtype, device, tokens, heads, head_size), BLOCKS)
    programs = data.draw(st.sampled_from([1, 2, 8, 1000]))
    ids = data.draw(st.lists(st.integers(0, BLOCKS - 1), max_size=BLOCKS))
    rows = data.draw(st.permutations(range(BLOCKS)))[: len(ids)]
    check(planes, ids, rows, data.draw(st.integers(0, 33)), programs)


@pytest.mark.parametrize(
    ("head_size", "dtype", "name"),
    every_head_size_with_one_of(DTYPES, ["kv_in_one_head", "small_kernel_blocks", "mla"]),
)
def test_every_head_size_and_dtype(device, head_size, dtype, name):
    """Also where few shapes are generated: repeated ids, blocks in any order, rows apart, more tiles than programs."""
    planes = planes_of(caches_of(name, dtype, device, tokens=5, heads=3, head_size=head_size), BLOCKS)
    check(planes, [7, 2, 10, 2, 0], [1, 4, 3, 0, 9], gap=16, programs=2)


def check(planes, ids, rows, gap, programs):
    """Gathers blocks ``ids`` to ``rows`` of a poisoned matrix, ``gap`` bytes apart, and scatters them back."""
    copier, device = BlockCopier(planes), planes[0].device
    chunk, expected = (torch.full((BLOCKS, copier.row_bytes + gap), POISON, dtype=torch.uint8) for _ in range(2))
    chunk, expected = chunk.to(device), expected.to(device)
    copier.gather(ids, chunk[:, : copier.row_bytes], rows, num_programs=programs)
    for row, block in zip(rows, ids, strict=True):
        gather_reference(planes, [block], expected[row : row + 1, : copier.row_bytes])
    assert torch.equal(chunk, expected)

    different = dict(zip(ids, rows, strict=True))
    before = [bits(plane).clone() for plane in planes]
    for plane in planes:
        plane.view(torch.uint8 if plane.stride(-1) == 1 else plane.dtype)[list(different)] = 0
    copier.scatter(chunk[:, : copier.row_bytes], list(different), list(different.values()), num_programs=programs)
    assert all(torch.equal(bits(plane), old) for plane, old in zip(planes, before, strict=True))


@pytest.mark.parametrize("count", [1, 2, 5, BLOCKS])
def test_planes_of_several_sizes_at_odd_addresses(device, count):
    """Short and long pieces in one block, their number no multiple of those that go together."""
    sizes = [1, 255, 256, 257, 1000, 4096, 4097, 64, 511]
    memory = [filled(BLOCKS * (size + 3) + 64, dtype=torch.uint8).to(device) for size in sizes]
    planes = [
        whole[offset:].as_strided((BLOCKS, size), (size + 3, 1))
        for offset, (whole, size) in enumerate(zip(memory, sizes, strict=True))
    ]
    ids = [(3 * number) % BLOCKS for number in range(count)]
    chunk, expected = poisoned(count, sum(sizes)).to(device), poisoned(count, sum(sizes)).to(device)
    gather_blocks(planes, ids, chunk)
    gather_reference(planes, ids, expected)
    assert torch.equal(chunk, expected)
    before = [whole.clone() for whole in memory]
    for plane in planes:
        plane[ids] = POISON
    scatter_blocks(chunk, planes, ids)
    assert all(map(torch.equal, memory, before)), "also between the blocks"


def test_warming_up_touches_nothing(device):
    cache = filled(2, BLOCKS, 16, 2, 24).to(device)
    before = cache.clone()
    heads = heads_of([cache], BLOCKS, HeadShape(2, 24, "NHD"))
    BlockCopier(planes_of([cache], BLOCKS), heads, fp8=True).warm_up()
    assert torch.equal(bits(cache), bits(before))


def test_a_block_of_one_piece_is_one_fragment_whatever_the_order_of_its_dimensions(device):
    """FlashAttention's: heads before tokens in the shape, behind them in memory; 4 kernel blocks per block too."""
    for kernel_blocks in (1, 4):
        memory = filled(BLOCKS * kernel_blocks, 16, 2, 24).to(device)
        planes = planes_of([memory.transpose(1, 2)], BLOCKS)
        chunk = poisoned(BLOCKS, block_bytes(planes)).to(device)
        gather_blocks(planes, range(BLOCKS), chunk)
        assert torch.equal(chunk.flatten(), bits(memory).flatten())
        [fragments] = fragment_views(planes)
        assert torch.equal(fragments, chunk)


def test_a_block_between_whose_heads_other_layers_lie_keeps_the_order_of_its_shape(device):
    memory = filled(BLOCKS, 2, 2, 16, 24).to(device)
    [plane, _] = planes_of(list(memory.transpose(1, 2).unbind(1)), BLOCKS)  # no order makes it one piece
    assert plane.shape == (BLOCKS, 2, 16, 24) and fragment_views([plane]) is None


def test_another_order_of_bytes_is_another_layout():
    """Also where heads are as many as tokens, so that the shapes are equal."""
    hnd, nhd = filled(BLOCKS, 16, 16, 24), filled(BLOCKS, 16, 16, 24).transpose(1, 2)
    assert hnd.shape == nhd.shape
    assert describe_planes([hnd], BLOCKS) == ("bfloat16[16,16,24]",)
    assert describe_planes([nhd], BLOCKS) == ("bfloat16[16,16,24] as 1,0,2",)
    assert describe_planes([nhd.contiguous()], BLOCKS) == ("bfloat16[16,16,24]",)


def test_planes_share_memory_and_shared_layers_count_once(device):
    cache = filled(2, BLOCKS * 2, 4, 6).to(device)
    planes = planes_of([cache, cache, cache.view(cache.shape)], BLOCKS)
    assert [tuple(plane.shape) for plane in planes] == [(BLOCKS, 2, 4, 6)] * 2
    assert [plane.data_ptr() for plane in planes] == [cache[0].data_ptr(), cache[1].data_ptr()]
    assert describe_planes([cache, cache], BLOCKS) == ("bfloat16[2,4,6]",) * 2


def test_block_ids_past_two_gib(device):
    """Virtual memory only: the offset of the last block, 4 GiB, does not fit 32 bits."""
    blocks = 2**20 + 1
    planes = planes_of([torch.empty(blocks, 4096, dtype=torch.uint8, device=device)], blocks)
    copier = BlockCopier(planes)
    chunk = torch.randint(0, 256, (1, copier.row_bytes), dtype=torch.uint8).to(device)
    copier.scatter(chunk, [2**20])
    out = poisoned(1, copier.row_bytes).to(device)
    copier.gather([2**20], out)
    assert torch.equal(out, chunk)
    assert torch.equal(planes[0][2**20], chunk[0])


@pytest.mark.parametrize("wrong", [-1, BLOCKS])
def test_a_number_of_no_block_is_refused_and_nothing_is_copied(wrong):
    planes = planes_of([torch.zeros(BLOCKS, 16, dtype=torch.uint8)], BLOCKS)
    copier = BlockCopier(planes)
    chunk = torch.ones(2, copier.row_bytes, dtype=torch.uint8)
    for copy in (lambda ids: copier.scatter(chunk, ids), lambda ids: copier.gather(ids, chunk)):
        with pytest.raises(IndexError, match=f"not below {BLOCKS}"):
            copy([0, wrong])
    assert not planes[0].any() and chunk.all()


@pytest.mark.parametrize("shape", [(7, 16, 8), (2, 7, 16), (3, BLOCKS, 16), (0, 4), ()], ids=str)
def test_a_shape_without_blocks_is_refused(shape):
    with pytest.raises(ValueError, match="count 11 blocks"):
        planes_of([torch.empty(shape)], BLOCKS)


def test_an_ambiguous_shape_is_refused():
    with pytest.raises(ValueError, match="both of the first two"):
        planes_of([torch.empty(2, 4, 16)], 2)


@pytest.mark.parametrize("more", [-16, 0, 16, 8 * 1024 + 48])
def test_long_pieces_and_short_ones_of_one_block_are_copied_exactly(more):
    """Long ones singly, between short ones that are copied together."""
    cpu_copy = pytest.importorskip("memos_vllm.kernels.cpu_copy")
    widths = (300, cpu_copy.LONG_BYTES + more, 4096, cpu_copy.LONG_BYTES - more)
    planes = [torch.randint(0, 256, (6, width), dtype=torch.uint8) for width in widths]
    copier, ids = BlockCopier(planes), [4, 1, 3]
    rows, expected = torch.full((3, sum(widths)), POISON, dtype=torch.uint8), torch.empty(3, sum(widths)).byte()
    gather_reference(planes, ids, expected)
    copier.gather(ids, rows)
    assert torch.equal(rows, expected)
    before = [plane.clone() for plane in planes]
    copier.scatter(rows, [0, 2, 5])
    arrived = torch.empty_like(expected)
    gather_reference(planes, [0, 2, 5], arrived)
    assert torch.equal(arrived, expected)
    assert all(torch.equal(plane[[1, 3, 4]], old[[1, 3, 4]]) for plane, old in zip(planes, before, strict=True))
