"""The copy benchmark: its rows, and that wrong bytes have no speed. Nothing here looks at a time."""

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kv_copy, kv_copy_gpu, kv_copy_table
from benchmarks.kv_copy_rig import PLANES, Shape, paired
from memos_vllm.store import link
from memos_vllm.store.copy_planner import CopyPlan, Direction, Measured
from memos_vllm.store.link import CpuLink
from memos_vllm.store.pipeline import Method
from tests.conftest import ROOT


def run(tmp_path):
    path = str(tmp_path / "r.json")
    code = kv_copy.main(["--preset", "smoke", "--repeats", "1", "--json", path, "--directory", str(tmp_path)])
    return code, json.loads((tmp_path / "r.json").read_text())


def test_a_run_writes_a_row_per_direction_and_size(tmp_path, capsys):
    code, run_ = run(tmp_path)
    rows = run_["rows"]
    assert code == 0 and run_["benchmark"] == "kv_copy" and run_["flags"]["failures"] == []
    found = {(row["direction"], row.get("cache"), row["fragment_bytes"]) for row in rows}
    directions = [("load", None), ("save", None), ("both", None)]
    directions += [(direction, cache) for direction in ("disk", "promote") for cache in ("warm", "cold")]
    assert found == {(*direction, size) for direction in directions for size in (4096, 65536)}
    for row in rows:
        assert row["arm"] == "engine" and row["fragments"] * row["fragment_bytes"] == 4 * 2**20
        assert row["gb_per_s"] > 0 and row["limit_gb_per_s"] > 0 and row["share"] > 0
    assert "no targets" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_copies_are_measured_without_vllm_and_without_what_clients_need(tmp_path):
    """On a machine with a GPU that has PyTorch and no more."""
    code = "import sys; sys.modules.update(dict.fromkeys(['vllm', 'openai', 'httpx', 'pydantic'])); "
    code += "from benchmarks import kv_copy; sys.exit(kv_copy.main(sys.argv[1:]))"
    flags = ["--preset", "smoke", "--sizes", "4096", "--repeats", "1", "--directory", str(tmp_path)]
    command = [sys.executable, "-c", code, *flags, "--json", str(tmp_path / "r.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "r.json").read_text())["rows"]


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = (4096, 2**21)
    arms = [("engine", "load"), ("dma", "load"), ("vllm_dma", "save"), ("engine", "save"), ("engine", "both")]
    rows = [gpu_row(arm, direction, size, 40.0, 0.8) for arm, direction in arms for size in sizes]
    rows += [gpu_row("engine", "disk", size, 2.0, 0.9) | {"cache": "cold"} for size in sizes]
    kv_copy_table.plot(tmp_path / "copies.png", rows)
    assert (tmp_path / "copies.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("link_call", ["load", "memory"])
def test_wrong_bytes_have_no_speed_and_end_in_code_1(tmp_path, monkeypatch, capsys, link_call):
    """One byte of one block: on the way from the host slots, or from the file."""
    if link_call == "load":
        load = CpuLink.load

        def harmed(self, groups, block_ids, after, landed):
            groups[0].matrix[groups[0].rows[0], 0] ^= 1
            load(self, groups, block_ids, after, landed)

        monkeypatch.setattr(CpuLink, "load", harmed)
    else:
        monkeypatch.setattr(link, "IN_PLACE_BYTES", 1)
        memory = CpuLink.memory
        monkeypatch.setattr(CpuLink, "memory", lambda self, ids: memory(self, [ids[-1], *ids[1:-1], ids[0]]))
    code, run_ = run(tmp_path)
    assert code == 1 and run_["rows"] == [] and len(run_["flags"]["failures"]) == 2
    assert "wrong bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("an operation failed"), [4096, 65536]),
        (torch.OutOfMemoryError("CUDA out of memory"), [4096, 65536]),
        (KeyboardInterrupt(), [4096]),
    ],
)
def test_a_cell_that_fails_loses_no_other_and_each_is_written_when_it_is_measured(
    error, expected, tmp_path, monkeypatch, capsys
):
    written = []

    def measure(shape, options, plan, where):
        if shape.fragment_bytes == 16384:
            written.append(json.loads((tmp_path / "r.json").read_text()))
            raise error
        return [gpu_row("engine", "load", shape.fragment_bytes, 1.0, 1.0)]

    monkeypatch.setattr(kv_copy, "measure", measure)
    target = str(tmp_path / "r.json")
    assert kv_copy.main(["--preset", "smoke", "--sizes", "4096", "16384", "65536", "--json", target]) == 1
    run_ = json.loads((tmp_path / "r.json").read_text())
    assert [row["fragment_bytes"] for row in written[0]["rows"]] == [4096] and written[0]["flags"]["failures"] == []
    assert [row["fragment_bytes"] for row in run_["rows"]] == expected
    assert len(run_["flags"]["failures"]) == 1 and "FAILED" in capsys.readouterr().out


def test_files_are_not_read_in_cells_that_would_take_minutes(monkeypatch, tmp_path):
    options = kv_copy.Options((4096,), (2**20,), 1, file_bytes=2**19)
    rows = kv_copy.measure(Shape(4096, 256), options, CopyPlan(), str(tmp_path))
    assert {row["direction"] for row in rows} == {"load", "save", "both"}


def test_a_share_is_the_median_over_pairs_that_take_turns(monkeypatch):
    calls, clock = [], iter([0, 2, 10, 11, 20, 21, 30, 34, 40, 42, 50, 51])  # limit, ours; ours, limit; ...
    monkeypatch.setattr("benchmarks.kv_copy_rig.time.perf_counter", lambda: float(next(clock)))
    pairs = paired(lambda: calls.append("ours"), lambda: calls.append("limit"), 3, lambda: calls.append("before"))
    arms = ["limit", "ours", "ours", "limit", "limit", "ours"]
    assert calls == [call for arm in arms for call in ("before", arm)]
    assert pairs.share == 2.0 and pairs.seconds == 1.0 and pairs.limit_seconds == 2.0


def gpu_row(arm, direction, size, speed, share):
    shape = Shape(size, 64 * 2**20 // size)
    return {
        "arm": arm, "direction": direction, "fragment_bytes": size, "fragments": shape.fragments,
        "gb_per_s": speed, "limit_gb_per_s": 50.0, "share": share,
    }  # fmt: skip


def test_the_verdict_on_a_gpu_names_every_point_that_is_slower_than_vllm():
    rows = [
        gpu_row("engine", "load", 4096, 20.0, 0.4),  # below the smallest size with a target
        gpu_row("engine", "load", 8192, 46.0, 0.92),
        gpu_row("engine", "load", 65536, 44.0, 0.88),
        gpu_row("engine", "both", 65536, 80.0, 1.6),
        gpu_row("vllm_dma", "load", 8192, 5.0, 0.1),
        gpu_row("vllm_triton", "load", 8192, 45.0, 0.9),
        gpu_row("vllm_dma", "load", 65536, 48.0, 0.96),
        {"arm": "decode", "direction": "interference", "itl_p99_ratio": 1.2},
    ]
    lines = kv_copy_table.verdict(rows)
    assert "missed" in lines[0] and "below 0.9 at 64 KiB, worst 0.88" in lines[0]
    assert "0.88 to 0.92" in lines[0]
    assert "met" in lines[1] and "both ways" in lines[1]
    assert (
        "1 of 2 points; vllm_triton could not be measured everywhere" in lines[2]
        and "load 64 KiB x 1024: 44.0 to 48.0" in lines[3]
    )
    assert "missed" in lines[4] and "1.200" in lines[4]


@pytest.mark.parametrize("lacking", [None, "vllm_dma", "vllm_triton"])
def test_the_comparison_with_vllm_needs_both_of_its_ways(lacking):
    arms = [arm for arm in ("vllm_dma", "vllm_triton") if arm != lacking]
    rows = [gpu_row("engine", "load", 8192, 46.0, 0.92), gpu_row("engine", "both", 8192, 80.0, 1.6)]
    (line,) = [each for each in kv_copy_table.verdict(rows + [gpu_row(arm, "load", 8192, 5.0, 0.1) for arm in arms])
               if "1 of 1 points" in each]  # fmt: skip
    assert ("missed" in line) == (lacking is not None) and (lacking or "") in line


@pytest.mark.parametrize("method", Method)
def test_a_method_alone_is_always_taken(method):
    plan = kv_copy_gpu.only(method)
    assert {plan.choose(direction, 2**power, 100) for direction in Direction for power in (12, 21)} == {method}


def test_the_plan_says_what_is_taken():
    measured = [
        Measured(Direction.LOAD, method, 4096, 8, speed) for method, speed in zip(Method, (1, 9, 2), strict=True)
    ]
    table = kv_copy_table.plan_table(CopyPlan(measured), "a GPU")
    assert [next(iter(column.cells)) for column in table.columns] == [
        "load",
        "4 KiB",
        "8",
        "1.0",
        "9.0",
        "2.0",
        "direct",
    ]


def test_on_cpu_there_is_nothing_to_plan(capsys, monkeypatch):
    monkeypatch.setattr(kv_copy, "has_gpu", lambda: False)
    assert kv_copy.main(["--plan"]) == 0
    assert "one way to copy" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_the_presets_go_from_4_kib_to_2_mib_each_with_more_than_one_block(preset):
    options = kv_copy.PRESETS[preset]
    assert min(options.fragment_bytes) == 4096 and max(options.fragment_bytes) == 2**21
    assert all(total >= 2 * PLANES * size for total in options.total_bytes for size in options.fragment_bytes)


def test_the_plan_of_a_benchmark_is_whole_where_one_start_has_no_time_for_it(monkeypatch, tmp_path, capsys):
    measured = [
        [Measured(Direction.LOAD, Method.DMA, 4096, count, 1.0) for count in range(1, number + 1)]
        for number in (1, 2, 2)
    ]
    plans = iter(map(CopyPlan, measured))
    monkeypatch.setattr(kv_copy, "has_gpu", lambda: True)
    monkeypatch.setattr("memos_vllm.store.cuda_device.plan_of", lambda device, directory: next(plans))
    monkeypatch.setattr("memos_vllm.store.cuda_device.machine_name", lambda device: "a GPU")
    assert kv_copy.main(["--plan", "--data-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert next(plans, None) is None, "as long as a start measures more"
    assert "a GPU: GB/s" in printed and printed.count("load") == 2 and "taken" in printed


def test_a_shape_is_whole_blocks():
    shape = Shape(4096, 32 * PLANES)
    assert shape.num_blocks == 32 and shape.block_bytes * shape.num_blocks == shape.size_bytes


def test_vllms_copies_run_on_a_stream_of_their_own_and_are_waited_for(monkeypatch):
    calls, current = [], []

    @contextlib.contextmanager
    def stream(one):
        current.append(one)
        yield
        current.pop()

    fake = SimpleNamespace(Stream=lambda: "own", stream=stream, synchronize=lambda: calls.append("waited"))
    monkeypatch.setattr(kv_copy_gpu.torch, "cuda", fake)
    kv_copy_gpu.on_its_own_stream(lambda *args, **kwargs: calls.append((args, kwargs, *current)))(1, order=True)
    assert calls == [((1,), {"order": True}, "own"), "waited"]
