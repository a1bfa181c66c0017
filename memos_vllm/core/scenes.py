"""A scene, and the events that tell when it is used.

A *scene* is a token prefix that a coming request will probably have. Events are small and immutable;
the predictor takes them in the order of their time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SceneKind(StrEnum):
    """Scenes of one kind share their learned habits."""

    CONVERSATION = "conversation"
    """Goes on: each use makes it longer."""
    SESSION_START = "session_start"
    """What a user's next session starts with: system prompt and long-lived memory."""
    PREFIX = "prefix"
    """Shared by many requests that differ behind it."""
    ADAPTER = "adapter"
    """Of which nothing is known but the adapter that its first request will have."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a prediction is about. The same id with another size replaces the older description."""

    id: str
    owner: str | None = None
    """Whose habits apply; None for what belongs to nobody."""
    kind: SceneKind = SceneKind.CONVERSATION
    num_blocks: int = 1
    size_bytes: int = 1
    prefill_s: float = 1.0
    """Saved if the scene is ready when it is used."""
    label: str = ""
    """The same for scenes that play the same part for different owners, e.g. ``profile`` or a document's name."""

    @property
    def role(self) -> str:
        return self.label or self.kind.value


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """A request that has the scene as its prefix arrived: the scene is used, and busy until ``TurnEnded``."""

    scene_id: str
    owner: str | None = None
    """Who uses it, where the scene belongs to nobody."""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    """Of the prompt, what this turn added: the user's message."""


@dataclass(frozen=True, slots=True)
class TurnEnded:
    """The answer is complete; the wait for the next use begins. Without a ``TurnStarted`` it counts as a use."""

    scene_id: str
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    """As in ``TurnStarted``; None where that told already, or where it follows from the turn before."""
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The application opened the session: a use of the scene is near."""

    scene_id: str


@dataclass(frozen=True, slots=True)
class Typing:
    scene_id: str


@dataclass(frozen=True, slots=True)
class WillUse:
    """The application says so. ``in_s`` 0 means as soon as possible."""

    scene_id: str
    in_s: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class ToolRunning:
    """The model called a tool; the conversation goes on when it returns."""

    scene_id: str
    expected_s: float | None = None


@dataclass(frozen=True, slots=True)
class Closed:
    """Will not be used again, as far as the application knows."""

    scene_id: str


Event = TurnStarted | TurnEnded | SessionOpened | Typing | WillUse | ToolRunning | Closed
"""Time that passes without an event needs none: see ``Predictor.advance``."""
