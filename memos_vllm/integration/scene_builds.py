"""Building, in the engine: which piece of which expected scene a prefill should compute next.

A scene whose next block no tier holds can only be computed. The engine says what, since it knows what is
missing; an API process (``builder``) runs it as an ordinary request. Per piece:

    claim    only while no request is in the engine; one piece at a time, whoever asks
    wait     a piece that meets a live request stays in the queue until it is alone (``must_wait``)
    finish   its blocks are saved like any other's; what a tier holds behind them is loaded

A piece is one forward pass, so that is the longest that a live request can wait for one.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from memos_vllm.integration import salts
from memos_vllm.integration.known_scenes import Scene
from memos_vllm.integration.scene_table import SceneTable
from memos_vllm.integration.tag_index import TagIndex
from memos_vllm.store.ops import Op

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

BUILD_PARAM = "memos_build"
"""Key in ``kv_transfer_params`` by which a request says which claim it fulfils."""

CLAIM_TTL_S = 30.0
"""After this another API process may claim: the one that did is gone."""

MAX_TOKEN_IDS = 16_000_000
"""Over all known scenes, 4 bytes each. A scene that is forgotten here can be loaded, but not built."""


@dataclass(slots=True)
class _Content:
    """What computing a scene takes, beside its blocks."""

    token_ids: array[int]
    salt: str
    lora_request: LoRARequest | None
    tag: bytes
    """Whose it is (``store.tags``)."""
    num_built_blocks: int = 0
    """Since the scene was shown, or a request used it. A scene is computed once for a use that may never come,
    not again and again where no tier has room to keep it."""


@dataclass(slots=True)
class _Claim:
    build_id: str
    planner: str
    content: _Content
    expires_at: float
    num_cached_blocks: int | None = None
    """Blocks that the piece's request found when it was scheduled; None until then."""


@dataclass(slots=True)
class BuildTotals:
    """Forward passes spent on scenes that no request had asked for, since the start."""

    build_requests: int = 0
    built_blocks: int = 0


@dataclass(slots=True)
class SceneBuilds:
    """Owned by the engine's loop.

    Args:
        max_step_tokens: what the scheduler computes in one step at most.
        max_scene_tokens: a longer prompt is refused by vLLM.
    """

    table: SceneTable
    block_size: int
    max_step_tokens: int
    max_scene_tokens: int
    now: Callable[[], float] = time.monotonic
    totals: BuildTotals = field(default_factory=BuildTotals)
    _contents: OrderedDict[str, _Content] = field(default_factory=OrderedDict)
    _by_tag: TagIndex = field(default_factory=TagIndex)
    _num_token_ids: int = 0
    _claim: _Claim | None = None
    _live: set[str] = field(default_factory=set)
    """Ids of all requests in the engine that are no builds."""

    # -- what scenes consist of -----------------------------------------------------------------

    def show(self, scene_id: str, request: Request, num_blocks: int) -> None:
        """A scene is from now on the first blocks of this request."""
        self._drop(scene_id)
        if request.mm_features or request.prompt_embeds is not None or request.prompt_token_ids is None:
            return  # token ids alone would compute something else
        assert request.cache_salt is not None
        token_ids = array("I", request.all_token_ids[: num_blocks * self.block_size])
        tag = salts.tag_of(request.cache_salt, request.lora_request)
        self._contents[scene_id] = _Content(token_ids, request.cache_salt, request.lora_request, tag)
        self._by_tag.add(scene_id, tag)
        self._num_token_ids += len(token_ids)
        while self._num_token_ids > MAX_TOKEN_IDS and len(self._contents) > 1:
            self._drop(next(iter(self._contents)))

    def used(self, scene_id: str) -> None:
        """A request came that has the scene as its prefix."""
        if (content := self._contents.get(scene_id)) is not None:
            content.num_built_blocks = 0

    def forget(self, tag: bytes) -> None:
        """What a deleted salt or adapter made is not computed again: of what is not here no piece is claimed."""
        for scene_id in self._by_tag.find(tag):
            self._drop(scene_id)

    def give_up(self, tag: bytes) -> None:
        """What cannot be computed now counts as built: no piece of it is claimed until its scene is shown anew, or
        a request used it."""
        for scene_id in self._by_tag.find(tag):
            content = self._contents[scene_id]
            content.num_built_blocks = len(content.token_ids) // self.block_size

    def clear(self) -> None:
        for scene_id in list(self._contents):
            self._drop(scene_id)

    def _drop(self, scene_id: str) -> None:
        if (old := self._contents.pop(scene_id, None)) is not None:
            self._num_token_ids -= len(old.token_ids)
            self._by_tag.remove(scene_id, old.tag)

    # -- claims ---------------------------------------------------------------------------------

    def claim(self, planner: str, piece_tokens: int) -> dict[str, Any]:
        """The next piece, for this API process to run.

        Returns:
            ``busy``: whether to ask again soon. ``piece``: None, or its ``build`` id, ``scene``, ``token_ids``
            from the scene's first token on, ``salt``, and ``lora`` (arguments of a ``LoRARequest``, or None).
        """
        claim, now = self._claim, self.now()
        if self._live or (claim is not None and claim.planner != planner and now < claim.expires_at):
            return {"busy": True, "piece": None}
        self._claim = None
        for scene in self.table.expected:
            content = self._contents.get(scene.scene_id)
            if content is None or content.num_built_blocks >= scene.num_blocks:
                continue
            if (end := self._end_of_piece(scene, piece_tokens)) is None:
                continue
            self._claim = _Claim(secrets.token_hex(8), planner, content, now + CLAIM_TTL_S)
            return {
                "busy": False,
                "piece": {
                    "build": self._claim.build_id,
                    "scene": scene.scene_id,
                    "token_ids": content.token_ids[: end * self.block_size].tolist(),
                    "salt": content.salt,
                    "lora": lora_arguments(content.lora_request),
                },
            }
        return {"busy": False, "piece": None}

    def _end_of_piece(self, scene: Scene, piece_tokens: int) -> int | None:
        """End of the first gap that only a forward pass can fill, in blocks, at most a piece on from its start.

        None: there is none, or no room for it.
        """
        last = min(scene.num_blocks, (self.max_scene_tokens - 1) // self.block_size)
        if not last or self.table.is_resident(scene, last - 1):
            return None  # a chain is given up from its end; looking at every block would stop the engine for long
        first = 0
        while first < last and self.table.is_resident(scene, first):
            first += 1
        num_blocks = max(1, min(piece_tokens, self.max_step_tokens) // self.block_size)
        end = first
        while end < min(last, first + num_blocks) and self.table.is_absent(scene, end):
            end += 1
        return end if first < end and self.table.has_room(scene, first, end) else None

    # -- requests -------------------------------------------------------------------------------

    def added(self, request: Request) -> None:
        if not self.is_build(request):
            self._live.add(request.request_id)

    def is_build(self, request: Request) -> bool:
        """A client may send the parameter, but not with the id of a claim and a salt of ours."""
        build_id = (request.kv_transfer_params or {}).get(BUILD_PARAM)
        return self._claim is not None and build_id == self._claim.build_id and salts.is_memory_salt(request.cache_salt)

    def must_wait(self, request: Request) -> bool:
        """Whether a request is a piece that would share a step with a live request."""
        return bool(self._live) and self.is_build(request)

    def scheduled(self, request: Request, num_cached_blocks: int) -> None:
        if self.is_build(request):
            assert self._claim is not None
            self._claim.num_cached_blocks = num_cached_blocks

    def finished(self, request: Request, num_computed_tokens: int) -> list[Op]:
        """A request ended, well or not; returns loads of what follows the blocks that a piece computed."""
        if not self.is_build(request):
            self._live.discard(request.request_id)
            return []
        claim, self._claim = self._claim, None
        assert claim is not None
        if claim.num_cached_blocks is None or num_computed_tokens <= claim.num_cached_blocks * self.block_size:
            return []
        num_built_blocks = num_computed_tokens // self.block_size - claim.num_cached_blocks
        claim.content.num_built_blocks += num_built_blocks
        self.totals.build_requests += 1
        self.totals.built_blocks += num_built_blocks
        return self.table.advance()

    def unknown(self, scene_ids: Sequence[str]) -> list[str]:
        """Of these scenes, those to be declared again: the engine was reset, or had no room for them."""
        return [scene_id for scene_id in scene_ids if scene_id not in self._contents]

    def status(self) -> dict[str, int]:
        return asdict(self.totals)


def lora_arguments(lora_request: LoRARequest | None) -> dict[str, Any] | None:
    """What makes the same ``LoRARequest`` in another process."""
    if lora_request is None:
        return None
    return {name: getattr(lora_request, name) for name in ("lora_name", "lora_int_id", "lora_path")}
