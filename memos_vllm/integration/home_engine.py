"""Which of several data-parallel engines serves a user: always the same one, where his KV is.

Each engine has a prefix cache, tiers and scenes of its own, and vLLM spreads requests by load alone: of N engines
the one that gets a request would have its KV one time in N. So a request with memory goes to its user's *home*
unless it would have to queue there while another engine has room. The home follows from the user's name by
rendezvous hashing (Thaler and Ravishankar, 1998): every API process finds the same one, users spread evenly, and
with another number of engines only those move whose home came or went.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from memos_vllm.integration import engine_channel
from memos_vllm.types import Principal

if TYPE_CHECKING:
    from starlette.requests import Request
    from vllm.engine.protocol import EngineClient

RANK_HEADER = "x-data-parallel-rank"
"""By which vLLM lets a request name its engine."""

MAX_AHEAD = 4
"""By how many requests more than elsewhere the queue at home may be longer; computing the KV anew costs
about as much as waiting for a few others. What vLLM knows of queues is up to 0.1 s old."""


def home_of(who: Principal, num_engines: int) -> int:
    """The user's engine, from 0 on."""
    name = f"{len(who.tenant)}:{who.tenant}{who.user}"

    def weight(engine: int) -> bytes:
        return hashlib.blake2b(f"{engine}|{name}".encode(), digest_size=8).digest()

    return max(range(num_engines), key=weight)


class HomeEngines:
    """Of one server's users."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def __len__(self) -> int:
        """How many engines there are."""
        return engine_channel.num_engines(self._engine)

    def of(self, who: Principal) -> int:
        return home_of(who, len(self))

    def route(self, request: Request, who: Principal) -> None:
        """Has vLLM send a chat request to its user's home; one that names an engine itself goes there."""
        if len(self) == 1 or RANK_HEADER in request.headers:
            return
        home = self.of(who)
        if not self._is_overrun(home):
            # The list that `request.headers` reads: vLLM's handler gets this very request.
            request.scope["headers"].append((RANK_HEADER.encode(), str(home).encode()))

    def _is_overrun(self, home: int) -> bool:
        """Whether the queue there is so long that vLLM had better choose."""
        counts = getattr(self._engine.engine_core, "lb_engines", ())  # type: ignore[attr-defined]
        waiting = [each[0] for each in counts]
        return len(waiting) == len(self) and waiting[home] > min(waiting) + MAX_AHEAD
