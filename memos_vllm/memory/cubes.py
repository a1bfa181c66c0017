"""A memory as a MemCube: one unit with header and payload (MemOS, arXiv 2507.03724, section 4.2).

The header's three parts are the paper's; the payload has the text, and what was made of it: scenes,
whose KV holds it, and memories that were derived from it, such as adapters.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from memos_vllm.core import lifecycle
from memos_vllm.core.lifecycle import Aging
from memos_vllm.memory import claims, links, tables
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserReader


def cube(user: UserReader, record: MemoryRecord, aging: Aging, now: datetime) -> dict[str, Any]:
    """As JSON."""
    usage = user.usage(record.id)
    flat = record.as_json()
    events = list(user.events(record.id))
    last_used_at = usage.last_used_at or record.created_at
    strength_s = lifecycle.strength_s(aging, usage.uses, record.priority)
    return {
        "id": record.id,
        "header": {
            "descriptive": _part(flat, "type", "created_at", "updated_at", "valid_from", "tags", "session", "origin"),
            "governance": {
                **_part(flat, "tenant", "user", "state", "sensitivity", "priority", "pinned", "expires_at"),
                "due_at": usage.due_at.isoformat() if usage.due_at else None,
                "log": [event.as_json() for event in events],
            },
            "behavioural": {
                **_part(flat, "version", "supersedes", "superseded_by", "valid_to"),
                "said": record.uses,
                "uses": usage.uses,
                "last_used_at": last_used_at.isoformat(),
                "retention": lifecycle.retention((now - last_used_at).total_seconds(), strength_s),
                "fingerprint": claims.text_key(record.text).hex(),
            },
        },
        "payload": {
            "text": record.text,
            "scenes": _distinct(event.detail["scene"] for event in events if event.detail and "scene" in event.detail),
            "derived": _distinct(
                link.source for link in links.of(user, record.id, end=tables.TO, type=links.DERIVED_FROM)
            ),
        },
        "links": [link.as_json() for link in links.of(user, record.id)],
        "versions": [_part(old.as_json(), "version", "updated_at") for old in user.versions(record.id)],
    }


def _part(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
