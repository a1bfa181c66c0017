"""Which form a memory should have: text, KV or an adapter. The choice follows what was measured, and says why.

The three forms cost different things. Text is prefilled at every use that finds no KV; KV saves that and takes
room in a tier; an adapter takes neither prompt nor KV and must be trained, again whenever the memory changes
(MemOS, arXiv 2507.03724, transforms between memory types). So the rule compares seconds per day:

    text         uses x prefill
    activation   uses x load     + bytes, at what a tier's byte-second is worth
    parametric   training, spread over how long the memory has stayed the same
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DAY_S = 86_400.0
MIN_OBSERVED_S = 600.0
"""Before that, nothing is said about how often a memory is used."""

KV_SECONDS_PER_GIB_DAY = 10.0
"""What a GiB in a tier for a day is worth in seconds of prefill: it is evicted by what saves more."""

LOAD_SHARE = 0.1
"""A load takes about this share of the prefill it saves, until a deployment's own figure is at hand."""

MIN_STABLE_S = 7 * DAY_S
"""A memory that is younger, or was changed since, is likely to change again before training has paid."""

ADVANTAGE = 1.25
"""Another form must be better by this factor, or forms would change back and forth."""


class Form(StrEnum):
    TEXT = "text"
    ACTIVATION = "activation"
    PARAMETRIC = "parametric"


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one memory.

    Attributes:
        uses: recalls into a prompt within ``observed_s`` seconds.
        prefill_s: of its tokens; None: nothing was prefilled yet.
        kv_bytes: of its tokens; None: no KV was stored yet.
        stable_s: since it was written or last changed.
        askable: whether questions about it can be made, so that an adapter can be taught and tested.
        training_s: of an adapter.
    """

    uses: int
    observed_s: float
    tokens: int
    prefill_s: float | None
    kv_bytes: int | None
    stable_s: float
    askable: bool
    training_s: float


@dataclass(frozen=True, slots=True)
class FormChoice:
    form: Form
    cost_s_per_day: dict[Form, float]
    """Of the forms that come into question."""

    why: str


def choose(measured: Measured) -> FormChoice:
    """The form that costs least, where enough is known; text otherwise."""
    if measured.observed_s < MIN_OBSERVED_S:
        return FormChoice(Form.TEXT, {}, f"observed for {measured.observed_s:.0f} s only, so its reuse is not known")
    if measured.prefill_s is None:
        return FormChoice(Form.TEXT, {}, "no prefill was measured yet, so there is nothing to compare with")
    uses_per_day = measured.uses * DAY_S / measured.observed_s
    costs = {Form.TEXT: uses_per_day * measured.prefill_s}
    notes = [
        f"{uses_per_day:.1f} uses a day of {measured.tokens} tokens, {measured.prefill_s * 1000:.1f} ms to prefill"
    ]
    if measured.kv_bytes is None:
        notes.append("no KV was stored yet")
    else:
        storage = measured.kv_bytes / 2**30 * KV_SECONDS_PER_GIB_DAY
        costs[Form.ACTIVATION] = uses_per_day * measured.prefill_s * LOAD_SHARE + storage
        notes.append(f"its KV takes {measured.kv_bytes / 2**20:.1f} MiB")
    if not measured.askable:
        notes.append("no question follows from it, so no adapter can be taught or tested")
    elif measured.stable_s < MIN_STABLE_S:
        notes.append(f"unchanged for {measured.stable_s / DAY_S:.1f} days, too short to train an adapter")
    else:
        costs[Form.PARAMETRIC] = measured.training_s * DAY_S / measured.stable_s
        notes.append(f"unchanged for {measured.stable_s / DAY_S:.1f} days, {measured.training_s:.0f} s to train")
    best = min(costs, key=lambda form: costs[form])
    if costs[best] * ADVANTAGE > costs[Form.TEXT]:
        best = Form.TEXT
    prices = ", ".join(f"{form} {cost:.3g}" for form, cost in costs.items())
    return FormChoice(best, costs, f"{'; '.join(notes)}. Seconds a day: {prices}")
