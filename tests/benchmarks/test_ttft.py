"""The TTFT benchmark without servers: its rows and its options."""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

from benchmarks import models, ttft, ttft_table
from benchmarks.arms import Sample, Trial
from benchmarks.client import Answer

TRIAL = Trial("user", 583, 167, "document", "first", ())


def sample(arm, source, text):
    return Sample(arm, source, TRIAL, "query", Answer(0.1, 0.2, text, (-0.1,), 750, 576))


@pytest.mark.parametrize(("compare", "equal"), [(True, [True, False]), (False, [None, None])])
def test_answers_are_compared_unless_they_say_nothing(compare, equal):
    samples = [sample("stock", "warm", "tea"), sample("memos", "host", "coffee")]
    rows = ttft_table.rows("model", samples, compare=compare)
    assert [row["equal"] for row in rows] == equal
    assert len(ttft_table.problems(rows)) == equal.count(False)


@pytest.mark.parametrize(("free_gb", "repeats"), [(70, 5), (40, 3), (16, 1), (8, 0)])
def test_as_many_users_are_measured_as_the_disk_has_room_for(free_gb, repeats, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free_gb * 10**9))
    options = ttft.PRESETS["gpu"]
    assert ttft.repeats_that_fit(models.QWEN3_8B, options) == repeats
    assert ttft.repeats_that_fit(models.RECALL, options) == options.repeats
    run = ttft.Run(models.QWEN3_8B, options)
    assert run.flags["repeats"] == repeats
    assert ttft.memos_config(options, tmp_path)["kv"]["disk_bytes"] == int(0.9 * free_gb * 10**9)
    if not repeats:
        run.measure()
        assert run.samples == [] and "no room" in run.failures[0]


def test_every_query_of_every_user_is_counted():
    options = ttft.Options((models.CPU,), contexts=(100, 300), queries=(50,), hits=2, max_tokens=4)
    trial_tokens = 2 + 3 * 2
    assert options.kv_tokens(3) == 3 * (400 + 2 * trial_tokens * 54) + 300 + trial_tokens * 54


def test_a_model_that_fits_the_card_in_no_way_is_left_out(monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(ttft, "has_gpu", lambda: True)
    monkeypatch.setattr(models.Model, "directory", lambda model: "")
    monkeypatch.setattr(ttft.report, "gpu_memory_bytes", lambda: 80 * 2**30)
    monkeypatch.setattr(ttft.Run, "measure", lambda run: begun.append(run.model.name))
    options = replace(ttft.PRESETS["gpu"], data_dir=None)
    monkeypatch.setattr(ttft, "parse", lambda argv: ttft.Arguments(options, "gpu", None, None))
    assert ttft.main([]) == 1  # nothing was measured
    assert begun == [models.QWEN3_8B.name, models.QWEN3_32B.name]
    assert "Qwen2.5-72B-fp8 does not fit this card" in capsys.readouterr().out
