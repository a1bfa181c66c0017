"""How answers are compared, and what becomes of a model that fails; the engine is not started here."""

import json

import pytest

from benchmarks import fp8_divergence, models
from benchmarks.fp8_divergence import PRESETS, Answer, divergence, room


def answer(*steps):
    """Each step: the chosen token, then the log-probabilities."""
    return Answer(tuple(token for token, _ in steps), tuple(likeliest for _, likeliest in steps), "", 0)


EXACT = answer((1, {1: -0.1, 2: -2.5}), (2, {2: -0.2, 3: -2.0}), (3, {3: -0.5, 4: -1.5}))


def test_an_answer_does_not_differ_from_itself():
    assert divergence([EXACT], [EXACT]) == {
        "max_logprob_diff": 0.0, "mean_logprob_diff": 0.0, "equal_tokens": 1.0, "equal_answers": 1.0,
    }  # fmt: skip


def test_log_probabilities_count_up_to_the_first_token_that_differs_and_tokens_to_the_end():
    other = answer((1, {1: -0.2, 2: -2.5}), (3, {2: -0.9, 3: -0.8}), (3, {3: -9.0, 4: -1.5}))
    found = divergence([EXACT, EXACT], [other, EXACT])
    assert found["max_logprob_diff"] == pytest.approx(0.7)
    assert found["mean_logprob_diff"] == pytest.approx((0.1 + 0.7) / 5)
    assert found["equal_tokens"] == pytest.approx(5 / 6) and found["equal_answers"] == 0.5


def test_a_token_that_became_unlikely_counts_with_the_least_of_those_that_are_known():
    other = answer((5, {5: -0.2, 6: -4.1}), (2, {2: -0.2}), (3, {3: -0.5}))
    assert divergence([EXACT], [other])["max_logprob_diff"] == pytest.approx(4.0)


def row(model):
    return {
        "arm": "fp8", "model": model, "context_tokens": 200, "n": 3, "block_bytes": 64, "stored_bytes": 40,
        "right_answers": None, **divergence([EXACT], [EXACT]),
    }  # fmt: skip


@pytest.mark.parametrize(
    "error", [RuntimeError("the KV was not found"), ValueError("max_model_len"), KeyboardInterrupt()]
)
def test_a_model_that_fails_loses_no_rows_and_ends_in_code_1(error, tmp_path, monkeypatch, capsys):
    written = []

    def measure(name, options):
        if name == models.CPU.name:
            written.extend(json.loads((tmp_path / "r.json").read_text())["rows"])
            raise error
        return [row(name)]

    monkeypatch.setattr(fp8_divergence, "in_a_process_of_its_own", measure)
    names = (models.RECALL.name, models.CPU.name, models.QWEN3_8B.name)
    flags = [flag for name in names for flag in ("--model", name)]
    assert fp8_divergence.main(["--preset", "smoke", *flags, "--json", str(tmp_path / "r.json")]) == 1
    run = json.loads((tmp_path / "r.json").read_text())
    interrupted = isinstance(error, KeyboardInterrupt)
    assert [one["model"] for one in written] == [models.RECALL.name]
    expected = [names[0]] if interrupted else [names[0], names[2]]
    assert [one["model"] for one in run["rows"]] == expected
    assert len(run["flags"]["failures"]) == 1 and "FAILED" in capsys.readouterr().out


def test_every_preset_is_of_models_at_hand_that_have_weights_and_room():
    longest = json.loads((models.RECALL_MODEL / "config.json").read_text())["max_position_embeddings"]
    for options in PRESETS.values():
        assert all(name in models.NAMED and not models.NAMED[name].dummy for name in options.models)
        assert room(max(options.contexts)) <= longest


def test_a_model_without_weights_is_refused(capsys):
    with pytest.raises(SystemExit):
        fp8_divergence.main(["--preset", "smoke", "--model", models.QWEN3_32B.name])
    assert "has no weights here" in capsys.readouterr().err
