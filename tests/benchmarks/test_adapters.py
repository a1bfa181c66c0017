"""benchmarks.adapters without servers: its options, its rows, and that it sees a mix-up."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import adapters_table, models, report
from benchmarks.adapters import PRESETS, Arm, Options, Run, main, parse
from benchmarks.client import Answer

NAMES = ["a", "b", "c"]
LOGPROBS = {"a": -1.0, "b": -3.0, "c": -5.0}
KEYS = {"arm", "adapters", "slots", "use", "order", "n", "mixups"}
KEYS |= {"ttft_p50_s", "ttft_p95_s", "itl_p99_s", "requests_per_s"}


def answer(name: str, noise: float = 0.0) -> Answer:
    """Like every answer it begins with one of two tokens; noise moves both."""
    likeliest = {"token_id:5": LOGPROBS[name] + noise, "token_id:6": LOGPROBS[name] + noise}
    return Answer(0.1, 0.2, "text", (0.0,) * 4, 10, 0, (0.01, 0.02), likeliest)


class FakeArm(Arm):
    """Answers with the adapter that was asked for, or with another one."""

    def __init__(self, wrong: dict[str, str] | None = None, noise: float = 0.1) -> None:
        server: Any = SimpleNamespace(http=lambda key: contextlib.nullcontext())
        super().__init__("memos", server, {name: answer(name) for name in NAMES})
        self.wrong, self.noise = wrong or {}, noise

    def ask(self, http: Any, adapter: str, text: str, max_tokens: int) -> Answer:
        return answer(self.wrong.get(adapter, adapter), self.noise)


def churn(arm: Arm, order: str = "round_robin") -> Run:
    run = Run(Options(models.RECALL, churn=12, clients=2), Path("unused"))
    run._churn(arm, len(NAMES), NAMES, order)
    return run


@pytest.mark.parametrize("order", ["round_robin", "zipf"])
def test_right_answers_are_no_mixups_whatever_the_batch_does_to_them(order: str) -> None:
    run = churn(FakeArm(), order)
    (row,) = run.rows
    assert row.keys() == KEYS and row["mixups"] == 0 and row["n"] == 12 and run.problems == []
    assert row["ttft_p50_s"] == pytest.approx(0.1) and 0.01 < row["itl_p99_s"] <= 0.02
    assert row["requests_per_s"] > 0


def test_an_answer_of_another_adapter_is_a_mixup() -> None:
    run = churn(FakeArm(wrong={"b": "c"}))
    assert run.rows[0]["mixups"] == 2
    assert run.problems[0] == "memos, round_robin: an answer for b is 1.90 from its own and 0.10 from that of c"


def test_an_answer_that_shows_other_tokens_is_a_mixup_and_one_that_begins_otherwise_is_none() -> None:
    run, arm = churn(FakeArm()), FakeArm()
    own = answer("a")
    assert run._mixup(arm, "a", replace(own, text="other", logprobs=(-9.0,))) is None
    arm.first["c"] = replace(answer("c"), first_token={"token_id:8": -1.0, "token_id:9": -1.0})
    assert "inf from its own and 0.00" in (run._mixup(arm, "a", arm.first["c"]) or "")


def test_servers_that_disagree_are_reported() -> None:
    run = churn(FakeArm())
    run._compare([FakeArm(), FakeArm()], NAMES)
    assert run.problems == []
    other = FakeArm()
    other.first["a"] = answer("b")
    run._compare([FakeArm(), other], NAMES)
    assert run.problems == ["the servers disagree about a: log-probabilities differ by 2.00"]


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    _, options, target = parse(["--preset", "cpu", "--adapters", "1,256", "--slots", "2", "--model", "recall-model"])
    assert options.adapters == (1, 256) and options.slots == 2 and options.model is models.RECALL and target is None
    for bad in (["--adapters", "0"], ["--slots", "9", "--host", "8"], ["--json", "/nowhere/x.json"]):
        with pytest.raises(SystemExit):
            parse(["--preset", "cpu", *bad])
    assert "--host must be at least --slots" in capsys.readouterr().err


def test_the_table_says_what_a_prefetch_is_worth(capsys: pytest.CaptureFixture[str]) -> None:
    run = churn(FakeArm())
    for use in ("resident", "prefetched"):
        run._row(FakeArm(), 3, use, [answer("a")])
    adapters_table.show(run.rows, ["a problem"])
    shown = capsys.readouterr().out
    assert "prefetched first use takes 1.00 times a resident use's TTFT" in shown and "a problem" in shown


def test_runs_are_shown_and_plotted_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for number, file in enumerate(files, 1):
        run = churn(FakeArm())
        run._row(FakeArm(), number, "first", [answer("a")])
        report.write_json(file, "adapters", {"problems": []}, run.rows)
    target = tmp_path / "plot.png"
    assert adapters_table.main([*map(str, files), "--plot", str(target)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("first") == 2 and shown.count("churn") == 2 and target.read_bytes()[:4] == b"\x89PNG"
    files[0].write_text(files[0].read_text().replace('"cores"', '"other"'))
    with pytest.raises(SystemExit):
        adapters_table.main([*map(str, files)])


def test_there_is_room_for_a_copy_of_every_adapter_with_the_modules_of_the_preset(tmp_path: Path) -> None:
    options = replace(PRESETS["gpu"], model=models.RECALL, adapters=(2,), samples=1)
    run = Run(options, tmp_path)
    run._start = lambda *_: []  # type: ignore[method-assign]
    with pytest.raises(IndexError):  # no server to register at
        run.measure()
    config = json.loads(next(tmp_path.glob("import/*/adapter_config.json")).read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    weights = sum(file.stat().st_size for file in tmp_path.glob("import/*/adapter_model.safetensors"))
    assert run._settings()["adapters"]["disk_bytes"] >= weights > 0


def test_what_was_measured_before_the_time_was_up_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, kept = tmp_path / "r.json", []

    def measure(run: Run) -> None:
        run._row(FakeArm(), 3, "resident", [answer("a")])
        run._save(run)
        kept.append(json.loads(file.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "measure", measure)
    assert main(["--preset", "smoke", "--json", str(file)]) == 1
    assert len(kept[0]["rows"]) == 1 and kept[0]["flags"]["problems"] == []
    run = json.loads(file.read_text())
    assert run["rows"] == kept[0]["rows"] and run["flags"]["problems"] == ["interrupted"]


def test_a_model_without_weights_tells_no_adapters_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--preset", "cpu", "--model", models.QWEN3_32B.name])
    assert "has no weights here" in capsys.readouterr().err
