"""Chat messages as clients send them: what the user said last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any


def last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user message; empty where there is none, or only images and the like."""
    place = last_user_place(messages)
    return text_of(messages[place].get("content")) if place >= 0 else ""


def last_user_message(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which message that was, for provenance: its role, its place in the conversation and a digest of its text."""
    place = last_user_place(messages)
    if place < 0:
        return {}
    text = text_of(messages[place].get("content")).encode("utf-8", "surrogatepass")
    return {"role": "user", "message": place, "digest": hashlib.blake2b(text, digest_size=16).hexdigest()}


def last_user_place(messages: Sequence[Mapping[str, Any]]) -> int:
    """Its index; -1 where there is none."""
    return max((place for place, message in enumerate(messages) if message.get("role") == "user"), default=-1)


def text_of(content: Any) -> str:
    """A string, or a list of parts of which the text parts count."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
    return "\n".join(text for text in texts if isinstance(text, str))
