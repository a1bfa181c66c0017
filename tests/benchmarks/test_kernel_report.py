"""The kernels that matter compile for every GPU generation without spills and with the widest accesses there are."""

import dataclasses
import json

import pytest

from benchmarks import kernel_report
from benchmarks.kernel_report import TARGETS, examine, variants

ALIGNED = {
    # name -> loads and stores in one turn of the loop, all of 128 bits: 32 KiB per program of 512 threads are four
    # per thread. On the side of fp8 it is half as many; an encoder takes 16 KiB, and reads them twice.
    "gather, whole blocks, 16 bytes": (4, 4),
    "scatter, runs in 2 dimensions, 16 bytes": (4, 4),
    "gather with fp8, bfloat16 [16, 128]": (4, 1),
    "scatter with fp8, bfloat16": (2, 4),
    "scatter with shift (neox), bfloat16": (4, 4),
    "scatter with shift (gptj), bfloat16": (4, 4),
    "scatter with fp8 and shift (neox), bfloat16": (2, 4),
    "gather, runs in 4 dimensions, 16 bytes": (4, 4),
    "gather with fp8, bfloat16 [64, 576]": (4, 1),
    "scatter with fp8 and shift (gptj), bfloat16": (2, 4),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Compiles for real, whatever was compiled before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ALIGNED)
def test_no_spills_and_128_bits(name, target):
    variant = next(variant for variant in variants() if variant.name == name)
    row = examine(variant, target)
    assert row["spills"] == 0 and row["stack_bytes"] == 0
    assert row["load_bits"] == row["store_bits"] == 128
    wide = [int(row[key].partition("x")[0]) for key in ("loads", "stores")]
    assert wide == list(ALIGNED[name])


def test_an_unaligned_cache_is_seen_as_such():
    variant = next(variant for variant in variants() if variant.name == "gather, runs in 2 dimensions, 2 bytes")
    assert examine(variant, "sm_80")["store_bits"] == 16


def test_spills_are_seen():
    variant = next(variant for variant in variants() if variant.name == "scatter with fp8 and shift (neox), bfloat16")
    row = examine(dataclasses.replace(variant, options=variant.options | {"maxnreg": 32}), "sm_90")
    assert row["registers"] <= 32 and row["spills"] > 0 and row["stack_bytes"] > 0


def test_the_report_as_json(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert kernel_report.main(["--target", "sm_90", "--kernel", "gather, whole blocks, 8", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["benchmark"] == "kernel_report"
    [row] = written["rows"]
    assert row["kernel"] == "gather, whole blocks, 8 bytes" and row["target"] == "sm_90"
    assert {"registers", "spills", "shared_bytes", "load_bits", "store_bits"} <= row.keys()
    printed = capsys.readouterr().out
    assert "1 compilations, 0 with spills" in printed
    assert all(column in printed for column in ("registers", "spills", "shared_bytes", "load_bits", "store_bits"))


@pytest.mark.parametrize("column", ["spills", "stack_bytes"])
def test_a_kernel_that_spills_ends_in_code_1(monkeypatch, capsys, column):
    row = {"kernel": "k", "target": "sm_90", "spills": 0, "stack_bytes": 0} | {column: 8}
    monkeypatch.setattr(kernel_report, "examine", lambda variant, target: row)
    assert kernel_report.main(["--target", "sm_90", "--kernel", "gather, whole blocks, 16"]) == 1
    assert "1 compilations, 1 with spills" in capsys.readouterr().out


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_report.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
