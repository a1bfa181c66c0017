"""A user's requests go to the data-parallel engine that has his KV."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from memos_vllm.integration.home_engine import MAX_AHEAD, RANK_HEADER, HomeEngines, home_of
from memos_vllm.types import Principal

USERS = [Principal(f"tenant-{number % 7}", f"user-{number}") for number in range(3000)]


def request(**headers: str) -> Request:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": pairs})


def homes(num_engines: int, waiting: list[int] | None = None) -> HomeEngines:
    core = SimpleNamespace(core_engines=list(range(num_engines)))
    if waiting is not None:
        core.lb_engines = [[each, 1, 0.0] for each in waiting]
    client: Any = SimpleNamespace(engine_core=core)
    return HomeEngines(client)


def routed(of: HomeEngines, who: Principal, **headers: str) -> str | None:
    one = request(**headers)
    assert RANK_HEADER not in one.headers or headers  # read before, as the handlers on the way do
    of.route(one, who)
    return one.headers.get(RANK_HEADER)


def test_users_spread_evenly_and_few_move_with_another_number_of_engines() -> None:
    before, after = ([home_of(who, count) for who in USERS] for count in (4, 5))
    assert all(600 < count < 900 for count in Counter(before).values())
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {4}, "those who move go to the new one"
    assert 450 < len(moved) < 750


def test_a_name_is_not_another_tenants() -> None:
    pairs = [(Principal("a", f"b{number}"), Principal("ab", f"{number}")) for number in range(64)]
    assert any(home_of(one, 16) != home_of(other, 16) for one, other in pairs)


def test_a_request_goes_home() -> None:
    of = homes(3, waiting=[0, 0, 0])
    assert {routed(of, who) for who in USERS[:50]} == {"0", "1", "2"}
    assert all(routed(of, who) == str(of.of(who)) for who in USERS[:50])


def test_one_engine_and_a_request_that_names_an_engine_are_left_alone() -> None:
    assert routed(homes(1), USERS[0]) is None
    other = str(1 - home_of(USERS[0], 2))
    assert routed(homes(2), USERS[0], x_data_parallel_rank=other) == other


@pytest.mark.parametrize("ahead", [0, MAX_AHEAD, MAX_AHEAD + 1])
def test_vllm_chooses_while_the_queue_at_home_is_long(ahead: int) -> None:
    who = USERS[0]
    waiting = [2, 2]
    waiting[home_of(who, 2)] += ahead
    expected = None if ahead > MAX_AHEAD else str(home_of(who, 2))
    assert routed(homes(2, waiting), who) == expected
