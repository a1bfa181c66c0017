"""The TTFT benchmark without servers: its rows and its options."""

import pytest

from benchmarks import ttft_table
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
