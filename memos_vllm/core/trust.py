"""How often what somebody says comes true, and how soon: of an owner, of his tenant, of all.

    all  <--  tenants, each with the weight of WEIGHT events at most  <--  owners, each likewise

Each is shrunk towards the next as if it had seen ``PRIOR_EVENTS`` already. So an owner is believed as his tenant is,
then as he deserves; and however much one client says that does not come true, he moves what others start with by no
more than that weight. A tenant is what the credential names (an application, say), an owner one of its users.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PRIOR_EVENTS = 4.0
WEIGHT = 4.0

MEMORY_EVENTS = 256.0
"""A record that has seen more forgets half: clients are mended."""

MAX_OWNERS = 50_000
"""And as many tenants; those that were new first are forgotten first. Some 200 bytes per kind of hint."""


@dataclass(slots=True)
class Record:
    """Of one kind of hint."""

    used: float = 0.0
    unused: float = 0.0
    log_delays: float = 0.0
    """Sum of the natural logarithms of the delays of ``delays`` uses, in seconds."""
    delays: float = 0.0

    def probability(self, prior: float) -> float:
        return (self.used + PRIOR_EVENTS * prior) / (self.used + self.unused + PRIOR_EVENTS)

    def log_delay(self, prior: float) -> float:
        return (self.log_delays + PRIOR_EVENTS * prior) / (self.delays + PRIOR_EVENTS)

    def told(self) -> Record:
        """What the record above sees of this one."""
        share = WEIGHT / max(WEIGHT, self.used + self.unused)
        of_delays = WEIGHT / max(WEIGHT, self.delays)
        return Record(self.used * share, self.unused * share, self.log_delays * of_delays, self.delays * of_delays)

    def minus(self, other: Record) -> Record:
        return Record(
            self.used - other.used,
            self.unused - other.unused,
            self.log_delays - other.log_delays,
            self.delays - other.delays,
        )

    def add(self, seen: Record) -> None:
        """What is taken back may be forgotten already."""
        self.used, self.unused = max(0.0, self.used + seen.used), max(0.0, self.unused + seen.unused)
        self.log_delays, self.delays = self.log_delays + seen.log_delays, max(0.0, self.delays + seen.delays)
        if self.used + self.unused > MEMORY_EVENTS:
            self.used /= 2
            self.unused /= 2
        if self.delays > MEMORY_EVENTS:
            self.log_delays /= 2
            self.delays /= 2


_Table = dict[str, dict[str, Record]]


class Trust:
    """
    Args:
        whole: of all, by kind: what is believed before anything happened.
    """

    def __init__(self, whole: dict[str, Record]) -> None:
        self.whole = whole
        self._tenants: _Table = {}
        self._owners: _Table = {}

    def probability(self, kind: str, owner: str | None) -> float:
        whole = self.whole[kind]
        probability = whole.used / (whole.used + whole.unused)
        for record in self._of(kind, owner):
            probability = record.probability(probability)
        return probability

    def delay_s(self, kind: str, owner: str | None) -> float:
        log_delay = self.whole[kind].log_delays / self.whole[kind].delays
        for record in self._of(kind, owner):
            log_delay = record.log_delay(log_delay)
        return math.exp(log_delay)

    def learn(self, kind: str, owner: str | None, delay_s: float | None) -> None:
        """What was said came true after ``delay_s``, or (None) did not."""
        seen = Record(unused=1.0) if delay_s is None else Record(1.0, 0.0, math.log(delay_s), 1.0)
        tenant, name = _names(owner)
        for record in (_record(self._owners, name, kind), _record(self._tenants, tenant, kind), self.whole[kind]):
            before = record.told()
            record.add(seen)
            seen = record.told().minus(before)

    def _of(self, kind: str, owner: str | None) -> Iterator[Record]:
        """From the tenant down, as far as there is one."""
        for table, name in zip((self._tenants, self._owners), _names(owner), strict=True):
            if (record := table.get(name, {}).get(kind)) is not None:
                yield record

    def owners(self) -> set[str]:
        """Of whom anything is known."""
        return {owner for owner in self._owners if owner}

    def forget(self, owner: str) -> None:
        """And the tenant, if nothing is known of another of its users."""
        self._owners.pop(owner, None)
        tenant, _ = _names(owner)
        if not any(_names(each)[0] == tenant for each in self._owners):
            self._tenants.pop(tenant, None)

    def state(self) -> Iterator[list[Any]]:
        for level, table in enumerate(({"": self.whole}, self._tenants, self._owners)):
            for name, records in table.items():
                for kind, each in records.items():
                    yield [level, name, kind, each.used, each.unused, each.log_delays, each.delays]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        tables: dict[int, _Table] = {0: {"": self.whole}, 1: self._tenants, 2: self._owners}
        for level, name, kind, *values in state:
            if kind in self.whole:
                tables[level].setdefault(name, {})[kind] = Record(*map(float, values))


def _record(table: _Table, name: str, kind: str) -> Record:
    records = table.get(name)
    if records is None:
        if len(table) >= MAX_OWNERS:
            del table[next(iter(table))]
        records = table[name] = {}
    return records.setdefault(kind, Record())


def _names(owner: str | None) -> tuple[str, str]:
    """The tenant and the owner, whose name is ``tenant/user`` (``types.Principal``); "" is nobody."""
    tenant, is_of_tenant, _ = (owner or "").partition("/")
    return tenant if is_of_tenant else "", owner or ""
