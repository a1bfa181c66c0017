"""Which passes wait for a load that is still arriving, and that its blocks are held."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from memos_vllm.integration.arriving_loads import ArrivingLoads


class Held(list):
    def hold(self, blocks):
        self.extend(blocks)

    def release(self, blocks):
        for block in blocks:
            self.remove(block)


def step(*scheduled, entering=(), resumed=()):
    """A step with these requests, and with requests that enter it with these blocks."""
    return SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(scheduled, 1),
        scheduled_new_reqs=[SimpleNamespace(block_ids=(list(blocks),)) for blocks in entering],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed)),
    )


@pytest.fixture
def loads():
    loads = ArrivingLoads(Held())
    loads.add(1, "alice", (10, 11))
    loads.add(2, "alice", (12,))
    loads.add(3, "bob", (20,))
    return loads


def test_a_pass_waits_for_the_loads_of_its_requests(loads):
    assert loads.read_by(step("alice", "carol")) == (1, 2)
    assert loads.read_by(step("carol")) == (), "others are not held up"


def test_a_pass_waits_for_loads_whose_blocks_a_request_brings_in(loads):
    """Alice may run and does not, for want of room; what was loaded for her is in the prefix cache."""
    assert loads.read_by(step("carol", entering=[(10, 30), (31,)])) == (1,)
    assert loads.read_by(step("carol", entering=[(30, 31)])) == ()


def test_a_pass_with_a_request_that_goes_on_after_a_preemption_waits_for_all(loads):
    """Its blocks are new to the worker, and may be any."""
    assert loads.read_by(step("carol", resumed=["carol"])) == (1, 2, 3)


def test_blocks_are_held_until_the_load_has_ended(loads):
    assert loads._held == [10, 11, 12, 20] and len(loads) == 3
    assert loads.request_of(3) == "bob" and loads.request_of(4) is None
    loads.end({1, 3, 99})
    assert loads._held == [12] and len(loads) == 1
    assert loads.read_by(step("alice", "bob")) == (2,)
