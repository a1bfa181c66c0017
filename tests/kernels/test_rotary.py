"""Rotary shifts: K of other positions, within the bound that the docstring derives, and nothing else touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.kernels import fp8, rotary
from memos_vllm.kernels.heads import HeadShape, heads_of
from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.kernels.planes import planes_of
from memos_vllm.kernels.reference import gather_reference, rotate, scatter_heads_reference
from memos_vllm.kernels.rotary import RotaryShift
from tests.kernels.generated import GENERATED, every_head_size_with_one_of
from tests.kernels.kernel_factories import BLOCKS, LAYOUTS, MLA, VALUE_DTYPES, bits, poisoned, shape_of


def frequencies(rotary_dim):
    return 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def check_keys(shift, stored, found, dtype, extra=0.0):
    """``stored`` and ``found`` ``[..., head_size]``; ``extra``: what a value may be off before it is turned."""
    exact = rotate(stored.double(), shift)
    first, second = (part.abs() for part in shift.pairs(stored.double()))
    off = (found.double() - exact).abs()
    bounds = torch.zeros_like(off)
    for part, result in zip(shift.pairs(bounds), shift.pairs(exact), strict=True):
        part.copy_(rotary.error_bound(first, second, result, dtype))
    assert bool((off <= bounds + extra).all()), float((off - bounds).max())


def check(device, layout, dtype, tokens, num_heads, head_size, shift, use_fp8, ids, programs):
    """Moves blocks ``ids`` to blocks 0, 1, ... under a shift: K within the bound, all else bit for bit."""
    caches = layout.caches(lambda *shape: torch.randn(shape).to(dtype).to(device), tokens, num_heads, head_size)
    planes, heads = planes_of(caches, BLOCKS), heads_of(caches, BLOCKS, shape_of(layout, num_heads, head_size))
    copier = BlockCopier(planes, heads, fp8=use_fp8)
    chunk, targets = poisoned(len(ids), copier.row_bytes).to(device), list(range(len(ids)))
    copier.gather(ids, chunk)
    before = [plane.clone() for plane in planes]
    copier.scatter(chunk, targets, shift=shift, num_programs=programs)

    found = [head.view[targets] for head in heads]
    for plane, old in zip(planes, before, strict=True):
        assert torch.equal(bits(plane[len(ids) :]), bits(old[len(ids) :]))
    copier.scatter(chunk, targets)
    end = shift.first_dim + shift.rotary_dim
    for head, turned in zip(heads, found, strict=True):
        plain = head.view[targets]
        if head.is_key:
            check_keys(shift, plain.cpu(), turned.cpu(), dtype)
            plain, turned = (torch.cat([t[..., : shift.first_dim], t[..., end:]], -1) for t in (plain, turned))
        assert torch.equal(bits(turned), bits(plain))


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize("name", [*LAYOUTS, "mla"])
def test_every_layout_stays_within_the_bound(name, style, device):
    layout, num_heads = (MLA, 1) if name == "mla" else (LAYOUTS[name], 3)
    shift = RotaryShift.by(-77, frequencies(16), style, first_dim=5)
    for use_fp8 in (False, True):
        check(device, layout, torch.bfloat16, 8, num_heads, 24, shift, use_fp8, [7, 2, 10, 2], 8)


@GENERATED
@given(data=st.data())
def test_any_shape_stays_within_the_bound(device, data):
    """Both styles, all or some of a head's elements, forth and back, with fp8 and without."""
    mla = data.draw(st.booleans())
    layout = MLA if mla else LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    dtype = data.draw(st.sampled_from(VALUE_DTYPES))
    tokens, num_heads = data.draw(st.integers(1, 17)), 1 if mla else data.draw(st.integers(1, 3))
    head_size = data.draw(st.sampled_from([6, 64, 80, 96, 128, 192, 256]))
    rotary_dim = 2 * data.draw(st.integers(1, head_size // 2))
    first_dim = data.draw(st.integers(0, head_size - rotary_dim))
    style = data.draw(st.sampled_from(["neox", "gptj"]))
    shift = RotaryShift.by(data.draw(st.integers(-100_000, 100_000)), frequencies(rotary_dim), style, first_dim)
    ids = data.draw(st.lists(st.integers(0, BLOCKS - 1), max_size=4))
    programs = data.draw(st.sampled_from([1, 2, 1000]))
    check(device, layout, dtype, tokens, num_heads, head_size, shift, data.draw(st.booleans()), ids, programs)


@pytest.mark.parametrize(
    ("head_size", "dtype", "name", "use_fp8"), every_head_size_with_one_of(VALUE_DTYPES, list(LAYOUTS), [False, True])
)
@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_every_head_size_and_dtype_stays_within_the_bound(head_size, dtype, name, use_fp8, style, device):
    """Also where few shapes are generated: whole heads, and a part of them that is no power of two."""
    for rotary_dim, first_dim in [(head_size, 0), (head_size // 4 + 4, 6)]:
        shift = RotaryShift.by(4321, frequencies(rotary_dim), style, first_dim)
        check(device, LAYOUTS[name], dtype, 5, 2, head_size, shift, use_fp8, [7, 2, 10], 2)


@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_a_shifted_key_is_the_key_of_the_other_position(style, device):
    """Rotated by 1,234 at first and by 777 later: as if by 2,011 at once. YaRN's factor stays as it was."""
    yarn = 1.26
    table = torch.zeros(4096, 32, dtype=torch.float64)
    angles = torch.arange(4096.0, dtype=torch.float64)[:, None] * frequencies(32)
    table = yarn * torch.cat([angles.cos(), angles.sin()], dim=-1)
    raw = torch.randn(2, BLOCKS, 16, 2, 64, dtype=torch.float64)

    def at(position):
        cos, sin = table[position].chunk(2)
        result = raw.clone()
        whole = RotaryShift(torch.ones(16), torch.zeros(16), style, 8)
        (a, b), (x, y) = whole.pairs(raw[0]), whole.pairs(result[0])
        x.copy_(a * cos - b * sin)
        y.copy_(b * cos + a * sin)
        return result.float()

    cache = at(1234).to(device)
    shift = RotaryShift.from_cos_sin_cache(table.float(), 777, style, first_dim=8)
    heads = heads_of([cache], BLOCKS, HeadShape(2, 64, "NHD"))
    copier = BlockCopier(planes_of([cache], BLOCKS), heads)
    chunk = poisoned(BLOCKS, copier.row_bytes).to(device)
    copier.gather(range(BLOCKS), chunk)
    copier.scatter(chunk, range(BLOCKS), shift=shift)
    assert torch.allclose(cache.cpu(), at(2011), atol=2e-6)

    back = RotaryShift.from_cos_sin_cache(table.float(), -777, style, first_dim=8)
    copier.gather(range(BLOCKS), chunk)
    copier.scatter(chunk, range(BLOCKS), shift=back)
    assert torch.allclose(cache.cpu(), at(1234), atol=2e-6)


def test_nan_in_v_does_not_spread(device):
    """V takes the same way through the kernel as K, and must not be touched by it."""
    cache = torch.randn(2, BLOCKS, 16, 2, 64).bfloat16().to(device)
    cache[1, 3, 0, 0, 0] = float("nan")
    cache[1, 3, 1, 0, 5] = float("inf")
    heads = heads_of([cache], BLOCKS, HeadShape(2, 64, "NHD"))
    copier = BlockCopier(planes_of([cache], BLOCKS), heads)
    chunk = poisoned(1, copier.row_bytes).to(device)
    copier.gather([3], chunk)
    copier.scatter(chunk, [5], shift=RotaryShift.by(9, frequencies(64)))
    assert torch.equal(bits(cache[1, 5]), bits(cache[1, 3]))


def test_v_may_have_smaller_heads_than_k(device):
    """Too small for the shift, which does not concern them."""
    cache = torch.randn(BLOCKS, 2, 16, 64 + 16).bfloat16().to(device)
    heads = heads_of([cache], BLOCKS, HeadShape(2, 64, "HND", head_size_v=16))
    copier = BlockCopier(planes_of([cache], BLOCKS), heads)
    chunk = poisoned(1, copier.row_bytes).to(device)
    copier.gather([3], chunk)
    copier.scatter(chunk, [5], shift=RotaryShift.by(9, frequencies(64)))
    check_keys(RotaryShift.by(9, frequencies(64)), cache[3, ..., :64].cpu(), cache[5, ..., :64].cpu(), torch.bfloat16)
    assert torch.equal(bits(cache[5, ..., 64:]), bits(cache[3, ..., 64:]))


def test_the_reference_of_a_shifted_fp8_load(device):
    """The kernels beside the reference of the whole way: within both bounds together."""
    cache = torch.randn(2, BLOCKS, 16, 2, 64).bfloat16().to(device)
    shift = RotaryShift.by(333, frequencies(64))
    heads = heads_of([cache], BLOCKS, HeadShape(2, 64, "NHD"))
    copier = BlockCopier(planes_of([cache], BLOCKS), heads, fp8=True)
    stored = cache[0, 2].cpu()
    row = poisoned(1, copier.row_bytes).to(device)
    copier.gather([2], row)
    copier.scatter(row, [7], shift=shift)
    found = cache[:, 7].clone()
    scatter_heads_reference(row, heads, copier.layout, [7], shift)
    assert torch.equal(bits(found[1]), bits(cache[1, 7]))
    scales = fp8.scale_of(copier.layout.scales(row[0], 0, heads[0]).cpu())[None, :, None]
    first, second = shift.pairs(fp8.error_bound(stored, scales))
    off = torch.cat([first + second] * 2, dim=-1)
    for result in (found[0], cache[0, 7]):
        check_keys(shift, stored, result.cpu(), torch.bfloat16, extra=off * (1 + 2**-7))


def test_an_exact_row_is_what_gather_makes_of_it(device):
    cache = torch.randn(2, BLOCKS, 16, 2, 64).bfloat16().to(device)
    planes = planes_of([cache], BLOCKS)
    copier = BlockCopier(planes, heads_of([cache], BLOCKS, HeadShape(2, 64, "NHD")))
    found, expected = poisoned(2, copier.row_bytes).to(device), poisoned(2, copier.row_bytes).to(device)
    copier.gather([4, 1], found)
    gather_reference(planes, [4, 1], expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryShift(torch.zeros(3), torch.zeros(4)), "as many cosines as sines"),
        (lambda: RotaryShift(torch.zeros(3).half(), torch.zeros(3)), "must be float32"),
        (lambda: RotaryShift(torch.zeros(3), torch.zeros(3), "llama"), "not 'llama'"),
        (lambda: RotaryShift.from_cos_sin_cache(torch.ones(8, 4), -8), "8 positions"),
        (lambda: RotaryShift.from_cos_sin_cache(torch.ones(8, 4).bfloat16(), 1), "RotaryShift.by computes one"),
        (lambda: RotaryShift.by(1, frequencies(64), first_dim=1).check(64), "does not fit heads of 64"),
    ],
    ids=["lengths", "dtype", "style", "positions", "cache_dtype", "too_long"],
)
def test_a_shift_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_shift_needs_heads_that_it_fits(device):
    cache = torch.randn(2, BLOCKS, 16, 2, 64).bfloat16().to(device)
    planes = planes_of([cache], BLOCKS)
    chunk = poisoned(1, BlockCopier(planes).row_bytes).to(device)
    with pytest.raises(ValueError, match="needs head views"):
        BlockCopier(planes).scatter(chunk, [0], shift=RotaryShift.by(1, frequencies(64)))
    copier = BlockCopier(planes, heads_of([cache], BLOCKS, HeadShape(2, 64, "NHD")))
    with pytest.raises(ValueError, match="does not fit heads of 64"):
        copier.scatter(chunk, [0], shift=RotaryShift.by(1, frequencies(128)))


def test_the_reference_takes_the_tables_to_where_the_heads_are():
    heads = torch.empty(3, 16, dtype=torch.float64, device="meta")
    turned = rotate(heads, RotaryShift.by(5, frequencies(16)))
    assert (turned.device, turned.dtype, turned.shape) == (heads.device, heads.dtype, heads.shape)
