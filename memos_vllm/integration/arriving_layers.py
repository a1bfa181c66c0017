"""Worker side of loads in groups of layers: which requests may run already, and what their passes still wait for.

A request is reported to vLLM when the first group of all its loads is there and everything else of it is in host memory
(``store.layer_groups``). The scheduler side then names those loads in every step until they have ended, and the first
pass of which they are part waits for each group before the first layer that reads it. Later work comes behind that
pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from memos_vllm.store.layer_groups import LayerGroup
from memos_vllm.store.ops import Result


class ArrivingLayers:
    """Without groups nothing ever arrives in parts.

    Args:
        groups: of the loads.
        planes: each layer's, by number; layers that share their KV have the same.
    """

    def __init__(self, groups: Sequence[LayerGroup] = (), planes: Mapping[str, Sequence[int]] | None = None) -> None:
        group_of_plane = [number for number, group in enumerate(groups) for _ in range(group.num_planes)]
        self._all = range(len(groups))
        self._groups = {
            name: sorted({group_of_plane[plane] for plane in numbers}) for name, numbers in (planes or {}).items()
        }
        self._begun: set[int] = set()
        """Loads with their first group, that have not ended."""
        self._reported: set[int] = set()
        """Those of them whose requests were reported."""
        self._failed: set[int] = set()
        """Those that failed after that, and that no pass had read."""
        self._known: set[int] = set()
        self._missing: dict[int, set[int]] = {}
        """Load to the groups that no pass has waited for."""

    def begun(self, op_ids: Iterable[int]) -> None:
        """The first group of these loads has landed."""
        self._begun.update(op_ids)

    def ended(self, results: Iterable[Result]) -> None:
        """These operations have ended.

        Raises:
            RuntimeError: one failed on the device after a pass has read it.
        """
        for result in results:
            if not result.ok and result.op_id in self._reported:
                if result.op_id in self._known:
                    raise RuntimeError(f"the KV of a running request did not arrive: {result.error}")
                self._failed.add(result.op_id)
            self._begun.discard(result.op_id)
            self._reported.discard(result.op_id)

    def may_run(self, op_ids: set[int]) -> bool:
        """Whether a request that waits for these operations, which have not ended, may run; if so, it is reported."""
        if not op_ids <= self._begun:
            return False
        self._reported |= op_ids
        return True

    def expect(self, op_ids: Iterable[int]) -> None:
        """The coming pass reads these loads.

        Raises:
            RuntimeError: one of them has failed; the scheduler did not know of it yet.
        """
        known = set(op_ids)
        if not known.isdisjoint(self._failed):
            raise RuntimeError("the KV of a request that is about to run did not arrive: the device refused a copy")
        for op_id in known - self._known:
            self._missing[op_id] = set(self._all)
        self._known = known

    @property
    def is_whole(self) -> bool:
        """Whether no pass has anything to wait for."""
        return not self._missing

    def take(self, layer: str) -> Iterator[tuple[int, int]]:
        """Loads and groups that a pass waits for before this layer: each once."""
        return self._take(self._groups.get(layer, self._all))

    def take_all(self) -> Iterator[tuple[int, int]]:
        """The same for all layers."""
        return self._take(self._all)

    def _take(self, groups: Iterable[int]) -> Iterator[tuple[int, int]]:
        for op_id, missing in list(self._missing.items()):
            for group in missing.intersection(groups):
                missing.discard(group)
                yield op_id, group
            if not missing:
                del self._missing[op_id]
