"""Memos' log among vLLM's: with its time, its level and its process, and at the level that vLLM logs at.

vLLM sets up the logger ``vllm`` alone. What others log reaches Python's last resort, which prints warnings bare and
nothing below them.
"""

from __future__ import annotations

import logging

import vllm.envs

LOGGER = "memos_vllm"


class _ToVllm(logging.Handler):
    """Hands on at the moment of logging: vLLM sets its handlers up after plugins are loaded, in some versions."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if not theirs.propagate:  # else the operator's own set-up, at the root, has the record anyway
            theirs.handle(record)


def join_vllm() -> None:
    """May run twice."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(handler, _ToVllm) for handler in logger.handlers):
        logger.addHandler(_ToVllm())
        if logger.level == logging.NOTSET:
            logger.setLevel(vllm.envs.VLLM_LOGGING_LEVEL)
