"""``kill -9`` at random moments of a write load: what was acknowledged is there, nothing is half there.

MEMOS_KILLS sets how often; 200 take about two minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

from memos_vllm import doctor
from tests.memory import kill_load
from tests.memory.memory_factories import make_service

KILLS = int(os.environ.get("MEMOS_KILLS", "25"))
SEED = int(os.environ.get("MEMOS_KILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
KILLS_PER_STORE = 25
MAX_WRITES = 60


class Expected:
    """What the store must hold: the acknowledged texts, give or take the writes that were under way."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.under_way: dict[int, dict[str, Any]] = {}
        self.acknowledged = 0

    def hear(self, kind: str, thread: int, what: dict[str, Any]) -> None:
        if kind == "tries":
            self.under_way[thread] = what
            return
        self.acknowledged += 1
        del self.under_way[thread]
        for memory, text in what.items():
            if text is None:
                del self.texts[memory]
            else:
                self.texts[memory] = text

    def meet(self, found: dict[str, str]) -> None:
        """Compares, and goes on from what is there."""
        changes = {what["changes"]: what["to"] for what in self.under_way.values() if "changes" in what}
        for memory, text in self.texts.items():
            allowed = {text, changes[memory]} if memory in changes else {text}
            assert found.get(memory) in allowed, f"{memory} is {found.get(memory)!r}, not {allowed}"
        extra = [text for memory, text in found.items() if memory not in self.texts]
        for what in self.under_way.values():
            if "makes" in what:
                made = [text for text in extra if text.startswith(what["makes"])]
                assert len(made) in (0, what["count"]), f"half of a write: {made}"
                extra = [text for text in extra if text not in made]
        assert extra == [], "nobody wrote this"
        self.texts, self.under_way = dict(found), {}


def test_kill_9(tmp_path: Path) -> None:
    print(f"MEMOS_KILL_SEED={SEED} MEMOS_KILLS={KILLS}")
    rng = random.Random(SEED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.memory.kill_load"])
    acknowledged = under_way = 0
    for number in range(KILLS):
        if number % KILLS_PER_STORE == 0:
            root, expected = tmp_path / str(number), Expected()
        ours, theirs = context.Pipe(duplex=False)
        seed = rng.randrange(10**9)
        child = context.Process(target=kill_load.run, args=(root / "memory", seed, theirs))
        child.start()
        theirs.close()
        kind, found, problems = json.loads(ours.recv_bytes())
        assert (kind, problems) == ("found", [])
        expected.meet(found)
        wanted = expected.acknowledged + rng.randrange(MAX_WRITES)
        while expected.acknowledged < wanted:
            expected.hear(*json.loads(ours.recv_bytes()))
        for _ in range(rng.randrange(5000)):  # somewhere within a write
            pass
        child.kill()
        try:
            while True:  # what it had acknowledged before it died
                expected.hear(*json.loads(ours.recv_bytes()))
        except (EOFError, OSError):
            pass
        child.join()
        under_way += len(expected.under_way)
        if number == KILLS - 1 or (number + 1) % KILLS_PER_STORE == 0:
            acknowledged += expected.acknowledged
            service = make_service(root / "memory")
            found, problems = kill_load.found(service)
            service._store.close()
            assert problems == []
            expected.meet(found)
            assert doctor.main([str(root)]) == doctor.CLEAN
    assert under_way > 0, "no kill came within a write"
    print(f"{KILLS} kills, {acknowledged} writes acknowledged, {under_way} under way")
