"""Run by ``test_layer_groups.py`` in a process of its own: requests that run while layers of their KV arrive.

The copies of the later groups are held until a pass waits for them, so each request here runs before its KV is whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from memos_vllm.compat import layer_waits
from tests.engine.conftest import BLOCK_SIZE, LAYER_GROUPS, Engine
from tests.engine.test_kv_tiers import NUM_BLOCKS, SALT, add_request, prompt, run_until_finished, signature, tokens

PATIENCE_S = 60.0


class Held:
    """The link of an engine; copies of all groups but the first wait for ``open``."""

    def __init__(self, engine: Engine, *, until_asked: bool) -> None:
        self.engine, self.until_asked = engine, until_asked
        self.transfer = engine.worker._transfer
        self.open = threading.Event()
        self.loads = 0
        self.waits: list[int] = []

    @contextmanager
    def held(self) -> Iterator[Held]:
        link, transfer = self.transfer._link, self.transfer
        load, wait = link.load, transfer.wait_for_layers

        def hold(groups: Any, block_ids: Any, after: Any, landed: Any, layers: int | None = None) -> Any:
            self.loads += layers is not None
            assert not layers or self.open.wait(PATIENCE_S)
            return load(groups, block_ids, after, landed, layers)

        def asked(op_id: int, group: int) -> Any:
            self.waits.append(group)
            if group and self.until_asked:
                self.open.set()
            return wait(op_id, group)

        link.load, transfer.wait_for_layers = hold, asked
        try:
            yield self
        finally:
            self.open.set()
            link.load, transfer.wait_for_layers = load, wait


def saved(engine: Engine, seed: int) -> tuple[list[int], Any]:
    """A prompt whose KV is in host memory and not on the GPU, and what it is answered with a warm cache."""
    token_ids = prompt(seed)
    engine.generate(token_ids, SALT)
    engine.settle()
    warm = engine.generate(token_ids, SALT)
    engine.drop_gpu()
    return token_ids, warm


def test_the_link_has_the_groups(engine: Engine) -> None:
    assert LAYER_GROUPS > 1
    assert len(engine.worker._transfer._link.layers) == LAYER_GROUPS
    assert engine.side.memory.status()["layer_groups"] == LAYER_GROUPS


def test_a_request_runs_before_its_kv_is_whole_and_its_answer_is_the_same(engine: Engine) -> None:
    token_ids, warm = saved(engine, 101)
    with Held(engine, until_asked=True).held() as copies:
        loaded = engine.generate(token_ids, SALT)
    assert copies.loads >= LAYER_GROUPS and set(copies.waits) == set(range(LAYER_GROUPS))
    assert loaded.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
    assert signature(loaded) == signature(warm)


def test_a_pass_that_does_not_wait_answers_otherwise(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above rests on."""
    token_ids, warm = saved(engine, 102)
    with Held(engine, until_asked=False).held() as copies:
        monkeypatch.setattr(engine.worker, "_wait_for", lambda op_id, group: None)
        loaded = engine.generate(token_ids, SALT)
        assert not copies.open.is_set()
    engine.settle()
    assert loaded.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
    assert signature(loaded) != signature(warm)


def test_a_pass_that_does_not_ask_waits_for_all_before_it_begins(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids, warm = saved(engine, 103)
    monkeypatch.setattr(layer_waits, "layers_ask", lambda: False)
    asked: list[str] = []
    monkeypatch.setattr(engine.worker, "wait_for_layer", asked.append)
    with Held(engine, until_asked=True).held() as copies:
        loaded = engine.generate(token_ids, SALT)
    assert set(copies.waits) == set(range(LAYER_GROUPS))
    assert signature(loaded) == signature(warm)


def test_another_request_of_the_same_pass_waits_for_the_blocks_that_it_shares(engine: Engine) -> None:
    token_ids, _ = saved(engine, 104)
    longer = token_ids[: NUM_BLOCKS * BLOCK_SIZE] + prompt(105, 40)
    alone = tokens(engine.generate(longer, SALT, max_tokens=4))
    engine.drop_gpu()
    with Held(engine, until_asked=True).held():
        add_request(engine, "first", token_ids)
        add_request(engine, "second", longer)
        finished = run_until_finished(engine, "first", "second")
    assert finished["second"].num_cached_tokens >= NUM_BLOCKS * BLOCK_SIZE
    assert tokens(finished["second"]) == alone


def test_blocks_of_an_aborted_request_are_nobodys_until_the_copies_have_ended(engine: Engine) -> None:
    token_ids, warm = saved(engine, 106)
    free = engine.free_blocks()
    with Held(engine, until_asked=False).held():
        add_request(engine, "gone", token_ids)
        while not engine.side.memory.arriving:
            engine.llm.llm_engine.step()
        engine.llm.llm_engine.abort_request(["gone"])
        engine.llm.llm_engine.step()
        assert engine.side.memory.arriving
        assert engine.free_blocks() == free - NUM_BLOCKS
        assert engine.side.holds_blocks
    engine.settle()
    assert engine.free_blocks() == free
    assert not engine.side.memory.arriving
    assert signature(engine.generate(token_ids, SALT)) == signature(warm)


def test_the_end_of_a_load_is_the_end_of_its_wait(engine: Engine) -> None:
    token_ids, _ = saved(engine, 107)
    with Held(engine, until_asked=True).held():
        engine.generate(token_ids, SALT)
    engine.settle()
    with Held(engine, until_asked=True).held() as copies:
        engine.generate(prompt(108), SALT)
    assert copies.waits == [] and engine.worker._arriving.is_whole


def test_passes_without_such_blocks_do_not_wait(engine: Engine) -> None:
    """The request whose load arrives is gone; others are served before its copies have ended."""
    token_ids, _ = saved(engine, 112)
    with Held(engine, until_asked=False).held() as copies:
        add_request(engine, "gone", token_ids)
        while not engine.side.memory.arriving:
            engine.llm.llm_engine.step()
        engine.llm.llm_engine.abort_request(["gone"])
        engine.generate(prompt(113), SALT)
        assert engine.side.memory.arriving and copies.waits == []


def test_what_such_a_request_computes_is_saved(engine: Engine) -> None:
    """Also where it ends before the results of its loads have come."""
    head, _ = saved(engine, 109)
    token_ids = head[: NUM_BLOCKS * BLOCK_SIZE] + prompt(110, 2 * BLOCK_SIZE + 5)
    with Held(engine, until_asked=True).held():
        engine.generate(token_ids, SALT, max_tokens=1)
    engine.drop_gpu()
    assert engine.generate(token_ids, SALT).num_cached_tokens == (NUM_BLOCKS + 2) * BLOCK_SIZE


def test_reads_from_disk_come_whole(engine: Engine) -> None:
    token_ids, warm = saved(engine, 111)
    engine.tiers.drop_host()
    with Held(engine, until_asked=True).held() as copies:
        loaded = engine.generate(token_ids, SALT)
    assert copies.loads == 0 and copies.waits == []
    assert signature(loaded) == signature(warm)


def test_a_copy_that_fails_after_that_ends_the_engine_and_gives_no_answer(
    shared_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this process: nothing is answered from KV that did not arrive."""
    shared_engine.drop_gpu()
    token_ids, _ = saved(shared_engine, 114)
    transfer = shared_engine.worker._transfer
    load, wait, asked = transfer._link.load, transfer.wait_for_layers, threading.Event()

    def fails(groups: Any, block_ids: Any, after: Any, landed: Any, layers: int | None = None) -> Any:
        if not layers:
            return load(groups, block_ids, after, landed, layers)
        assert asked.wait(PATIENCE_S)  # until the pass is under way
        raise RuntimeError("device lost")

    monkeypatch.setattr(transfer._link, "load", fails)
    monkeypatch.setattr(transfer, "wait_for_layers", lambda *load: (asked.set(), wait(*load))[1])
    add_request(shared_engine, "served", token_ids)
    outputs: list[Any] = []
    with pytest.raises(RuntimeError, match="did not arrive"):
        while True:
            outputs += shared_engine.llm.llm_engine.step()
    assert not [output for output in outputs if output.outputs[0].token_ids]
