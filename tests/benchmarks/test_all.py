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
from benchmarks import multiuser_options, ttft


@pytest.mark.parametrize(
    ("step", "preset"),
    [pytest.param(step, preset, id=f"{step.name}-{preset}") for step in suite.STEPS for preset in step.presets],
)
def test_every_benchmark_takes_what_it_is_given(
    step: suite.Step, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *flags = suite.command_of(step, preset, tmp_path, "here")[2:]
    with pytest.raises(SystemExit):
        importlib.import_module(module).main([*flags, "--nothing-takes-this"])
    assert capsys.readouterr().err.strip().endswith("unrecognized arguments: --nothing-takes-this")


def test_the_kernels_are_compared_before_anything_is_measured_on_a_gpu() -> None:
    steps = [step for step in suite.steps_of("gpu", ()) if not step.beside]
    assert steps[0].name == "kernel_check" and suite.command_of(steps[0], "gpu", Path(), "h")[3:5] == [
        "--device",
        "cuda",
    ]
    assert [step.name for step in steps[1:4]] == ["kv_copy", "multiuser-interference", "multiuser"]
    assert "memory" not in [step.name for step in steps]


def test_what_the_servers_need_on_a_gpu_is_made_beside_the_first_step() -> None:
    assert [(step.name, step.beside) for step in suite.steps_of("gpu", ())[:2]] == [
        ("models", True),
        ("kernel_check", False),
    ]


def test_the_selection_for_a_gpu_is_one_that_can_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here no benchmark begins with the preset gpu, so its flags are parsed as if there were a GPU."""
    steps = {step.name: step for step in suite.STEPS}
    for module in (ttft, multiuser_options):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    flags = {name: suite.command_of(steps[name], "gpu", tmp_path, "h")[3:] for name in ("ttft", "multiuser")}
    options = ttft.parse(flags["ttft"]).options
    assert [model.name for model in options.models] == ["Qwen3-8B"] and not options.restart
    arms = multiuser_options.parse("", flags["multiuser"]).options.arms
    assert {"prefix_cache", "reactive", "warm", "predictive"} == set(arms)


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


def of_names(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Each step is a command that runs ``code``, in which NAME is its name."""

    def command(step: suite.Step, preset: str, results: Path, label: str) -> list[str]:
        return [sys.executable, "-c", f"NAME = {step.name!r}\n{code}"]

    monkeypatch.setattr(suite, "command_of", command)


def test_a_step_for_which_too_little_time_is_left_is_skipped_and_the_others_have_their_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_names(monkeypatch, "print(NAME, 'ran')")
    steps = [
        suite.Step("short", "short", least_s=1),
        suite.Step("long", "long", least_s=500),
        suite.Step("last", "last"),
    ]
    monkeypatch.setattr(suite, "STEPS", steps)
    assert suite.main(["--preset", "smoke", "--results", str(tmp_path), "--label", "h", "--within-s", "400"]) == 0
    printed = capsys.readouterr().out
    assert "long: skipped; " in printed and "s are left, and it needs 500" in printed
    assert "short ran" in printed and "last ran" in printed
    assert not (tmp_path / "long-h.txt").exists()


def test_what_runs_when_the_time_is_up_is_told_to_end_and_what_it_wrote_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_names(
        monkeypatch,
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    print('interrupted', flush=True)\n"
        "    raise SystemExit(3)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('first figures', flush=True)\n"
        "time.sleep(600)\n",
    )
    monkeypatch.setattr(suite, "STEPS", [suite.Step("one", "one"), suite.Step("two", "two", least_s=0)])
    assert suite.main(["--preset", "smoke", "--results", str(tmp_path), "--label", "h", "--within-s", "8"]) == 1
    assert (tmp_path / "one-h.txt").read_text() == "first figures\ninterrupted\n"
    assert not (tmp_path / "two-h.txt").exists()


def test_the_step_after_the_next_waits_for_one_that_runs_beside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wait_for = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)\n"
    seen = tmp_path / "second-has-begun"
    of_names(
        monkeypatch,
        f"import pathlib\nif NAME == 'second': pathlib.Path({str(seen)!r}).touch()\n"
        f"if NAME == 'first':\n    {wait_for.format(str(seen)).replace(chr(10), chr(10) + '    ')}\n"
        f"    pathlib.Path({str(tmp_path / 'first-ended')!r}).touch()\n"
        f"if NAME == 'third': assert pathlib.Path({str(tmp_path / 'first-ended')!r}).exists()\n",
    )
    steps = [suite.Step("first", "first", beside=True), suite.Step("second", "second"), suite.Step("third", "third")]
    monkeypatch.setattr(suite, "STEPS", steps)
    assert suite.main(["--preset", "smoke", "--results", str(tmp_path), "--label", "h", "--within-s", "300"]) == 0


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


def test_results_of_a_gpu_without_a_name_are_not_a_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "has_gpu", lambda: True)
    monkeypatch.setattr(suite.report, "machine", lambda: {"gpu": None, "cores": 16})
    assert suite.default_label() == "gpu"


@pytest.mark.parametrize(
    "bad",
    [
        ["--label", "a/b"],
        ["--only", "nothing"],
        ["--preset", "gpu", "--only", "memory"],
        ["--within-s", "soon"],
        ["--within-s", "0"],
    ],
)
def test_bad_options_are_refused_before_anything_runs(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        suite.main(bad)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err
