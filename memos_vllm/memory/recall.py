"""Which memories go into a prompt, and in which order.

Long-lived memory stands at the start of the prompt, whose KV is worth keeping from session to session. So its
order never depends on the query, it is chosen anew at a session's start only, and the choice changes rarely:

1. Pinned memories, in order of creation.
2. Then the user's other statements, in order of creation. As long as all of them fit, a new one is appended
   and nothing moves.
3. Where they do not fit, profile and preferences have the room first and facts what is left; of each the
   newest. The oldest that stands is not the first that fits, but one of those that take the oldest quarter of
   the room: the one whose id has the smallest hash. It stays that one while new statements come, until it does
   not fit; so the prefix changes once in many statements, and not with each of them.
4. What does not fit by itself is gone around: pinned memories, and statements of more than an eighth of their
   room. The first smaller statement that does not fit ends its run; the next one to fit would change with
   every new one.

A memory that alone exceeds the whole budget never stands there. What does not stand is recalled late, for a
question that it answers. A pinned memory is worth a new prefix: it goes in front of the statements, behind the
pinned ones, and may push statements out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from memos_vllm.memory.filters import Filter
from memos_vllm.memory.records import LASTING_TYPES, STANDING_TYPES, MemoryRecord
from memos_vllm.memory.results import Hit, Passage, Recall
from memos_vllm.memory.search import UserIndex
from memos_vllm.memory.transactions import UserReader
from memos_vllm.types import MemoryId

CountTokens = Callable[[str], int]

_MAX_PASSED = 16
"""So many that do not fit are gone around; each has its tokens counted."""


class Budget:
    """Tokens, as the list items that ``assembly`` renders."""

    def __init__(self, num_tokens: int, count_tokens: CountTokens):
        self.num_tokens = num_tokens
        self._left = num_tokens
        self._count_tokens = count_tokens

    def cost(self, text: str) -> int:
        return self._count_tokens(f"- {text}\n")

    @property
    def left(self) -> int:
        return self._left

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
    lasting = newest(user, index.standing(LASTING_TYPES), budget, now)
    facts = newest(user, index.standing(STANDING_TYPES - LASTING_TYPES), budget, now)
    return pinned + sorted([*lasting, *facts], key=lambda record: record.id)


def chosen(user: UserReader, ids: Iterable[MemoryId], budget: Budget, now: datetime) -> list[MemoryRecord]:
    """Those that fit, in their order; of a session's frozen ids too, whose texts may have grown since."""
    found, passed = [], 0
    for record, cost in _recallable(user, ids, budget, now):
        if budget.take(cost):
            found.append(record)
        elif (passed := passed + 1) > _MAX_PASSED:
            break
    return found


def succeeded(user: UserReader, ids: Sequence[MemoryId]) -> list[MemoryId]:
    """A session's frozen ids; what was corrected since gives its place to the correction.

    The prefix changes there anyway, and a user who said where he lives now lives somewhere in his other sessions, too.
    """
    places: dict[MemoryId, None] = dict.fromkeys(ids)
    found: dict[MemoryId, None] = {}
    for memory_id in ids:
        record = user.get(memory_id)
        while record is not None and record.superseded_by is not None:
            record = user.get(record.superseded_by)
        if record is None or (record.id != memory_id and record.id in places):
            continue
        if record.id == memory_id or record.pinned or record.type in STANDING_TYPES:
            found[record.id] = None
    return list(found)


def newest(user: UserReader, ids: Iterable[MemoryId], budget: Budget, now: datetime) -> list[MemoryRecord]:
    """A run of statements that ends with the newest; newest first, as ``ids`` are."""
    room, left, passed, is_full = budget.left, budget.left, 0, False
    run: list[tuple[MemoryRecord, int]] = []
    for record, cost in _recallable(user, ids, budget, now):
        if cost <= left:
            run.append((record, cost))
            left -= cost
        elif is_full := cost * 8 <= room or (passed := passed + 1) > _MAX_PASSED:
            break
    if is_full:
        del run[_start(run, left, room) + 1 :]
    for _, cost in run:
        budget.take(cost)
    return [record for record, _ in run]


def _start(run: Sequence[tuple[MemoryRecord, int]], left: int, room: int) -> int:
    """The place of the oldest one that is to stand, so that at most a quarter of the room stays empty."""
    places = []
    for place in reversed(range(len(run))):
        places.append(place)
        left += run[place][1]
        if left * 4 > room:
            break
    return min(places, key=lambda place: _hash(run[place][0].id), default=-1)


def _hash(memory_id: MemoryId) -> bytes:
    return hashlib.blake2b(memory_id.encode(), digest_size=8).digest()


def _recallable(
    user: UserReader, ids: Iterable[MemoryId], budget: Budget, now: datetime
) -> Iterable[tuple[MemoryRecord, int]]:
    """With what each costs; without those that never stand."""
    for memory_id in ids:
        record = user.get(memory_id)
        if record is None or not record.is_recallable(now):  # None: deleted since the transaction began
            continue
        if (cost := budget.cost(record.text)) <= budget.num_tokens:
            yield record, cost


def num_left_out(user: UserReader, index: UserIndex, standing: Collection[MemoryId], now: datetime) -> int:
    """How many more would stand in the prompt if there were room for all."""
    allows = index.allowing(Filter(for_prompt=True), now)
    stated = sum(allows(memory_id) for memory_id in index.standing() if memory_id not in standing)
    pinned = (user.get(memory_id) for memory_id in index.pinned() if memory_id not in standing)
    return stated + sum(record is not None and record.is_recallable(now) for record in pinned)


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
