"""How answers are compared; the engine is not started here."""

import pytest

from benchmarks.fp8_divergence import Answer, divergence


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
