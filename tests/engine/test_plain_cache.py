"""What is known of blocks that ordinary requests left in the prefix cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memos_vllm.core.predictor import HORIZON_S
from memos_vllm.core.told_values import UNIT
from memos_vllm.integration import plain_cache
from memos_vllm.integration.plain_cache import PlainCache


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def block(number: int, content: bytes | None = b"x") -> Any:
    return SimpleNamespace(block_id=number, block_hash=content)


def test_a_block_is_worth_less_the_longer_it_waits() -> None:
    clock = Clock()
    cache, one = PlainCache(clock), block(1)
    cache.freed(one)
    before = cache.worth(one)
    assert before == UNIT * cache.reuse
    clock.now += HORIZON_S
    assert cache.worth(one) == before / 2
    clock.now += 98 * HORIZON_S
    assert cache.worth(one) == before / 100
    clock.now = 0.0
    assert cache.worth(one) == before, "a clock that went back"


def test_what_holds_nothing_or_was_freed_by_nobody_is_worth_nothing() -> None:
    cache = PlainCache(Clock())
    cache.freed(block(1, None))
    assert cache.worth(block(1, None)) == cache.worth(block(2)) == 0.0


def test_how_often_such_blocks_are_used_again_is_learned() -> None:
    cache = PlainCache(Clock())
    for number in range(100):
        cache.freed(block(number))
        cache.hit(block(number))
    assert cache.reuse > 0.98
    for number in range(300):
        cache.freed(block(number))
    cache.evicted([block(number) for number in range(300)])
    assert cache.reuse == pytest.approx(0.25, abs=0.01)
    cache.hit(block(1))
    cache.evicted([block(2)])
    cache.freed(block(3, None))
    cache.evicted([block(3, None)])
    assert cache.reuse == pytest.approx(0.25, abs=0.01), "only ends of waits count"


def test_a_block_that_is_expected_now_is_no_plain_one() -> None:
    cache = PlainCache(Clock())
    before = cache.reuse
    cache.freed(block(1))
    cache.expected(block(1))
    cache.evicted([block(1)])
    assert cache.reuse == before and cache.worth(block(1)) == 0.0


def test_what_is_long_ago_counts_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_cache, "MEMORY_BLOCKS", 100)
    cache = PlainCache(Clock())
    for number in range(1000):
        cache.freed(block(number))
        cache.hit(block(number))
    for number in range(150):
        cache.freed(block(number))
    cache.evicted([block(number) for number in range(75)])
    cache.evicted([block(number) for number in range(75, 150)])
    assert cache.reuse < 0.4
