"""How the served model's prompts are written, as far as assembly must know: its control tokens, its system message."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from memos_vllm.memory.assembly import PromptFormat, control_pattern

logger = logging.getLogger(__name__)

_PROBE = "memos-probe"


def prompt_format_of(tokenizer: Any, args: Namespace) -> PromptFormat:
    tokens = [*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens]
    return PromptFormat(control_pattern(tokens), _takes_system(tokenizer, getattr(args, "chat_template", None)))


def _takes_system(tokenizer: Any, chat_template: str | None) -> bool:
    """False where a system message makes the template fail, or is left out, and a user's alone does not.

    Some templates (Gemma's first two) refuse the role.
    """
    template = _loaded(chat_template) if chat_template else None
    user = {"role": "user", "content": "hello"}
    if not _renders(tokenizer, template, [{"role": "user", "content": _PROBE}]):
        return True  # nothing is known of it: as most do
    takes = _renders(tokenizer, template, [{"role": "system", "content": _PROBE}, user])
    if not takes:
        logger.info("the chat template takes no system message: memory goes in front of the first user message")
    return takes


def _loaded(chat_template: str) -> str:
    """``--chat-template`` is a file or the template itself."""
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return chat_template


def _renders(tokenizer: Any, template: str | None, messages: list[dict[str, Any]]) -> bool:
    more = {"chat_template": template} if template else {}
    try:
        return _PROBE in str(tokenizer.apply_chat_template(messages, tokenize=False, **more))
    except Exception:  # a template raises whatever it likes
        return False
