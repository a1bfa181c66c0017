"""Building absent scenes on a real engine: what a piece computes, and that it stands behind everything else."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from memos_vllm.integration import salts
from memos_vllm.integration.scene_builds import BUILD_PARAM
from memos_vllm.integration.scene_table import SCENE_PARAM, START_PARAM
from tests.engine.conftest import BLOCK_SIZE, Engine
from tests.engine.test_kv_tiers import add_request, prompt, run_until_finished, signature, tokens
from tests.engine.test_scenes import NUM_BLOCKS, ask, counted_forward_tokens, expect, tell, totals

SALT = "memos:" + "b" * 64
PIECE_BLOCKS = 4


@pytest.fixture(autouse=True)
def nothing_claimed_or_expected(engine: Engine) -> Iterator[None]:
    """No claim is open from the test before, and no scene is loaded in the test after."""
    engine.side.memory.builds._claim = None
    yield
    tell(engine)
    engine.settle()


def declare(engine: Engine, scene: str, token_ids: list[int], salt: str = SALT) -> int:
    """As an API process does it for a prefix that no request has had; its size in blocks."""
    payload = {"scene": scene, "token_ids": token_ids, "salt": salt, "lora": None}
    return engine.side.handle("declare", payload, engine.core)["blocks"]


def claim(engine: Engine, planner: str = "p", piece_blocks: int = PIECE_BLOCKS) -> Any:
    payload = {"planner": planner, "piece_tokens": piece_blocks * BLOCK_SIZE, "declared": []}
    return engine.side.handle("build", payload)["piece"]


def add_piece(engine: Engine, piece: dict[str, Any]) -> str:
    from vllm import SamplingParams

    engine.llm.llm_engine.add_request(
        piece["build"],
        {"prompt_token_ids": piece["token_ids"], "cache_salt": piece["salt"]},
        SamplingParams(
            max_tokens=1, detokenize=False, extra_args={"kv_transfer_params": {BUILD_PARAM: piece["build"]}}
        ),
    )
    return piece["build"]


def build_all(engine: Engine) -> list[int]:
    """Runs pieces until none is left; the length of each prompt in blocks."""
    lengths = []
    while piece := claim(engine):
        run_until_finished(engine, add_piece(engine, piece))
        lengths.append(len(piece["token_ids"]) // BLOCK_SIZE)
        engine.settle()
    return lengths


def state(engine: Engine, scene: str) -> str:
    return engine.side.handle("scene", {"scene": scene})["state"]


def test_a_prefix_that_no_request_had_is_ready_before_the_first(engine: Engine) -> None:
    token_ids = prompt(300)
    assert declare(engine, "s", token_ids) == NUM_BLOCKS and state(engine, "s") == "absent"
    expect(engine, "s")
    before = totals(engine)
    with counted_forward_tokens(engine) as scheduled:
        assert build_all(engine) == [4, 8, 9]
    assert sum(scheduled) == NUM_BLOCKS * BLOCK_SIZE and max(scheduled) == PIECE_BLOCKS * BLOCK_SIZE
    after = totals(engine)
    assert after["built_blocks"] == before["built_blocks"] + NUM_BLOCKS
    assert after["build_requests"] == before["build_requests"] + 3
    assert state(engine, "s") == "ready"

    output = ask(engine, "s", token_ids, SALT)
    assert output.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
    assert totals(engine)["ready"] == before["ready"] + 1
    assert signature(ask(engine, "s", token_ids, SALT)) == signature(output)
    cold = engine.generate(token_ids, SALT + ":cold")
    assert cold.num_cached_tokens == 0 and tokens(cold) == tokens(output)


def test_what_was_built_is_saved_and_not_built_again(engine: Engine) -> None:
    declare(engine, "s", prompt(301))
    expect(engine, "s")
    build_all(engine)
    engine.drop_gpu()
    assert state(engine, "s") == "stored" and claim(engine) is None
    expect(engine, "s")
    assert state(engine, "s") == "ready" and claim(engine) is None


def test_a_finished_requests_scene_that_left_every_tier_is_built_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids = prompt(302)
    monkeypatch.setattr(engine.tiers, "plan_save", lambda *_: [])
    right = tokens(ask(engine, "s", token_ids, SALT))
    engine.drop_gpu()
    assert state(engine, "s") == "absent"
    expect(engine, "s")
    build_all(engine)
    again = ask(engine, "s", token_ids, SALT)
    assert again.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE and tokens(again) == right


def test_a_scene_that_nothing_keeps_is_built_once_for_one_use(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every tier is full, what was built and evicted is not built for ever."""
    token_ids = prompt(317)
    monkeypatch.setattr(engine.tiers, "plan_save", lambda *_: [])
    declare(engine, "s", token_ids)
    expect(engine, "s")
    assert build_all(engine) == [4, 8, 9]
    engine.drop_gpu()
    expect(engine, "s")
    assert state(engine, "s") == "absent" and build_all(engine) == []
    names = {SCENE_PARAM: "a new session", START_PARAM: "s"}
    engine.generate(token_ids, SALT, extra_args={"kv_transfer_params": names})
    engine.drop_gpu()
    expect(engine, "s")
    assert build_all(engine) == [4, 8, 9]


def test_only_what_no_tier_holds_is_computed(engine: Engine) -> None:
    """The stored head of a start is loaded, and its new end built."""
    head = prompt(303, 5 * BLOCK_SIZE)
    ask(engine, "old", head + prompt(304, 50), SALT)
    engine.drop_gpu()
    declare(engine, "s", head + prompt(305, 4 * BLOCK_SIZE))
    tell(engine, "s")
    assert claim(engine) is None, "a load is under way"
    engine.settle()
    with counted_forward_tokens(engine) as scheduled:
        assert build_all(engine) == [9]
    assert sum(scheduled) == 4 * BLOCK_SIZE and state(engine, "s") == "ready"


def test_a_live_request_is_computed_before_a_piece_that_came_first(engine: Engine) -> None:
    declare(engine, "s", prompt(306))
    expect(engine, "s")
    build_id = add_piece(engine, claim(engine))
    add_request(engine, "live", prompt(307), SALT)
    scheduled: list[set[str]] = []
    original = engine.scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        scheduled.append({request_id.split("-")[0] for request_id in output.num_scheduled_tokens})
        return output

    engine.scheduler.schedule = schedule
    try:
        run_until_finished(engine, build_id, "live")
    finally:
        engine.scheduler.schedule = original
    steps = [step for step in scheduled if step]
    assert steps == [{"live"}] * 4 + [{build_id}], "the piece shares no step with the request"


def test_an_aborted_piece_costs_nothing_and_is_claimed_again(engine: Engine) -> None:
    declare(engine, "s", prompt(308))
    expect(engine, "s")
    before = totals(engine)
    piece = claim(engine)
    add_piece(engine, piece)
    with counted_forward_tokens(engine) as scheduled:
        engine.llm.llm_engine.abort_request([piece["build"]])
        add_request(engine, "live", prompt(309, 40), SALT)
        run_until_finished(engine, "live")
    assert sum(scheduled) == 40 + 3, "the prompt and its output, and nothing of the piece"
    assert all(totals(engine)[name] == before[name] for name in ("build_requests", "built_blocks"))
    again = claim(engine)
    assert again["token_ids"] == piece["token_ids"] and again["build"] != piece["build"]


def test_one_process_builds_at_a_time_and_none_while_a_request_is_in_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(engine, "s", prompt(310))
    expect(engine, "s")
    assert claim(engine, "p") is not None
    assert claim(engine, "q") is None
    builds = engine.side.memory.builds
    monkeypatch.setattr(builds, "now", lambda: builds._claim.expires_at)
    assert claim(engine, "q") is not None, "the other one is gone"
    add_request(engine, "live", prompt(311), SALT)
    assert claim(engine, "q") is None
    run_until_finished(engine, "live")
    assert claim(engine, "q") is not None


def test_a_deletion_during_a_build_leaves_nothing(engine: Engine) -> None:
    salt = "memos:" + uuid.uuid4().hex * 2
    declare(engine, "s", prompt(312), salt)
    expect(engine, "s")
    run_until_finished(engine, add_piece(engine, claim(engine)))
    build_id = add_piece(engine, claim(engine))
    engine.side.handle("forget", {"salt": salt}).result()
    run_until_finished(engine, build_id)
    engine.settle()
    assert claim(engine) is None and state(engine, "s") == "unknown"
    assert not engine.side.memory.builds._contents.get("s"), "its tokens are gone too"
    assert not any(block.block_hash for block in engine.pool.blocks)
    assert salts.tag(salt) not in engine.tiers._host_tags.values()
    assert declare(engine, "s", prompt(312), salt) == 0, "nor does it come back"
    assert engine.generate(prompt(312), salt).num_cached_tokens == 0


def test_a_build_takes_no_block_of_a_more_valuable_scene(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(engine, "kept", prompt(313), SALT)
    declare(engine, "s", prompt(314))
    expect(engine, "kept", "s")
    assert claim(engine) is not None
    monkeypatch.setattr(type(engine.side.memory.scenes.queue), "num_plain_blocks", PIECE_BLOCKS - 1)
    assert claim(engine) is None


def test_a_client_cannot_pose_as_a_build(engine: Engine) -> None:
    """Without the id of a claim it is a live request like any other, and building waits for it."""
    declare(engine, "s", prompt(315))
    expect(engine, "s")
    piece = claim(engine)
    add_piece(engine, {**piece, "build": "guessed"})
    assert claim(engine) is None
    run_until_finished(engine, "guessed")


def test_scenes_of_one_user_share_the_blocks_that_are_kept(engine: Engine) -> None:
    """The next session's start has the blocks of the last session: they count once."""
    token_ids = prompt(316)
    ask(engine, "session", token_ids, SALT)
    declare(engine, "start", token_ids[: 5 * BLOCK_SIZE])
    expect(engine, "session", "start")
    assert totals(engine)["kept_blocks"] == NUM_BLOCKS
