"""What the engine knows of scenes: what finished requests have shown."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from memos_vllm.integration import salts
from memos_vllm.integration.tag_index import TagIndex
from memos_vllm.types import BlockKey

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

MAX_KNOWN_BLOCKS = 1_000_000
"""Blocks over all known scenes; about 200 bytes each. The scenes used least recently are forgotten first."""


_TAILS = 2
"""One alone may be an answer that was generated anew."""


class SceneState(StrEnum):
    UNKNOWN = "unknown"
    """No finished request has shown what the scene is."""
    ABSENT = "absent"
    """In no tier; only a prefill can bring it."""
    STORED = "stored"
    """Off the GPU, at least in part."""
    LOADING = "loading"
    READY = "ready"
    """Every block is in the GPU's prefix cache."""


class Prefetch(StrEnum):
    """What became of the last word that a scene is expected."""

    NONE = "none"
    """It is not expected."""
    ACCEPTED = "accepted"
    """Its blocks are on their way."""
    DEFERRED = "deferred"
    """They are not: others are worth more, too much is on its way, a request has the scene, or no tier holds them."""
    COMPLETED = "completed"
    FAILED = "failed"
    """A block did not load; it is tried again when the scene is expected anew, and else computed by its request."""


@dataclass(slots=True)
class Shown:
    """What is kept of the request that showed a scene: as much as publishing its blocks takes."""

    block_hashes: list[Any]
    cache_salt: str | None
    lora_request: LoRARequest | None


@dataclass(slots=True, eq=False)
class Scene:
    scene_id: str
    request: Shown | Request
    keys: list[BlockKey]
    """One per full block."""
    hashes: list[bytes]
    """vLLM's hashes with group id, one per full block."""
    tag: bytes
    """Whose it is (``store.tags``)."""
    num_shown_blocks: int
    """With the tail that was left out of ``keys``, since no later request is expected to have it."""
    tails: tuple[int, ...] = ()
    """Blocks at the end of what was shown that the next request did not have, of the last two that came."""

    @property
    def num_blocks(self) -> int:
        return len(self.keys)

    def num_shared_blocks(self, request: Request) -> int:
        """Leading blocks that a request has in common with what was shown."""
        num_shared = 0
        for ours, theirs in zip(self.request.block_hashes[: self.num_shown_blocks], request.block_hashes, strict=False):
            if ours != theirs:
                break
            num_shared += 1
        return num_shared

    def arrived(self, num_shared_blocks: int) -> None:
        """A request has so many blocks of it. Without any it is about something else, and says nothing of the tail."""
        if num_shared_blocks:
            self.tails = (*self.tails[1 - _TAILS :], self.num_shown_blocks - num_shared_blocks)


@dataclass(slots=True)
class KnownScenes:
    """By id, the one that was shown least recently first.

    Args:
        max_blocks: over all scenes.
        keep_requests: vLLM's events of cached blocks tell tokens and more; without them hashes are enough.
    """

    keep_requests: bool
    max_blocks: int = MAX_KNOWN_BLOCKS
    num_blocks: int = 0
    _scenes: OrderedDict[str, Scene] = field(default_factory=OrderedDict)
    _by_tag: TagIndex = field(default_factory=TagIndex)

    def __len__(self) -> int:
        return len(self._scenes)

    def __contains__(self, scene_id: str) -> bool:
        return scene_id in self._scenes

    def __iter__(self) -> Iterator[Scene]:
        return iter(self._scenes.values())

    def get(self, scene_id: str) -> Scene | None:
        return self._scenes.get(scene_id)

    def show(self, scene_id: str, request: Request, keys: Sequence[BlockKey]) -> Scene:
        """The request's full blocks are what the scene is from now on, without a tail that never comes again.

        What was recalled for one question stands before it in the prompt, and in no later one: all behind it is
        then other blocks. The length of such a tail is taken to be that of the last two, the shorter one.
        """
        known = self._scenes.get(scene_id)
        tails = () if known is None else known.tails
        self.remove(scene_id)
        block_hashes = list(request.block_hashes[: len(keys)])
        shown = request if self.keep_requests else Shown(block_hashes, request.cache_salt, request.lora_request)
        num_blocks = max(1, len(keys) - min(tails)) if len(tails) == _TAILS else len(keys)
        hashes = [make_block_hash_with_group_id(of, 0) for of in block_hashes[:num_blocks]]
        tag = salts.tag_of(request.cache_salt, request.lora_request)
        scene = Scene(scene_id, shown, list(keys[:num_blocks]), hashes, tag, len(keys), tails)
        self._scenes[scene_id] = scene
        self._by_tag.add(scene_id, tag)
        self.num_blocks += scene.num_blocks
        return scene

    def remove(self, scene_id: str) -> None:
        if (scene := self._scenes.pop(scene_id, None)) is not None:
            self.num_blocks -= scene.num_blocks
            self._by_tag.remove(scene_id, scene.tag)

    def with_tag(self, part: bytes) -> list[Scene]:
        """Those that go when an owner or an adapter is deleted."""
        return [self._scenes[scene_id] for scene_id in self._by_tag.find(part)]

    def overdue(self) -> str | None:
        """The scene to forget next, if there are too many blocks."""
        if self.num_blocks <= self.max_blocks or len(self._scenes) < 2:
            return None
        return next(iter(self._scenes))
