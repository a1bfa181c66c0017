"""The contract of outside sources: what is recalled beside memory, and never becomes one.

A source of your own is a class with these members, given to ``gathering.Sources``. What it finds is quoted in
the late part of one prompt, with its citation, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from memos_vllm.config import SourceUser
from memos_vllm.memory.results import Passage
from memos_vllm.types import Principal


class Source(Protocol):
    @property
    def name(self) -> str:
        """As it is cited; no two sources have the same."""

    @property
    def deadline_s(self) -> float:
        """How long a chat waits for it."""

    def serves(self, who: Principal) -> bool:
        """Whether this user may be told what it says. Must not block."""

    def search(self, query: str, top_k: int) -> Sequence[Passage]:
        """The best passages for a user's words, best first, at most ``top_k``.

        Runs in a thread beside others. What comes after the deadline is thrown away, and nothing ends the
        thread, so a source bounds its own time.

        Raises:
            SourceError: it cannot be searched now. The chat goes on without, and the source is left alone for
                a while.
        """

    def status(self) -> dict[str, Any]:
        """For operators, as JSON. Must not block. ``problems``, which quotes what stands in the source, is told to
        users whom it serves; all else to everybody."""


def is_for(users: Literal["all"] | Iterable[SourceUser], who: Principal) -> bool:
    if users == "all":
        return True
    return any(user.tenant == who.tenant and user.user in (None, who.user) for user in users)  # type: ignore[union-attr]
