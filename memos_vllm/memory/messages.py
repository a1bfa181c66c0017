"""Chat messages as clients send them: what the user said last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any


def last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user message; empty where there is none, or only images and the like."""
    for message in reversed(messages):
        if message.get("role") == "user":
            return _text(message.get("content"))
    return ""


def last_user_message(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which message that was, for provenance: its role, its place in the conversation and a digest of its text."""
    for place in range(len(messages) - 1, -1, -1):
        if messages[place].get("role") == "user":
            text = _text(messages[place].get("content")).encode("utf-8", "surrogatepass")
            return {"role": "user", "message": place, "digest": hashlib.blake2b(text, digest_size=16).hexdigest()}
    return {}


def _text(content: Any) -> str:
    """A string, or a list of parts of which the text parts count."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
    return "\n".join(text for text in texts if isinstance(text, str))
