"""One command for all: what each benchmark is given it takes, and what goes wrong in one stays there."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import all as suite


@pytest.mark.parametrize("preset", ["smoke", "cpu"])
@pytest.mark.parametrize("step", suite.STEPS, ids=lambda step: step.name)
def test_every_benchmark_takes_what_it_is_given(
    step: suite.Step, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *flags = suite.command_of(step, preset, tmp_path, "here")[2:]
    with pytest.raises(SystemExit):
        importlib.import_module(module).main([*flags, "--nothing-takes-this"])
    assert capsys.readouterr().err.strip().endswith("unrecognized arguments: --nothing-takes-this")


def test_the_kernels_are_compared_before_anything_is_measured_on_a_gpu() -> None:
    steps = suite.steps_of("gpu", ())
    assert steps[0].name == "kernel_check" and suite.command_of(steps[0], "gpu", Path(), "h")[3:] == [
        "--device",
        "cuda",
    ]
    assert [step.name for step in steps[1:3]] == ["kv_copy", "multiuser-interference"]
    assert "memory" not in [step.name for step in steps]


def test_one_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(step: suite.Step, preset: str, results: Path, label: str) -> list[str]:
        return [sys.executable, "-c", f"print('this is {step.name}'); raise SystemExit({step.name == 'kv_copy'})"]

    monkeypatch.setattr(suite, "command_of", command)
    arguments = ["--preset", "smoke", "--results", str(tmp_path), "--label", "here"]
    assert suite.main([*arguments, "--only", "kernel_check", "kv_copy", "ttft"]) == 1
    printed = capsys.readouterr().out
    assert all(f"this is {name}" in printed for name in ("kernel_check", "kv_copy", "ttft"))
    assert (tmp_path / "ttft-here.txt").read_text() == "this is ttft\n"
    assert suite.main([*arguments, "--only", "ttft"]) == 0


def test_one_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert suite.run(["sh", "-c", "sleep 600 & echo $!; wait"], log, limit_s=3) < 0
    deadline = time.monotonic() + 30
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{int(log.read_text())}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "it goes on"


def test_a_small_one_runs_and_writes_its_results_under_the_hardwares_name(tmp_path: Path) -> None:
    assert suite.main(["--preset", "smoke", "--results", str(tmp_path), "--only", "kv_copy"]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    label = suite.default_label()
    assert names == [f"kv_copy-{label}.{ending}" for ending in ("json", "png", "txt")]
    assert json.loads((tmp_path / names[0]).read_text())["benchmark"] == "kv_copy"


@pytest.mark.parametrize("bad", [["--label", "a/b"], ["--only", "nothing"], ["--preset", "gpu", "--only", "memory"]])
def test_bad_options_are_refused_before_anything_runs(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        suite.main(bad)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err
