"""Scheduler side of loads in groups of layers: their blocks, which are held, and the passes that read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memos_vllm.integration.held_blocks import HeldBlocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(frozen=True, slots=True)
class _Arriving:
    request_id: str
    block_ids: tuple[int, ...]


class ArrivingLoads:
    """Loads whose requests may run before the loads have ended.

    Later layers are still being written, so the blocks are held, whatever becomes of the requests.
    """

    def __init__(self, held: HeldBlocks) -> None:
        self._held = held
        self._loads: dict[int, _Arriving] = {}

    def __len__(self) -> int:
        return len(self._loads)

    def add(self, op_id: int, request_id: str, block_ids: tuple[int, ...]) -> None:
        """A request may run, and this load of it has not ended."""
        self._held.hold(block_ids)
        self._loads[op_id] = _Arriving(request_id, block_ids)

    def end(self, op_ids: Iterable[int]) -> None:
        """These operations have ended on every rank."""
        for op_id in set(op_ids) & self._loads.keys():
            self._held.release(self._loads.pop(op_id).block_ids)

    def request_of(self, op_id: int) -> str | None:
        """Of a load under way."""
        load = self._loads.get(op_id)
        return None if load is None else load.request_id

    def read_by(self, step: SchedulerOutput) -> tuple[int, ...]:
        """Those of which a step's pass may read blocks: it has to wait for them.

        Another request that shares blocks with one that may run, but does not, has them among its own when it enters a
        pass. Later passes come behind that one.
        """
        if not self._loads:
            return ()
        if step.scheduled_cached_reqs.resumed_req_ids:  # after a preemption, with any blocks
            return tuple(self._loads)
        entering = {block for request in step.scheduled_new_reqs for group in request.block_ids for block in group}
        return tuple(
            op_id
            for op_id, load in self._loads.items()
            if load.request_id in step.num_scheduled_tokens or not entering.isdisjoint(load.block_ids)
        )
