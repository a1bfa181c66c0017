"""The benchmark of groups of layers without servers: its rows and its options."""

import pytest

from benchmarks import layer_groups, models
from benchmarks.arms import Sample, Trial
from benchmarks.client import Answer


def sample(groups, query, ttft_s, text="tea", problem=None, source="host"):
    trial = Trial("user", 583, 40, "document", "first", ())
    return Sample(str(groups), source, trial, query, Answer(ttft_s, 0.2, text, (-0.1,), 620, 576), problem)


def test_each_answer_is_compared_with_that_of_one_group_to_the_same_query():
    samples = [sample(1, "a", 0.2), sample(1, "b", 0.4), sample(4, "a", 0.1), sample(4, "b", 0.4), sample(2, "c", 9.0)]
    one, four = layer_groups.rows_of(models.RECALL, samples)
    assert (one["groups"], one["ratio_to_one"], one["n"], one["equal"]) == (1, 1.0, 2, True)
    assert (four["groups"], four["ratio_to_one"], four["equal"]) == (4, 0.75, True)
    assert layer_groups.problems([one, four]) == []


@pytest.mark.parametrize(("model", "equal"), [(models.RECALL, False), (models.QWEN3_32B, None)])
def test_an_answer_that_differs_is_a_failure_unless_it_says_nothing(model, equal):
    rows = layer_groups.rows_of(model, [sample(1, "a", 0.2), sample(2, "a", 0.2, text="coffee")])
    assert rows[1]["equal"] is equal
    assert len(layer_groups.problems(rows)) == (equal is False)


@pytest.mark.parametrize("source", ["host", "build"])
def test_a_sample_with_a_problem_is_a_failure(source):
    samples = [sample(1, "a", 0.2), sample(2, "a", 0.2), sample(2, "z", 0.2, problem="not cached", source=source)]
    assert any("not cached" in text for text in layer_groups.problems(layer_groups.rows_of(models.RECALL, samples)))


def test_one_group_is_always_among_them():
    assert layer_groups._parse(["--preset", "cpu", "--groups", "4,2"]).options.groups == (1, 2, 4)


@pytest.mark.parametrize("text", ["0", "65", "two", "", "1,,2"])
def test_other_numbers_of_groups_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        layer_groups._parse(["--groups", text])
    assert "1 to 64" in capsys.readouterr().err
