"""How much one user may have in the store, so that he does not fill it for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memos_vllm.config import MemoryConfig
from memos_vllm.errors import LimitReached
from memos_vllm.memory.transactions import UserReader, UserWriter


@dataclass(frozen=True, slots=True)
class UserLimits:
    """None: no limit."""

    memories: int | None = None
    size_bytes: int | None = None

    @classmethod
    def of(cls, config: MemoryConfig) -> UserLimits:
        return cls(config.max_user_memories, config.max_user_bytes)

    def check(self, user: UserWriter) -> None:
        """To be called at the end of a write. What takes nothing more is never refused, also above a limit.

        Raises:
            LimitReached: the write, which is then taken back as a whole, would exceed a limit.
        """
        had, has = user.held_before, user.holdings
        if not user.has_added:
            return
        if self.memories is not None and has.memories > max(self.memories, had.memories):
            raise self._reached(f"{has.memories} memories", f"memory.max_user_memories ({self.memories})")
        if self.size_bytes is not None and has.size_bytes > max(self.size_bytes, had.size_bytes):
            what = f"{has.size_bytes} bytes of memories with their history, links and snapshots"
            raise self._reached(what, f"memory.max_user_bytes ({self.size_bytes})")

    def check_number(self, memories: int, had: int) -> None:
        """Before a write: whether so many memories can be those of a user who has ``had`` of them now.

        Raises:
            LimitReached: they cannot.
        """
        if self.memories is not None and memories > max(self.memories, had):
            raise self._reached(f"{memories} memories", f"memory.max_user_memories ({self.memories})")

    def has_room(self, user: UserReader) -> bool:
        """Whether the user may have one more memory, however small."""
        held = user.holdings
        return not (
            (self.memories is not None and held.memories >= self.memories)
            or (self.size_bytes is not None and held.size_bytes >= self.size_bytes)
        )

    def as_json(self) -> dict[str, Any]:
        return {"max_memories": self.memories, "max_bytes": self.size_bytes}

    @staticmethod
    def _reached(what: str, limit: str) -> LimitReached:
        return LimitReached(
            f"with this the user would have {what}, more than {limit} allows; nothing of it was stored. Delete "
            "memories or documents (GET /v1/memories/usage says what there is), or have the operator raise the limit"
        )
