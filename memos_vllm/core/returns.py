"""From a scene's wait to the hazard model and back: what is known of it, how probable its return is, what it taught."""

from __future__ import annotations

import math

from memos_vllm.core.hazard import EDGES_S, Context, HazardModel, bin_of, octave
from memos_vllm.core.waiting import Wait

_LONG_S = 8 * 86400.0
"""From here on a wait is learned by whole days, whatever the hour."""


class Returns:
    def __init__(self) -> None:
        self.hazard = HazardModel()

    def returned(self, wait: Wait, now: float) -> None:
        """The scene is used again: the end of its wait, if it waited."""
        if wait.ended is None or wait.busy or wait.context is None:
            return
        self.count(wait, now)
        gap_s = wait.elapsed_s(now)
        self.hazard.observe(wait.context, bin_of(gap_s), _hour(now), 0.0, 1)
        wait.gap_s = gap_s
        log_gap = math.log2(max(gap_s, 0.5))
        wait.usual_gap = log_gap if wait.usual_gap is None else (wait.usual_gap + log_gap) / 2

    def count(self, wait: Wait, now: float) -> None:
        """Learns that the scene did not come back since the last count."""
        if wait.busy or wait.closed or wait.ended is None or wait.context is None:
            return
        start, end = wait.counted_s, now - wait.ended
        while start < end:
            index = bin_of(start)
            stop = min(end, EDGES_S[index + 1])
            hour = None
            if wait.context.clock is not None and start < _LONG_S:
                at = wait.ended + start
                stop = min(stop, start + 3600.0 - at % 3600.0)
                hour = _hour(at)
            stop = min(end, max(stop, start + 1e-3))  # an edge that rounding does not let us pass
            self.hazard.observe(wait.context, index, hour, stop - start, 0)
            start = stop
        wait.counted_s = max(wait.counted_s, end)

    def expected(self, wait: Wait, now: float, within_s: float) -> float:
        """The rate of return, summed over the coming ``within_s``."""
        if wait.context is None or wait.closed:
            return 0.0
        start, hour, total = wait.elapsed_s(now), _hour(now), 0.0
        end, index = start + within_s, bin_of(start)
        while EDGES_S[index + 1] < end:
            total += (EDGES_S[index + 1] - start) * self.hazard.rate(wait.context, index, hour)
            index += 1
            start = EDGES_S[index]
        return total + (end - start) * self.hazard.rate(wait.context, index, hour)

    def median_s(self, wait: Wait, now: float, longest_s: float) -> float:
        """Half of the returns within ``longest_s`` come earlier than this."""
        half = -math.log1p(0.5 * math.expm1(-self.expected(wait, now, longest_s)))
        if half <= 0.0:
            return longest_s
        within_s = 1.0
        while within_s < longest_s and self.expected(wait, now, within_s) < half:
            within_s *= 2**0.5
        return min(within_s, longest_s)

    def next_edge_s(self, wait: Wait, now: float) -> float:
        """Until the wait enters another bin."""
        elapsed_s = wait.elapsed_s(now)
        return EDGES_S[bin_of(elapsed_s) + 1] - elapsed_s

    def explain(self, wait: Wait, now: float) -> str:
        if wait.context is None:
            return "never used"
        elapsed_s, hour = wait.elapsed_s(now), _hour(now)
        index = bin_of(elapsed_s)
        rate = 100 * self.hazard.rate(wait.context, index, hour)
        factors = self.hazard.explain(wait.context, index, hour)[:3]
        moved = ", ".join(f"{name} x{by:.2g}" for name, by in factors if abs(by - 1) > 0.1)
        since = "in use" if wait.busy else f"{elapsed_s:.0f} s ago"
        return f"use {wait.uses}, {since}: returns at {rate:.2g} % per s" + (f" ({moved})" if moved else "")

    def context(self, wait: Wait) -> Context:
        """What is known of a scene when it is used, and more when the answer is complete."""
        kind, owner = wait.scene.kind.value, wait.scene.owner
        first = "first" if wait.uses == 1 else "later"
        keys = [("turn", f"{kind} {min(wait.uses, 3 + octave(wait.uses))}")]
        if wait.new_tokens is not None:
            keys.append(("message", f"{kind} {first} {octave(wait.new_tokens)}"))
        if wait.output_tokens is not None:
            keys.append(("answer", f"{kind} {octave(wait.output_tokens)}"))
        if wait.prompt_tokens is not None:
            keys.append(("length", f"{kind} {octave(wait.prompt_tokens)}"))
        if wait.gap_s is not None:
            keys.append(("pace", f"{kind} {octave(wait.gap_s)}"))
        if wait.usual_gap is not None and wait.uses > 2:
            keys.append(("usual pace", f"{kind} {round(wait.usual_gap)}"))
        if owner is not None:
            keys.append(("owner", owner))
        return self.hazard.context(kind, keys, owner)


def _hour(now: float) -> int:
    return int(now // 3600.0) % 24
