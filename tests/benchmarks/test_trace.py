"""``python -m benchmarks.trace``: what it writes, what it refuses, and the published figures of its baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import trace, trace_table
from benchmarks.trace_baselines import LRU, Belady, Future
from benchmarks.trace_data import read, turns
from benchmarks.trace_replay import replay_baseline
from tests.benchmarks.trace_factories import slow_chats

KEYS = {"trace", "policy", "capacity_blocks", "ready_share", "bytes_moved", "bytes_wasted", "gap_closed"}


@pytest.fixture
def small_trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl"
    lines = [
        {
            "timestamp": int(1000 * turn.request.arrival_s),
            "input_length": turn.request.prompt_tokens,
            "output_length": turn.request.output_tokens,
            "hash_ids": turn.request.blocks,
        }
        for turn in slow_chats()[:400]
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_run_writes_rows_and_a_plot(small_trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    flags = ["--trace", str(small_trace), "--capacity", "300", "100", "--bounds"]
    flags += ["--json", str(out), "--plot", str(picture)]
    assert trace.main(flags) == 0
    run = json.loads(out.read_text())
    assert run["benchmark"] == "trace" and run["flags"]["capacity"] == [100, 300]
    assert {(row["policy"], row["capacity_blocks"]) for row in run["rows"]} == {
        (policy, capacity) for policy in trace_table.POLICIES for capacity in (100, 300)
    }
    for row in run["rows"]:
        assert row.keys() >= KEYS and row["trace"] == "small"
        assert 0 <= row["ready_share"] <= 1 and 0 <= row["bytes_wasted"] <= row["bytes_moved"]
    gaps = {row["policy"]: row["gap_closed"] for row in run["rows"] if row["capacity_blocks"] == 300}
    assert gaps["lru"] == 0 and gaps["belady"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "Memos, typing hint" in shown and "Belady" in shown


def test_without_the_default_trace_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace, "TRACE", tmp_path / "none.jsonl.xz")
    assert trace.main([]) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_trace_that_cannot_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main(["--trace", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--capacity", "0"], ["--hint-lead-ms", "-1"], ["--json", "/no/such/dir/x.json"]])
def test_bad_flags_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        trace.main(flags)


@pytest.mark.skipif(not trace.TRACE.exists(), reason="the Mooncake trace is not in shared/data")
def test_lru_and_belady_have_the_published_figures() -> None:
    """As in the data's README; to 0.02, for a request's blocks may be counted as used in one order or the other."""
    replayed = turns(read(trace.TRACE))
    assert (len(replayed), sum(turn.num_reusable for turn in replayed)) == (12_031, 105_710)
    for capacity, lru, belady in ((1500, 0.130, 0.605), (6000, 0.380, 0.961)):
        assert replay_baseline(replayed, LRU(capacity)).ready_share == pytest.approx(lru, abs=0.02)
        future = Future(turn.request.blocks for turn in replayed)
        assert replay_baseline(replayed, Belady(capacity, future)).ready_share == pytest.approx(belady, abs=0.02)
