"""KV that an adapter computed goes with its owner and with the adapter."""

from __future__ import annotations

import pytest

from memos_vllm.store import tags
from memos_vllm.store.manager import ForgetReport
from tests.store.store_factories import make_keys
from tests.store.test_manager import MakeTiers, end_all, make_tiers, matched, put_on_disk, put_on_host

__all__ = ["make_tiers"]  # the fixture

ALICE, BOB, STYLE, OTHER = (bytes([number]) * tags.PART_BYTES for number in range(1, 5))


def test_the_parts_of_a_tag() -> None:
    assert tags.parts(ALICE + STYLE) == {ALICE, STYLE, ALICE + STYLE}
    assert tags.parts(ALICE) == {ALICE} and tags.parts(b"short") == {b"short"} and tags.parts(b"") == {b""}


@pytest.mark.parametrize(
    ("forgotten", "gone"), [(ALICE, (1, 3, 5)), (STYLE, (1, 3, 7)), (ALICE + STYLE, (1, 3)), (OTHER, ())]
)
def test_either_part_forgets_it_in_every_tier(make_tiers: MakeTiers, forgotten: bytes, gone: tuple[int, ...]) -> None:
    tiers = make_tiers()
    put_on_host(tiers, 1, tag=ALICE + STYLE)
    put_on_disk(tiers, 3, tag=ALICE + STYLE)
    put_on_host(tiers, 5, tag=ALICE)
    put_on_host(tiers, 7, tag=BOB + STYLE)
    report = tiers.forget(forgotten)
    assert [number for number in (1, 3, 5, 7) if not matched(tiers, number)] == list(gone)
    assert report.disk_blocks == len(gone)
    later = tiers.plan_save(make_keys(9), (19,), ALICE + STYLE)
    assert bool(later) == (not gone), "nor is it kept later"
    end_all(tiers, later)
    assert tiers.forget(forgotten) == ForgetReport(0, 0)
