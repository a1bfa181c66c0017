"""LoCoMo (snap-research/LoCoMo): dated conversations, and questions with the turns that answer them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}

_DATE = "%I:%M %p on %d %B, %Y"
_EVIDENCE = re.compile(r"D:?(\d+):(\d+)")


class DataError(Exception):
    """The file cannot be read as LoCoMo."""


@dataclass(frozen=True, slots=True)
class Turn:
    id: str
    """``D3:7``: the seventh turn of the third session."""

    session: str
    said_at: datetime
    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    category: int
    evidence: tuple[int, ...]
    """Places of turns in the conversation."""


@dataclass(frozen=True, slots=True)
class Conversation:
    name: str
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]


@dataclass(slots=True)
class Repairs:
    """What was done to evidence that is no plain list of ids."""

    repaired: int = 0
    """Several ids in one string, or a malformed one that can mean one turn only."""

    dropped: int = 0
    """Ids of turns that do not exist."""

    questions_without: int = 0
    """Questions left out, since no evidence is left."""


def read(path: str | os.PathLike[str], captions: bool = False) -> tuple[list[Conversation], Repairs]:
    """
    Args:
        captions: whether a turn's text ends with the caption of the picture that it shows.

    Raises:
        DataError: no such file, or not this format.
    """
    try:
        samples = json.loads(Path(path).read_text(encoding="utf-8"))
        repairs = Repairs()
        conversations = [_conversation(sample, captions, repairs) for sample in samples]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no LoCoMo data with 'conversation' and 'qa': {error!r}") from error
    if not conversations:
        raise DataError(f"{path} has no conversations")
    return conversations, repairs


def _conversation(sample: Mapping[str, Any], captions: bool, repairs: Repairs) -> Conversation:
    turns = _turns(sample["conversation"], captions)
    places = {turn.id: place for place, turn in enumerate(turns)}
    questions = []
    for row in sample["qa"]:
        evidence = _evidence(row["evidence"], places, repairs)
        if evidence:
            questions.append(Question(str(row["question"]), int(row["category"]), evidence))
        else:
            repairs.questions_without += 1
    return Conversation(str(sample.get("sample_id", "conversation")), tuple(turns), tuple(questions))


def _turns(conversation: Mapping[str, Any], captions: bool) -> list[Turn]:
    numbers = sorted(int(key.split("_")[1]) for key in conversation if re.fullmatch(r"session_\d+", key))
    turns = []
    for number in numbers:
        said_at = datetime.strptime(conversation[f"session_{number}_date_time"], _DATE).replace(tzinfo=UTC)
        for row in conversation[f"session_{number}"]:
            text = row["text"]
            if captions and row.get("blip_caption"):
                text = f"{text} [shows {row['blip_caption']}]"
            turns.append(Turn(row["dia_id"], f"session {number}", said_at, row["speaker"], text))
    return turns


def _evidence(given: list[str], places: Mapping[str, int], repairs: Repairs) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for text in given:
        ids = [f"D{int(session)}:{int(turn)}" for session, turn in _EVIDENCE.findall(text)]
        if ids != [text]:
            repairs.repaired += bool(ids)
            repairs.dropped += not ids
        for each in ids:
            if each in places:
                found[places[each]] = None
            else:
                repairs.dropped += 1
    return tuple(found)
