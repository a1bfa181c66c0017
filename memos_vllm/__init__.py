"""Memos: long-term memory for a served model, as a vLLM plugin.

``register`` is the entry point ``memos`` of ``vllm.general_plugins``. vLLM calls it in every process,
before the command line is parsed. Nothing heavy is imported here: a server that does not ask for
``--plugin memos`` pays for one look at its arguments, and stays what it was.
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Offers ``--plugin`` where the command line mentions it; joins in where a parent process said so."""
    from memos_vllm import activation

    if activation.is_active():
        from memos_vllm.integration import plugin

        plugin.activate()
    elif activation.is_mentioned():
        from memos_vllm.integration import flag

        flag.offer()
