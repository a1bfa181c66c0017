"""Which memories go into a prompt, and in which order.

Long-lived memory must keep the prompt's prefix stable, so its order never depends on the query and
it only grows at the end:

1. Pinned memories, then the user's other facts, preferences and profile; each in order of creation.
2. A memory that alone exceeds the whole budget never stands there. That depends on nothing but
   itself, so leaving it out moves no other memory. Search still finds it.
3. Each of the two runs stops at its first memory that does not fit into what is left. Going around
   it would move the later ones as soon as it fits.

So a new fact leaves the list as it was or is appended. A pinned memory is worth a new prefix: it
goes in front of the facts, behind the pinned ones, and may push facts out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.results import Hit, Passage, Recall
from memos_vllm.memory.search import UserIndex
from memos_vllm.memory.transactions import UserReader
from memos_vllm.types import MemoryId

CountTokens = Callable[[str], int]


class Budget:
    """Tokens, as the list items that ``assembly`` renders."""

    def __init__(self, num_tokens: int, count_tokens: CountTokens):
        self.num_tokens = num_tokens
        self._left = num_tokens
        self._count_tokens = count_tokens

    def cost(self, text: str) -> int:
        return self._count_tokens(f"- {text}\n")

    @property
    def taken(self) -> int:
        return self.num_tokens - self._left

    def take(self, cost: int) -> bool:
        if cost > self._left:
            return False
        self._left -= cost
        return True


def long_lived(user: UserReader, index: UserIndex, budget: Budget, now: datetime) -> list[MemoryRecord]:
    """See the module's docstring for the rule."""
    pinned = chosen(user, index.pinned(), budget, now)
    return pinned + chosen(user, index.standing(), budget, now)


def chosen(user: UserReader, ids: Iterable[MemoryId], budget: Budget, now: datetime) -> list[MemoryRecord]:
    """One run; of a session's frozen ids too, whose texts may have grown since."""
    found = []
    for memory_id in ids:
        record = user.get(memory_id)
        if record is None or not record.is_recallable(now):  # None: deleted since the transaction began
            continue
        cost = budget.cost(record.text)
        if cost > budget.num_tokens:
            continue
        if not budget.take(cost):
            break
        found.append(record)
    return found


def fitting(hits: Iterable[Hit], budget: Budget) -> list[Hit]:
    """The hits that fit. Nothing here need be stable, so a large one does not block the others."""
    return [hit for hit in hits if budget.take(budget.cost(hit.record.text))]


def with_sources(
    recall: Recall, passages: Sequence[Passage], num_tokens: int, share: float, count_tokens: CountTokens
) -> Recall:
    """What sources say beside what is remembered, both within the budget for late memory.

    Args:
        num_tokens: the whole budget.
        share: of it for sources at most; memory has what they leave.
    """
    for_sources = Budget(int(num_tokens * share), count_tokens)
    quoted = tuple(passage for passage in passages if for_sources.take(for_sources.cost(passage.quoted)))
    if not quoted:
        return recall
    for_memory = Budget(num_tokens - for_sources.taken, count_tokens)
    return replace(recall, late=tuple(fitting(recall.late, for_memory)), sources=quoted)
