"""The multi-user benchmark without a server: sizes, order, counting, comparing, judging."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import models, multiuser, multiuser_options, multiuser_servers, multiuser_table, ttft
from benchmarks.multiuser_client import Answer, Counters, parse_counters
from benchmarks.multiuser_options import PRESETS, Options, parse, problem_of
from benchmarks.multiuser_play import Result, Sample
from benchmarks.multiuser_script import Conversation, Script, Shape
from memos_vllm.config import load

DESIGNED_KEYS = [
    "arm", "ttft_p50_s", "ttft_p95_s", "cached_tokens", "ready_share", "prefetch_forwards", "preemptions", "equal", "n",
]  # fmt: skip


def answer(ttft_s: float = 0.1, text: str = "tea", cached_tokens: int = 96) -> Answer:
    return Answer(ttft_s, (), text, 100, cached_tokens)


def result(arm: str, ttft_s: float = 0.1, *, users: int = 2, turns: int = 3, **fields: object) -> Result:
    samples = [
        Sample(f"user-{user}", turn, answer(ttft_s), 0, ready=turn > 0, think_s=1.0)
        for turn in range(turns)
        for user in range(users)
    ]
    return Result(arm, samples, **fields)  # type: ignore[arg-type]


def rows_of(*results: Result) -> dict[str, multiuser_table.Row]:
    return {row["arm"]: row for row in multiuser_table.rows("model", 1.0, results)}


# -- sizes and order ---------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_the_small_pool_holds_fewer_users_than_there_are(preset: str) -> None:
    shape = PRESETS[preset].shape
    blocks_of_one = -(-shape.longest // shape.block_size)
    usable = shape.pool_blocks() - 1  # the null block
    assert shape.pool_users * blocks_of_one <= usable < shape.users * blocks_of_one
    assert usable * shape.block_size >= shape.max_model_len >= shape.longest


@pytest.mark.parametrize("preset", PRESETS)
def test_the_example_connector_gets_a_block_size_with_which_it_hits(preset: str) -> None:
    shape = PRESETS[preset].shape
    block_size = shape.whole_prompt_block_size
    first, last = shape.memory_tokens + shape.query_tokens, shape.longest
    assert first // block_size == last // block_size > 0


def test_a_memory_shorter_than_a_conversation_leaves_the_block_size_as_it_is() -> None:
    shape = Shape(8, 3, memory_tokens=40, query_tokens=200, max_tokens=8, pool_users=3, block_size=32)
    assert shape.whole_prompt_block_size == 32


def test_all_other_users_come_between_two_turns_of_one() -> None:
    shape = Shape(3, 2, 100, 10, 4, 1, 16)
    people = tuple(Conversation(name, name, "", ("a", "b")) for name in "xyz")
    order = [(turn, one.user) for turn, one in Script(shape, people, people[0]).turns()]
    assert order == [(0, "x"), (0, "y"), (0, "z"), (1, "x"), (1, "y"), (1, "z")]


# -- counting ----------------------------------------------------------------------------------


def test_counters_are_summed_over_labels_and_missing_ones_are_zero() -> None:
    metrics = """\
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop"} 3.0
vllm:request_success_total{engine="0",finished_reason="length"} 21.0
vllm:request_success_created{engine="0",finished_reason="stop"} 1.7e9
vllm:num_preemptions_total{engine="0"} 2.0
"""
    assert parse_counters(metrics) == Counters(requests=24, preemptions=2, loaded_tokens=0)


def test_counters_subtract() -> None:
    assert Counters(5, 2, 64) - Counters(3, 2, 32) == Counters(2, 0, 32)


# -- rows --------------------------------------------------------------------------------------


def test_a_row_has_the_designed_keys_first() -> None:
    row = rows_of(result("warm"))["warm"]
    assert list(row)[: len(DESIGNED_KEYS)] == DESIGNED_KEYS


def test_first_turns_stand_apart() -> None:
    one = result("direct")
    one.samples[0] = replace(one.samples[0], answer=answer(9.0))
    row = rows_of(one)["direct"]
    assert row["ttft_p95_s"] == pytest.approx(0.1)
    assert row["first_ttft_p95_s"] > 5
    assert row["n"] == 4


def test_an_answer_that_differs_from_the_warm_one_is_reported() -> None:
    direct = result("direct")
    direct.samples[-1] = replace(direct.samples[-1], answer=answer(text="coffee"))
    rows = multiuser_table.rows("model", 1.0, [direct, result("warm")])
    assert [row["equal"] for row in rows] == [False, True]
    assert multiuser_table.problems(rows) == ["direct: 17% of the answers differ from the reference's"]
    assert any("missed" in line and "equal" in line for line in multiuser_table.verdict(rows))


def test_the_engines_own_count_of_ready_scenes_is_taken() -> None:
    row = rows_of(result("predictive", scenes={"ready": 3, "late": 1, "missed": 0, "other": 0}))["predictive"]
    assert row["ready_share"] == 0.75
    assert row["resident_share"] == 1.0
    assert row["problem"] is None


def test_a_count_that_misses_turns_is_a_problem() -> None:
    row = rows_of(result("predictive", scenes={"ready": 3}))["predictive"]
    assert row["ready_share"] == 1.0
    assert "3 arrivals in 4 turns" in row["problem"]


def test_an_arm_that_failed_at_once_has_no_row() -> None:
    assert multiuser_table.rows("model", 1.0, [Result("warm", failure="gone")]) == []


def test_the_reference_is_the_first_arm_where_warm_did_not_run() -> None:
    rows = rows_of(result("direct"), result("reactive"))
    assert rows["reactive"]["equal"] is True


def test_the_limit_is_what_was_measured_beside_the_arms() -> None:
    slow, quick = result("reactive", 0.3), result("predictive", 0.219)
    slow.control, quick.control = result("warm", 0.1).samples, result("warm", 0.2).samples
    rows = rows_of(slow, quick)
    assert list(rows) == ["reactive", "warm", "predictive"]
    assert rows["warm"]["n"] == 8
    assert rows["predictive"]["warm_p50_s"] == pytest.approx(0.2)
    found = multiuser_table.verdict(list(rows.values()))
    assert "[green]met[/green]     predictive: p50 TTFT is 1.09 x warm's; target 1.10 x" in found


# -- verdict -----------------------------------------------------------------------------------


def verdict_of(ttft_s: float = 0.105, **fields: object) -> list[str]:
    scenes = {"ready": 4, "late": 0, "missed": 0, "other": 0}
    predictive = result("predictive", ttft_s, **({"scenes": scenes} | fields))
    return multiuser_table.verdict(
        multiuser_table.rows("model", 1.0, [result("direct", 1.0), result("reactive", 0.2), result("warm"), predictive])
    )


def test_all_criteria_met() -> None:
    lines = verdict_of()
    assert len(lines) == 8
    assert all("[green]met" in line for line in lines)


@pytest.mark.parametrize(
    ("fields", "missed"),
    [
        ({"ttft_s": 0.12}, ["p50 TTFT is 1.20 x warm's"]),
        ({"ttft_s": 0.3}, ["p50 TTFT", "p95 TTFT", "reactive", "reactive"]),
        ({"scenes": {"ready": 3, "missed": 1}}, ["75% of the turns"]),
        ({"forwards": 2}, ["2 forward passes"]),
        ({"totals": Counters(preemptions=1)}, ["1 preemptions"]),
    ],
)
def test_each_criterion_can_be_missed(fields: dict[str, object], missed: list[str]) -> None:
    lines = [line for line in verdict_of(**fields) if "missed" in line]
    assert len(lines) == len(missed)
    assert all(text in line for text, line in zip(missed, lines, strict=True))


def test_a_warm_up_that_does_not_fit_the_pause_is_noted() -> None:
    def notes(ttft_s: float) -> list[str]:
        rows = multiuser_table.rows("model", 1.0, [result("warmup_request", ttft_s)])
        return [line for line in multiuser_table.verdict(rows) if line.startswith("note")]

    assert notes(0.9) == []
    assert "1.4 s, longer than the pause of 1 s" in notes(1.4)[0]


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    multiuser_table.plot(
        tmp_path / "a.png", multiuser_table.rows("m", 1.0, [result("direct"), result("warm")]), "title"
    )
    assert (tmp_path / "a.png").stat().st_size > 1000


# -- arms, servers, command line ---------------------------------------------------------------


def test_every_arm_has_a_server_a_colour_and_its_place() -> None:
    arms = {arm.name for arm in multiuser.make_arms(PRESETS["smoke"])}
    assert arms == set(multiuser_table.COLORS) == {*multiuser_options.ARMS, multiuser_options.CHECK}


@pytest.mark.parametrize(("deployment", "enabled"), [("reactive", False), ("predictive", True)])
def test_memos_servers_have_a_valid_configuration(tmp_path: Path, deployment: str, enabled: bool) -> None:
    path = tmp_path / "memos.yaml"
    options = PRESETS["smoke"]
    path.write_text(yaml.safe_dump(multiuser_servers.memos_config(options, tmp_path, prediction=enabled)))
    config = load(path)
    assert config.prediction.enabled is enabled
    assert config.memory.long_lived_tokens > options.memory_tokens


def test_servers_differ_in_pool_and_plugin_only(tmp_path: Path) -> None:
    options = replace(PRESETS["smoke"], model=models.find(str(models.RECALL_MODEL)))
    servers = {name: multiuser_servers.make_server(name, options, tmp_path) for name in ("small", "large", "reactive")}
    small, large, reactive = (server.extra for server in servers.values())
    assert small == reactive
    assert [pair for pair in zip(small, large, strict=True) if pair[0] != pair[1]] == [
        (str(options.shape.pool_blocks()), str(options.shape.pool_blocks(options.users + 1)))
    ]
    assert [server.plugin for server in servers.values()] == [False, False, True]


def test_on_a_gpu_a_server_is_told_how_much_its_pool_takes_so_that_two_may_start_at_once(tmp_path: Path) -> None:
    options = replace(PRESETS["gpu"], model=replace(PRESETS["gpu"].model, path=""))
    for deployment, users in (("small", options.pool_users), ("large", options.users + 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models.Model, "directory", lambda self: str(tmp_path))
            server = multiuser_servers.make_server(deployment, options, tmp_path, gpu_share=0.45)
        flags = dict(zip(server.extra[::2], server.extra[1::2], strict=True))
        assert flags["--num-gpu-blocks-override"] == str(options.shape.pool_blocks(users))
        tokens = options.shape.pool_blocks(users) * options.shape.block_size
        assert flags["--kv-cache-memory-bytes"] == str(tokens * 2 * 36 * 8 * 128 * 2)  # K, V, layers, heads, size, bf16


@pytest.mark.parametrize("told", [True, False])
def test_servers_on_a_gpu_start_together_where_none_measures_the_memory(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started:
        def __init__(self, log: list[str], name: str) -> None:
            self.extra = ["--kv-cache-memory-bytes", "1"] if told else []
            self._log, self._name = log, name

        def start(self) -> None:
            self._log.append(f"start {self._name}")

        def wait_until_ready(self, timeout_s: float) -> None:
            self._log.append(f"wait for {self._name}")

    log: list[str] = []
    monkeypatch.setattr(ttft, "has_gpu", lambda: True)
    ttft.start([Started(log, "a"), Started(log, "b")])  # type: ignore[list-item]
    together, one_by_one = ["start a", "start b", "wait for a", "wait for b"], ["start a", "wait for a"]
    assert log == (together if told else [*one_by_one, "start b", "wait for b"])


def test_on_a_gpu_data_stands_in_memory_where_all_of_it_fits_several_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = PRESETS["gpu"]
    assert multiuser_servers.memory_directory(options) is None, "there is no GPU"
    monkeypatch.setattr(multiuser_servers, "has_gpu", lambda: True)
    monkeypatch.setattr(multiuser_servers, "MEMORY_FOLDER", str(tmp_path))
    for free, expected in ((2**36, str(tmp_path)), (2**32, None)):
        monkeypatch.setattr(multiuser_servers.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert multiuser_servers.memory_directory(options) == expected
    monkeypatch.setattr(multiuser_servers, "MEMORY_FOLDER", str(tmp_path / "missing"))
    assert multiuser_servers.memory_directory(options) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [({"turns": 1}, "--turns"), ({"users": 3}, "--users"), ({"lead_s": 2.0}, "--lead-s")],
)
def test_options_that_measure_nothing_are_refused(change: dict[str, object], word: str) -> None:
    options = Options(models.CPU)
    assert problem_of(options) is None
    assert word in (problem_of(replace(options, **change)) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize("argv", [["--arms", "warm,hot"], ["--users", "0"], ["--pause-s", "-1"], ["--turns", "1"]])
def test_bad_values_end_with_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("", ["--preset", "cpu", *argv])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("python -m benchmarks.multiuser: error:")


def test_options_of_the_command_line_replace_the_presets() -> None:
    arguments = parse("", ["--preset", "cpu", "--users", "5", "--arms", "warm,direct", "--pause-s", "2.5"])
    assert (arguments.options.users, arguments.options.pause_s) == (5, 2.5)
    assert arguments.options.arms == ("warm", "direct")
    assert arguments.options.memory_tokens == PRESETS["cpu"].memory_tokens


def test_answers_that_may_differ_are_counted_and_not_judged() -> None:
    direct = result("direct")
    direct.samples[-1] = replace(direct.samples[-1], answer=answer(text="coffee"))
    rows = multiuser_table.rows("model", 1.0, [direct, result("warm")], compare=False)
    assert [row["equal"] for row in rows] == [None, None] and rows[0]["equal_share"] < 1
    assert multiuser_table.problems(rows) == []
    assert any(
        line.startswith("note    answers are compared in float32 only") for line in multiuser_table.verdict(rows)
    )
