"""Figures that the documents promise are those of the code."""

from __future__ import annotations

import pytest

from memos_vllm.config import MemosConfig
from memos_vllm.core import hints, lifecycle, predictor, residency, trust
from memos_vllm.integration import fitting, home_engine, planner, prefetch_room, scene_table, scheduler_side, state
from memos_vllm.integration import worker_side as worker
from memos_vllm.memory import extraction
from memos_vllm.memory.documents import formats, isolated, library, markdown, pdf
from memos_vllm.store import disk_index, transfer
from tests.conftest import ROOT

MEMORY = MemosConfig().memory
KIB, MIB, GIB = 2**10, 2**20, 2**30

FIGURES = [
    ("PREDICTION", "probability of use within 10 s x prefill time saved", predictor.HORIZON_S, 10),
    ("PREDICTION", "One user has at most a quarter of the scenes", planner.OWNER_SHARE, 0.25),
    ("PREDICTION", "by the weight of four hints at most", trust.WEIGHT, 4),
    ("PREDICTION", "Announcing a use for ten minutes without one counts too", hints.REPEATED_S, 600),
    ("PREDICTION", "look at their ranking within a second", planner.REPLAN_INTERVAL_S, 1),
    ("PREDICTION", "unless more than four requests more wait there", home_engine.MAX_AHEAD, 4),
    ("PREDICTION", "only if it is worth 1.25 times as much", residency.SWAP_GAIN, 1.25),
    ("PREDICTION", "A step plans at most 128 blocks", prefetch_room.STARTED_BLOCKS, 128),
    ("PREDICTION", "gets to know at most 1,024", scene_table.TRACKED_BLOCKS, 1024),
    ("PREDICTION", "bounded by a quarter of the pool", prefetch_room.IN_FLIGHT_SHARE, 0.25),
    ("PREDICTION", "by what the tiers bring within 0.1 s", prefetch_room.IN_FLIGHT_S, 0.1),
    ("PREDICTION", "they end, one per second at least", scheduler_side.COPY_PATIENCE_S, 1),
    ("PREDICTION", "a prefetch now takes 5 % of a core's time", transfer.PREFETCH_SHARE, 0.05),
    ("PREDICTION", "in pieces of 1 MiB", transfer.PREFETCH_PIECE_BYTES, MIB),
    ("PREDICTION", "what it expects of others 0.3 s after a turn began", planner.FIRST_TOKEN_S, 0.3),
    ("ARCHITECTURE", "`max_tokens`, or 256 tokens", fitting.ANSWER_TOKENS, 256),
    ("ARCHITECTURE", "copy ends for 1 s (`scheduler_side.PREFETCH_PATIENCE_S`)", scheduler_side.PREFETCH_PATIENCE_S, 1),
    ("ARCHITECTURE", "waits up to 2 ms for a result (`worker_side.IDLE_WAIT_S`)", worker.IDLE_WAIT_S, 0.002),
    ("ARCHITECTURE", "at most 1 GiB waits for that", disk_index.MAX_LEAVING_BYTES, GIB),
    ("MEMORY", "step of `priority` (-3 to 3)", (lifecycle.PRIORITIES[0], lifecycle.PRIORITIES[-1]), (-3, 3)),
    ("MEMORY", "within `memory.long_lived_tokens` (1,024)", MEMORY.long_lived_tokens, 1024),
    ("MEMORY", "a text of more than 2,000 characters", extraction.LONG_TEXT_CHARS, 2000),
    ("MEMORY", "with at most 2 GiB and `read_timeout_s`", isolated.MAX_MEMORY_BYTES, 2 * GIB),
    ("MEMORY", "text of 64 KiB", isolated.IN_PLACE_BYTES[formats.TEXT], 64 * KIB),
    ("MEMORY", "HTML of 16 KiB", isolated.IN_PLACE_BYTES[formats.HTML], 16 * KIB),
    ("MEMORY", "Markdown of 2 KiB", isolated.IN_PLACE_BYTES[formats.MARKDOWN], 2 * KIB),
    ("MEMORY", "Two are read at a time", state.NUM_DOCUMENT_THREADS, 2),
    ("MEMORY", "lists and quotes nested beyond 100", markdown.MAX_NESTING, 100),
    ("MEMORY", "`max_bytes`, 10,000 pieces", library.MAX_PIECES, 10_000),
    ("MEMORY", "10,000 pieces or 10,000 pages", pdf.MAX_PAGES, 10_000),
]


@pytest.mark.parametrize(("document", "sentence", "of_the_code", "promised"), FIGURES, ids=[row[1] for row in FIGURES])
def test_a_figure_is_that_of_the_code(document: str, sentence: str, of_the_code: object, promised: object) -> None:
    text = " ".join((ROOT / "docs" / f"{document}.md").read_text().split())
    assert sentence in text, "the document says it otherwise now"
    assert of_the_code == promised
