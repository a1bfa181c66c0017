"""The backlog: users take turns, and a failure is one user's."""

from __future__ import annotations

import threading

from memos_vllm.memory.backlog import Backlog
from memos_vllm.types import Principal
from tests.memory.memory_factories import ALICE, BOB


def test_users_take_turns() -> None:
    begin, done = threading.Event(), []

    def work(who: Principal) -> bool:
        begin.wait()
        done.append(who)
        return done.count(who) < 3

    backlog = Backlog("test", work)
    for who in (ALICE, BOB, ALICE):
        backlog.add(who)
    assert ALICE in backlog and BOB in backlog
    begin.set()
    backlog.join()
    assert done == [ALICE, BOB] * 3 and ALICE not in backlog


def test_what_fails_goes_out_and_the_others_go_on() -> None:
    done = []

    def work(who: Principal) -> bool:
        if who == ALICE:
            raise ValueError("broken")
        done.append(who)
        return False

    backlog = Backlog("test", work)
    for who in (ALICE, BOB):
        backlog.add(who)
    backlog.join()
    backlog.add(BOB)
    backlog.join()
    assert done == [BOB, BOB] and ALICE not in backlog
