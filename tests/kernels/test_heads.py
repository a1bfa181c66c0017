"""Head views: the same heads in every layout, and the place of their values in a row."""

import pytest
import torch

from memos_vllm.kernels.heads import HeadShape, heads_of
from memos_vllm.kernels.kv_copy import BlockCopier
from memos_vllm.kernels.planes import planes_of
from memos_vllm.kernels.reference import gather_reference
from memos_vllm.kernels.rows import exact_rows, fp8_rows
from tests.kernels.kernel_factories import BLOCKS, LAYOUTS, MLA, filled, poisoned, shape_of

TOKENS, HEADS, SIZE = 8, 3, 16


@pytest.mark.parametrize("name", [*LAYOUTS, "mla"])
def test_a_row_holds_the_values_of_the_view(name):
    layout = {**LAYOUTS, "mla": MLA}[name]
    num_heads = 1 if name == "mla" else HEADS
    caches = layout.caches(filled, TOKENS, num_heads, SIZE)
    planes = planes_of(caches, BLOCKS)
    heads = heads_of(caches, BLOCKS, shape_of(layout, num_heads, SIZE))
    rows = exact_rows(planes)
    chunk = poisoned(1, rows.row_bytes)
    gather_reference(planes, [3], chunk)
    assert len(heads) == len(caches) * (1 if name == "mla" else 2)
    for head in heads:
        _, parts, view_heads, tokens, size = head.view.shape
        assert (view_heads, size) == (num_heads, SIZE) and parts * tokens % TOKENS == 0
        values = rows.values(chunk[0], head)
        assert torch.equal(values.contiguous().view(torch.int16), head.view[3].contiguous().view(torch.int16))


def test_k_and_v_are_told_apart_and_tokens_from_heads():
    """By value: K has the number of its token, V that of its head."""
    key = torch.arange(TOKENS).view(TOKENS, 1, 1).expand(TOKENS, HEADS, SIZE)
    value = 100 + torch.arange(HEADS).view(1, HEADS, 1).expand(TOKENS, HEADS, SIZE)
    apart = torch.stack([key, value]).unsqueeze(1).expand(-1, BLOCKS, -1, -1, -1).bfloat16()
    together = torch.cat([key, value], -1).transpose(0, 1).expand(BLOCKS, -1, -1, -1).bfloat16().contiguous()
    beside = torch.stack([key, value]).expand(BLOCKS, -1, -1, -1, -1).bfloat16()
    for cache, order in [(apart, "NHD"), (together, "HND"), (beside, "NHD")]:
        heads = heads_of([cache], BLOCKS, HeadShape(HEADS, SIZE, order))
        assert [head.is_key for head in heads] == [True, False]
        for token in range(TOKENS):
            assert bool((heads[0].view[:, :, :, token] == token).all())
        for head in range(HEADS):
            assert bool((heads[1].view[:, :, head] == 100 + head).all())


def test_sizes_of_k_and_v_may_differ_and_shared_layers_count_once():
    cache = filled(BLOCKS, HEADS, TOKENS, 24)
    heads = heads_of([cache, cache], BLOCKS, HeadShape(HEADS, 16, "HND", head_size_v=8))
    assert [head.view.shape[-1] for head in heads] == [16, 8]
    assert fp8_rows(planes_of([cache], BLOCKS), heads).row_bytes == -(-(HEADS * TOKENS * 24 + 2 * HEADS) // 16) * 16


@pytest.mark.parametrize(
    ("cache", "shape", "message"),
    [
        (filled(BLOCKS, 16, 4, 64), HeadShape(4, 64, "NHD"), r"\[16, 4, 64\], which does not hold 4 heads of 64"),
        (filled(2, BLOCKS, 16, 4, 64), HeadShape(4, 64, "HND"), "in the order HND"),
        (filled(2, BLOCKS, 16, 4, 64), HeadShape(4, 128, "NHD"), "heads of 128"),
        (filled(BLOCKS, 16, 64), HeadShape(2, 64), "2 heads"),
        (filled(2, BLOCKS, 16, 4, 64, dtype=torch.uint8), HeadShape(4, 64, "NHD"), "holds torch.uint8"),
        (filled(2, BLOCKS, 16, 64, 4).transpose(3, 4), HeadShape(4, 64, "NHD"), "side by side"),
    ],
    ids=["k_only", "other_order", "other_size", "mla_with_heads", "bytes", "strided"],
)
def test_a_cache_that_does_not_fit_is_refused(cache, shape, message):
    with pytest.raises(ValueError, match=message):
        heads_of([cache], BLOCKS, shape)


def test_heads_of_other_caches_are_refused():
    caches = [filled(2, BLOCKS, 16, 4, 64)] * 2 + [filled(2, BLOCKS, 16, 4, 64)]
    heads = heads_of(caches[:1], BLOCKS, HeadShape(4, 64, "NHD"))
    with pytest.raises(ValueError, match="do not cover"):
        BlockCopier(planes_of(caches, BLOCKS), heads)
    with pytest.raises(ValueError, match="needs head views"):
        BlockCopier(planes_of(caches, BLOCKS), fp8=True)
