"""Memos' log stands among vLLM's lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from memos_vllm.integration import logs


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Of vLLM's logger, set up as vLLM does it."""
    theirs, ours, handler = logging.getLogger("vllm"), logging.getLogger(logs.LOGGER), Lines()
    before = theirs.handlers, theirs.propagate, ours.handlers, ours.level
    theirs.handlers, theirs.propagate, ours.handlers = [handler], False, []
    ours.setLevel(logging.NOTSET)
    logs.join_vllm()
    yield handler.lines
    theirs.handlers, theirs.propagate, ours.handlers = before[:3]
    ours.setLevel(before[3])


def test_what_memos_logs_is_seen_once_and_as_vllms_is(lines: list[str]) -> None:
    logs.join_vllm()
    logging.getLogger("memos_vllm.integration.plugin").info("this engine is one of %d", 2)
    logging.getLogger("memos_vllm.memory").warning("the disk is full")
    logging.getLogger("memos_vllm.memory").debug("no")
    assert lines == ["INFO this engine is one of 2", "WARNING the disk is full"]


def test_an_operators_own_set_up_of_logging_gets_it_by_the_root_alone(
    lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("vllm").propagate = True
    logging.getLogger("memos_vllm.memory").warning("the disk is full")
    assert lines == [] and caplog.messages == ["the disk is full"]
