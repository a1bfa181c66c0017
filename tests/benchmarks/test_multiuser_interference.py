"""Inter-token latency beside prefetches, without a server."""

from __future__ import annotations

import pytest

from benchmarks.multiuser_client import Answer, Counters
from benchmarks.multiuser_interference import OFF, ON, STREAMS, Window, common_gaps, lines, rows


def answer(*times_s: float, text: str = "tea") -> Answer:
    return Answer(0.1, times_s, text, 20, 0)


def window(arm: str, gap_s: float, *, text: str = "tea", blocks: int = 0) -> Window:
    answers = tuple(answer(0.0, gap_s, text=text) for _ in range(STREAMS))
    return Window(arm, answers, common_gaps(answers), blocks, hints=blocks, totals=Counters(requests=STREAMS))


def test_only_gaps_in_which_all_streams_decode_count() -> None:
    early = answer(0.0, 1.0, 2.0, 3.0)
    late = answer(1.0, 2.5, 4.5)
    # From 1.0 (the late one's first token) to 3.0 (the early one's last).
    assert common_gaps([early, late]) == (1.0, 1.0, 1.5)


def test_latencies_are_medians_over_windows() -> None:
    windows = [window(OFF, gap_s) for gap_s in (0.010, 0.011, 0.5)] + [window(ON, 0.0113, blocks=9)]
    off, on = rows("model", windows)
    assert off["itl_p99_s"] == pytest.approx(0.011)
    assert (off["n"], on["n"]) == (3, 1)
    assert on["prefetch_forwards"] == 0


@pytest.mark.parametrize(
    ("gap_s", "blocks", "word"),
    [(0.0104, 9, "[green]met"), (0.0120, 9, "[yellow]missed"), (0.0100, 0, "nothing was prefetched")],
)
def test_the_verdict_needs_prefetches(gap_s: float, blocks: int, word: str) -> None:
    assert word in lines(rows("model", [window(OFF, 0.010), window(ON, gap_s, blocks=blocks)]))[-1]


@pytest.mark.parametrize(
    ("off_ms", "on_ms", "word"),
    [((10, 12, 14), (12.9, 10, 14.2), "[green]met"), ((10, 12, 14), (10.8, 13, 10), "[yellow]missed")],
)
def test_each_window_is_compared_with_the_one_beside_it(
    off_ms: tuple[float, ...], on_ms: tuple[float, ...], word: str
) -> None:
    """The machine may be slower for a while; the medians of all windows would say the opposite in both cases."""
    windows = [window(OFF, each / 1000) for each in off_ms] + [window(ON, each / 1000, blocks=1) for each in on_ms]
    assert word in lines(rows("model", windows))[-1]


def test_another_text_beside_prefetches_is_an_error() -> None:
    found = rows("model", [window(OFF, 0.010), window(ON, 0.010, text="coffee", blocks=1)])
    assert [row["equal"] for row in found] == [True, False]
    assert "FAILED" in lines(found)[-1]


def test_one_arm_alone_gives_no_verdict() -> None:
    assert len(lines(rows("model", [window(OFF, 0.010)]))) == 1


def test_texts_that_may_differ_are_not_judged() -> None:
    found = rows("model", [window(OFF, 0.01), window(ON, 0.01, text="coffee", blocks=1)], compare=False)
    assert [row["equal"] for row in found] == [None, None]
    assert not any("FAILED" in line for line in lines(found))
