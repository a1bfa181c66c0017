"""What an owner uses after what: by the scene, and by the part that scenes play for all owners.

used       this use followed the owner's last one: learned
triggers   what usually follows this one, of this owner: to be raised
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from memos_vllm.core.scenes import Scene
from memos_vllm.core.transitions import Transitions
from memos_vllm.core.waiting import Trigger

MAX_TRIGGERS = 4
"""Scenes that one use raises, by scene and by role each."""


class Following:
    """
    Args:
        max_owners: whose last use is remembered; among them users of shared scenes, who have none of their own.
    """

    def __init__(self, max_owners: int) -> None:
        self._max_owners = max_owners
        self._transitions = Transitions()
        self._roles: dict[tuple[str | None, str], str] = {}  # owner and role -> the latest such scene
        self._last_use: dict[str | None, tuple[str, float]] = {}  # owner -> scene and time, the latest last

    def add(self, scene: Scene) -> None:
        self._roles[scene.owner, scene.role] = scene.id

    def remove(self, scene: Scene) -> None:
        self._transitions.forget(scene.id)
        if self._roles.get((scene.owner, scene.role)) == scene.id:
            del self._roles[scene.owner, scene.role]
        if (owner := scene.owner) in self._last_use and self._last_use[owner][0] == scene.id:
            del self._last_use[owner]

    def owners(self) -> set[str]:
        """Who has used something."""
        return {owner for owner in self._last_use if owner}

    def forget_owner(self, owner: str) -> None:
        """When the owner's scenes are removed."""
        self._last_use.pop(owner, None)

    def used(
        self, scene: Scene, owner: str, now: float, known: Callable[[str], Scene | None]
    ) -> Iterator[tuple[str, Trigger]]:
        """Learns what this use followed; then the scenes that usually follow it, and why.

        Args:
            known: the scene of an id, if there is one.
        """
        role = f"role {scene.role}"
        if owner in self._last_use:
            before_id, at = self._last_use[owner]
            before = known(before_id)
            if before is not None and before.id != scene.id:
                if before.owner is not None or scene.owner is None:  # else it would outlive its owner
                    self._transitions.follow(before_id, scene.id, now - at)
                if before.role != scene.role:
                    self._transitions.follow(f"role {before.role}", scene.role, now - at)
        self._last_use.pop(owner, None)
        self._last_use[owner] = (scene.id, now)
        if len(self._last_use) > self._max_owners:
            del self._last_use[next(iter(self._last_use))]
        self._transitions.use(scene.id)
        self._transitions.use(role)
        return self._triggers(scene.id, role, owner, now)

    def _triggers(self, scene_id: str, role: str, owner: str, now: float) -> Iterator[tuple[str, Trigger]]:
        raised = {scene_id}
        for follower in self._transitions.followers(scene_id)[:MAX_TRIGGERS]:
            raised.add(follower.key)
            yield follower.key, Trigger(scene_id, now, follower.probability, max(0.05, follower.delay_s))
        for follower in self._transitions.followers(role)[:MAX_TRIGGERS]:
            target = self._roles.get((owner, follower.key)) or self._roles.get((None, follower.key))
            if target is not None and target not in raised:
                yield target, Trigger(role, now, follower.probability, max(0.05, follower.delay_s))

    def state(self) -> dict[str, Any]:
        """As the predictor's state has it."""
        return {
            "transitions": self._transitions.state(),
            "last_use": ([owner, *use] for owner, use in self._last_use.items()),
        }

    def restore(self, transitions: Iterable[Sequence[Any]], last_use: Iterable[Sequence[Any]]) -> None:
        self._transitions.restore(transitions)
        self._last_use = {owner: (scene_id, at) for owner, scene_id, at in last_use}
