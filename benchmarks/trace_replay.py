"""Replays a trace through a cache of blocks and counts what was ready when it was asked for.

The capacity is that of the prefix cache beside the blocks that running requests hold. A reusable block
that is absent when its request arrives is brought from a lower tier then (*on demand*), in every arm; a
prefetch brings it earlier. Every block was saved to the lower tier once, which costs the same in all arms.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby

from benchmarks.trace_baselines import Belady, BlockCache, Future
from benchmarks.trace_data import Turn
from memos_vllm.core.block_tree import LOADING, RESIDENT
from memos_vllm.core.predictor import Predictor
from memos_vllm.core.residency import ResidencyPolicy
from memos_vllm.core.scenes import Closed, Scene, SceneKind, TurnEnded, TurnStarted, Typing

STEP_S = 1.0
"""How often the engine looks for something to prefetch when nothing happens, and how much the link takes at once."""

KEEP_HORIZON_S = 60.0
"""The predictor's horizon without prefetch. What is given up then does not come back before its request, so one
looks as far as people think; better than the default on most synthetic traces."""

ORACLE_AHEAD_S = 10.0
"""How far ahead the oracle loads; earlier would cost room."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the replay models of a machine."""

    link_gb_per_s: float = 50.0
    """From the lower tier; PCIe 5 x16 as measured."""
    block_bytes: int = 64 * 2**20
    """512 tokens of Llama-3.1-8B in bf16."""
    decode_s_per_token: float = 0.02
    """An answer ends this long after its request, per token."""

    @property
    def blocks_per_s(self) -> float:
        return self.link_gb_per_s * 1e9 / self.block_bytes


@dataclass(slots=True)
class Outcome:
    """Blocks."""

    reusable: int = 0
    ready: int = 0
    on_demand: int = 0
    prefetched: int = 0
    wasted: int = 0
    """Prefetched, and not used before they were given up or the trace ended."""
    late: int = 0
    """On their way when their request came."""

    @property
    def ready_share(self) -> float:
        return self.ready / self.reusable if self.reusable else 0.0

    def asked(self, reusable: int, ready: int, late: int = 0) -> None:
        self.reusable += reusable
        self.ready += ready
        self.late += late
        self.on_demand += reusable - ready - late


def replay_baseline(turns: Sequence[Turn], cache: BlockCache) -> Outcome:
    outcome = Outcome()
    for turn in turns:
        blocks = turn.request.blocks
        outcome.asked(turn.num_reusable, sum(block in cache for block in blocks[: turn.num_reusable]))
        cache.access(blocks)
    return outcome


def replay_oracle(turns: Sequence[Turn], capacity: int, machine: Machine) -> Outcome:
    """Evicts as Belady does and loads the coming requests' blocks in their order, as capacity and link allow."""
    outcome = Outcome()
    future = Future(turn.request.blocks for turn in turns)
    cache = Belady(capacity, future)
    unused: set[int] = set()
    previous_s = turns[0].request.arrival_s
    for index, turn in enumerate(turns):
        budget = int((turn.request.arrival_s - previous_s) * machine.blocks_per_s)
        previous_s = turn.request.arrival_s
        for coming in range(index, len(turns)):
            if turns[coming].request.arrival_s > previous_s + ORACLE_AHEAD_S:
                break
            wanted = [b for b in turns[coming].request.blocks[: turns[coming].num_reusable] if b not in cache]
            wanted = [b for b in wanted if future.next_use(b) == coming]  # not first made by a request before
            if budget < len(wanted) or (len(cache) + len(wanted) > capacity and cache.farthest() <= coming):
                break
            for block in wanted:
                budget -= 1
                outcome.prefetched += 1
                unused.add(block)
                cache.insert(block)
            lost = unused.intersection(cache.shrink())
            outcome.wasted += len(lost)
            unused -= lost
            if budget <= 0:
                break
        blocks = turn.request.blocks
        outcome.asked(turn.num_reusable, sum(block in cache for block in blocks[: turn.num_reusable]))
        unused.difference_update(blocks)
        cache.access(blocks)
        gone = {block for block in unused if block not in cache}
        outcome.wasted += len(gone)
        unused -= gone
    outcome.wasted += len(unused)
    return outcome


_HINT, _ARRIVAL, _STEP = range(3)


class OursReplay:
    """The engine's predictor and residency policy, driven by the trace.

    Args:
        hint_lead_s: how long before a request the application says that its user types; None: it does not.
        predictor: with habits from elsewhere; None: it knows nothing.
        knows_returns: a conversation's last turn closes it, which nobody can know. For a bound.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        capacity: int,
        machine: Machine,
        hint_lead_s: float | None = None,
        predictor: Predictor | None = None,
        prefetch: bool = True,
        knows_returns: bool = False,
    ) -> None:
        self.turns, self.capacity, self.machine = turns, capacity, machine
        self.hint_lead_s, self.prefetch = hint_lead_s, prefetch
        self._last_numbers: dict[int, int] | None = None
        if knows_returns:
            self._last_numbers = {turn.conversation: turn.number for turn in turns}
        if predictor is None:
            predictor = Predictor() if prefetch else Predictor(horizon_s=KEEP_HORIZON_S)
        self.predictor = predictor
        self.policy = ResidencyPolicy(self.predictor, partial_tails=True)
        self.outcome = Outcome()
        self._unused: set[int] = set()  # prefetched
        self._loads: deque[tuple[float, int]] = deque()
        self._link_free_s = 0.0
        self._numbers: dict[int, int] = {}  # conversation -> turns so far

    def run(self) -> Outcome:
        ended: list[tuple[float, int, Turn]] = []
        serial = count()
        for now, kind, turn in self._timeline():
            while ended and ended[0][0] <= now:
                at, _, done = heapq.heappop(ended)
                self._end(done, at)
            self._complete_loads(now)
            if kind == _ARRIVAL:
                self._arrive(turn, now)
                end_s = now + turn.request.output_tokens * self.machine.decode_s_per_token
                heapq.heappush(ended, (end_s, next(serial), turn))
            elif kind == _HINT:
                self._hint(turn, now)
            else:
                self._step(now)
        self.outcome.wasted += len(self._unused)
        return self.outcome

    def _timeline(self) -> Iterator[tuple[float, int, Turn]]:
        """Arrivals and hints in the order of time; a step after each moment that has any, and every ``STEP_S``."""
        events = [(turn.request.arrival_s, _ARRIVAL, i) for i, turn in enumerate(self.turns)]
        if self.hint_lead_s is not None:
            events += [
                (turn.request.arrival_s - self.hint_lead_s, _HINT, i)
                for i, turn in enumerate(self.turns)
                if turn.hinted is not None
            ]
        events.sort()
        some = self.turns[0]
        previous_s = events[0][0]
        for now, group in groupby(events, key=lambda event: event[0]):
            between = previous_s + STEP_S
            while between < now:
                yield between, _STEP, some
                between += STEP_S
            for _, kind, i in group:
                yield now, kind, self.turns[i]
            yield now, _STEP, some
            previous_s = now

    def _arrive(self, turn: Turn, now: float) -> None:
        blocks, reusable = turn.request.blocks, turn.request.blocks[: turn.num_reusable]
        states = [self.policy.state(block) for block in reusable]
        ready, late = states.count(RESIDENT), states.count(LOADING)
        self.outcome.asked(turn.num_reusable, ready, late)
        self._unused.difference_update(reusable)
        missing = len(reusable) - ready - late
        self._link_free_s = max(self._link_free_s, now) + missing / self.machine.blocks_per_s

        if turn.branch is not None:
            shared = turn.num_reusable
            prefix = f"prefix {turn.branch}"
            self.predictor.add(Scene(prefix, None, SceneKind.PREFIX, shared, shared, float(shared)))
            self.policy.track(prefix, blocks[:shared])
            self.predictor.observe(TurnStarted(prefix), now)
            self.predictor.observe(TurnEnded(prefix), now)
        scene = str(turn.conversation)
        self._numbers[turn.conversation] = turn.number
        self.policy.used(scene, turn.num_reusable, now)
        self.predictor.add(Scene(scene, None, SceneKind.CONVERSATION, len(blocks), len(blocks), float(len(blocks))))
        self.predictor.observe(TurnStarted(scene, None, turn.request.prompt_tokens, turn.new_tokens), now)
        self.policy.track(scene, blocks)
        self.policy.used(scene, len(blocks), now)
        self.policy.update()
        self.policy.resident(blocks)
        self._shrink()

    def _end(self, turn: Turn, now: float) -> None:
        """Unless the conversation has gone on already: then the answer took less than we model."""
        if self._numbers[turn.conversation] == turn.number:
            scene = str(turn.conversation)
            self.predictor.observe(TurnEnded(scene, output_tokens=turn.request.output_tokens), now)
            if self._last_numbers is not None and self._last_numbers[turn.conversation] == turn.number:
                self.predictor.observe(Closed(scene), now)

    def _hint(self, turn: Turn, now: float) -> None:
        """An application names the conversation that goes on; for a new one, the prefix that it starts with."""
        prefix = f"prefix {turn.branch}"
        scene = prefix if turn.branch is not None and prefix in self.predictor else str(turn.hinted)
        self.predictor.observe(Typing(scene), now)

    def _step(self, now: float) -> None:
        self.predictor.advance(now)
        self.policy.update()
        self._shrink()
        if not self.prefetch:
            return
        start = max(self._link_free_s, now)
        budget = int((now + STEP_S - start) * self.machine.blocks_per_s)
        if budget <= 0:
            return
        plan = self.policy.plan(budget, self.capacity - self.policy.num_resident)
        self._gave_up(plan.evict)
        self.outcome.prefetched += len(plan.fetch)
        self._unused.update(plan.fetch)
        for number, block in enumerate(plan.fetch, 1):
            self._loads.append((start + number / self.machine.blocks_per_s, block))
        self._link_free_s = start + len(plan.fetch) / self.machine.blocks_per_s

    def _complete_loads(self, now: float) -> None:
        while self._loads and self._loads[0][0] <= now:
            block = self._loads.popleft()[1]
            if self.policy.state(block) == LOADING:
                self.policy.resident([block])

    def _shrink(self) -> None:
        over = self.policy.num_resident - self.capacity
        if over > 0:
            self._gave_up(self.policy.evict(over) or [])

    def _gave_up(self, blocks: Sequence[int]) -> None:
        lost = self._unused.intersection(blocks)
        self.outcome.wasted += len(lost)
        self._unused -= lost


def trained(turns: Sequence[Turn], machine: Machine) -> Predictor:
    """Knows the habits of the whole trace before it begins. For a bound."""
    replay = OursReplay(turns, 1, machine, predictor=Predictor(), prefetch=False)
    replay.run()
    return replay.predictor.fresh()
