"""Tags: whom stored KV belongs to, so that a deletion finds it.

A tag is the digest of its owner, 32 bytes; KV that a LoRA adapter computed has the adapter's digest
behind it, so it goes with either.
"""

from __future__ import annotations

PART_BYTES = 32


def parts(tag: bytes) -> frozenset[bytes]:
    """The tag itself and everything by whose deletion its KV goes."""
    return frozenset((tag, tag[:PART_BYTES], tag[PART_BYTES:] or tag))
