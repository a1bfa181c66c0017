from __future__ import annotations

from dataclasses import replace

import pytest

from memos_vllm.core.forms import DAY_S, Form, Measured, choose

DOCUMENT = Measured(
    uses=50, observed_s=DAY_S, tokens=2000, prefill_s=0.5, kv_bytes=100 * 2**20, stable_s=DAY_S, askable=False,
    training_s=120.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ({}, Form.ACTIVATION),
        ({"uses": 1}, Form.TEXT),
        ({"kv_bytes": 10 * 2**30}, Form.TEXT),
        ({"kv_bytes": None}, Form.TEXT),
        ({"prefill_s": None}, Form.TEXT),
        ({"observed_s": 60.0}, Form.TEXT),
        ({"askable": True}, Form.ACTIVATION),
        ({"askable": True, "stable_s": 365 * DAY_S}, Form.PARAMETRIC),
        ({"askable": True, "stable_s": 365 * DAY_S, "uses": 0}, Form.TEXT),
        ({"stable_s": 365 * DAY_S}, Form.ACTIVATION),
    ],
)
def test_the_cheapest_form_that_is_possible(change: dict, form: Form) -> None:
    choice = choose(replace(DOCUMENT, **change))
    assert choice.form is form and choice.why


def test_more_reuse_never_leads_back_to_text() -> None:
    chosen = [choose(replace(DOCUMENT, uses=uses)).form for uses in range(0, 200, 5)]
    assert chosen == sorted(chosen, key=lambda form: form is not Form.TEXT)


def test_a_tie_stays_text() -> None:
    """Forms must not change back and forth with every use."""
    choice = choose(replace(DOCUMENT, uses=100, kv_bytes=int(0.78 * 100 * 0.5 / 10 * 2**30)))
    assert choice.cost_s_per_day[Form.ACTIVATION] < choice.cost_s_per_day[Form.TEXT] and choice.form is Form.TEXT
