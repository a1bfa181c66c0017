"""Tags: whom stored KV belongs to, so that a deletion finds it.

A tag is the digest of its owner, 32 bytes; KV that a LoRA adapter computed has the adapter's digest
behind it, so it goes with either.
"""

from __future__ import annotations

from collections.abc import Iterable

PART_BYTES = 32


def parts(tag: bytes) -> frozenset[bytes]:
    """The tag itself and everything by whose deletion its KV goes."""
    return frozenset((tag, tag[:PART_BYTES], tag[PART_BYTES:] or tag))


def with_part(found: Iterable[bytes], part: bytes) -> set[bytes]:
    """Of these tags, those that go when ``part`` is deleted. Cheap for many equal ones."""
    return {tag for tag in set(found) if part in parts(tag)}
