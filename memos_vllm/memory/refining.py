"""Refining: the served model restates what was remembered, under rules that do not trust it.

    wait      a statement that was remembered of a chat waits in the table ``unrefined``
    batch     of one user, the oldest first, as many as the prompt's budget holds
    ask       the caller has a model answer the batch's messages, in JSON of ``SCHEMA``
    judge     each statement names the notes it restates, and has words and numbers from them alone
    keep      by the way of what rules keep: known already, merged, or superseding what it contradicts
    done      the notes wait no longer, in the same transaction

The notes stay as they are. What is made of one follows it: superseded and deleted with it, archived when its
text is changed, sensitive or ending with it (``succession.restated``).
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memos_vllm.config import RefinerConfig
from memos_vllm.memory import analysis, claims, links, times
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.extraction import Extract
from memos_vllm.memory.limits import UserLimits
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.remembering import contradicted, keep, known
from memos_vllm.memory.transactions import UserWriter
from memos_vllm.types import MemoryId, Principal

logger = logging.getLogger(__name__)

SOURCE = "refiner"
"""In the origin of what the model restated."""

MAX_STATEMENTS = 16
_LOOK_AHEAD = 1000
"""Waiting notes that are looked at to choose a batch."""

INSTRUCTIONS = (
    "You keep notes about a user for later conversations. Each note has a number and the day on which the user said "
    "it. Restate what will still matter as short statements that can be understood alone, one fact each, in the "
    "user's own first person, such as: My job is baker. Put dates in place of words such as yesterday. Add nothing "
    "that the notes do not say. Name the notes of each statement. Answer in JSON."
)


class Statement(BaseModel):
    """What the model makes of one note, or of a few."""

    model_config = ConfigDict(extra="forbid")

    sources: list[Annotated[int, Field(ge=1, le=99)]] = Field(min_length=1, max_length=4)
    """Numbers of notes in the prompt, from 1."""

    text: str = Field(min_length=1, max_length=300)
    type: Literal["fact", "preference", "profile"]
    keys: list[Annotated[str, Field(min_length=1, max_length=40)]] = Field(max_length=4)
    """Phrases by which it should be found; kept are those that share a word with it or a note."""

    valid_from: date | None
    """Since when it is true; counts only if a note was said on that day or names it."""


class Refinement(BaseModel):
    """The whole answer."""

    model_config = ConfigDict(extra="forbid")

    statements: list[Statement] = Field(max_length=MAX_STATEMENTS)


SCHEMA: dict[str, Any] = Refinement.model_json_schema()
"""JSON schema of an answer, which the engine enforces; sizes that it lets through are checked again here."""


class Outcome(StrEnum):
    """What became of a statement, or of a whole answer."""

    ACCEPTED = "accepted"
    MERGED = "merged"
    """Nearly the words of a known memory, which took it over."""
    KNOWN = "known"
    INVALID = "invalid"
    """The answer, as a whole, is no JSON of the schema; it may have been cut off."""
    NO_SOURCE = "no_source"
    """It names a note that was not in the prompt."""
    UNGROUNDED = "ungrounded"
    """It shares no word with a note that it names, or has a value or a number that none of them has."""
    OUTDATED = "outdated"
    """Something newer contradicts it."""
    GONE = "gone"
    """A note was deleted, changed or superseded while the model answered."""
    NO_ROOM = "no_room"
    """The user has as much as he may."""
    TOO_LONG = "too_long"
    """A note that alone exceeds the prompt's budget; the model was not asked."""


@dataclass(frozen=True, slots=True)
class Batch:
    who: Principal
    notes: tuple[MemoryRecord, ...]
    left_out: tuple[MemoryId, ...] = ()
    """Notes that are gone, not to be recalled, or end some day, and all of a user who has no room: there is nothing
    to restate."""
    too_long: tuple[MemoryId, ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        lines = [_line(number, note) for number, note in enumerate(self.notes, 1)]
        return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": "".join(lines)}]


@dataclass(slots=True)
class Refining:
    """
    Args:
        count_tokens: with the served model's tokenizer, for the prompt's budget.
        now: the time in UTC; tests set it.

    Raises as ``service.MemoryService``.
    """

    store: Store
    config: RefinerConfig
    count_tokens: Callable[[str], int]
    now: Callable[[], datetime]
    limits: UserLimits = field(default_factory=UserLimits)
    _last: Principal | None = field(default=None, init=False)
    """Whose turn was last: users take turns."""

    def wait(self, user: UserWriter, record: MemoryRecord) -> None:
        """A new statement is to be refined. Documents are left as they are."""
        if self.config.enabled and record.type != "document":
            user.put_row("unrefined", uuid.UUID(record.id).bytes, b"")

    def next_batch(self) -> Batch | None:
        """What to ask about next; None where nothing waits. Without notes it is for ``finish`` alone."""
        waiting = self.store.unrefined(_LOOK_AHEAD)
        if not waiting:
            return None
        users = list(waiting)
        self._last = who = users[(users.index(self._last) + 1) % len(users) if self._last in users else 0]
        notes: list[MemoryRecord] = []
        left_out: list[MemoryId] = []
        too_long: list[MemoryId] = []
        budget = self.config.prompt_tokens - self.count_tokens(INSTRUCTIONS)
        now, used = self.now(), 0
        with self.store.read(who) as user:
            has_room = self.limits.has_room(user)
            for memory_id in waiting[who]:
                note = user.get(memory_id)
                if not has_room or note is None or not note.is_recallable(now) or note.expires_at is not None:
                    left_out.append(memory_id)
                    continue
                cost = self.count_tokens(_line(len(notes) + 1, note))
                if cost > budget:
                    too_long.append(memory_id)
                elif used + cost > budget or len(notes) == MAX_STATEMENTS:
                    break
                else:
                    notes.append(note)
                    used += cost
        return Batch(who, tuple(notes), tuple(left_out), tuple(too_long))

    def finish(self, batch: Batch, answer: str, model: str) -> Counter[Outcome]:
        """Keeps what an answer says, as far as it holds; the batch waits no longer. All or nothing.

        Args:
            answer: of the model to ``batch.messages()``; anything.
            model: its identity, for provenance.
        """
        statements = _parse(answer) if batch.notes else []
        done = [*(note.id for note in batch.notes), *batch.left_out, *batch.too_long]

        def work(user: UserWriter) -> Counter[Outcome]:
            now = self.now()
            outcomes = Counter({Outcome.TOO_LONG: len(batch.too_long)} if batch.too_long else {})
            if statements is None:
                outcomes[Outcome.INVALID] += 1
            for statement in statements or ():
                outcomes[_take(user, batch, statement, model, now, self.limits)] += 1
            for memory_id in done:
                user.delete_row("unrefined", uuid.UUID(memory_id).bytes)
            return outcomes

        outcomes = self.store.write(batch.who, work)
        if refused := {str(each): n for each, n in outcomes.items() if each not in (Outcome.ACCEPTED, Outcome.KNOWN)}:
            logger.info("of what the model restated for %s: %s", batch.who, refused)
        return outcomes


def _line(number: int, note: MemoryRecord) -> str:
    return f"{number}. ({note.said_at.date().isoformat()}) {note.text.strip()}\n"


def _parse(answer: str) -> Sequence[Statement] | None:
    try:
        return Refinement.model_validate_json(answer).statements
    except ValidationError:
        return None


def _take(
    user: UserWriter, batch: Batch, statement: Statement, model: str, now: datetime, limits: UserLimits
) -> Outcome:
    """Judges one statement and keeps it."""
    if max(statement.sources) > len(batch.notes):
        return Outcome.NO_SOURCE
    notes = [batch.notes[number - 1] for number in dict.fromkeys(statement.sources)]
    if not _is_grounded(statement, notes):
        return Outcome.UNGROUNDED
    if any(not _is_same(user.get(note.id), note, now) for note in notes):
        return Outcome.GONE
    if known(user, statement.text, now):
        return Outcome.KNOWN
    if _is_outdated(user, statement, notes, now):
        return Outcome.OUTDATED
    if not limits.has_room(user):
        return Outcome.NO_ROOM
    origin = _origin(statement, notes, model)
    since = _start(statement, notes) or max(note.said_at for note in notes)
    is_remark = statement.type == "fact" and all(note.type == "remark" for note in notes)
    restated = Extract(statement.text, "remark" if is_remark else statement.type, "restated")
    kept = keep(user, restated, origin, now, said=False, valid_from=since)
    if kept.origin.get("source") != SOURCE:
        return Outcome.MERGED
    for note in notes:
        links.connect(user, kept.id, note.id, links.DERIVED_FROM, now)
    return Outcome.ACCEPTED


def _is_grounded(statement: Statement, notes: Sequence[MemoryRecord]) -> bool:
    words = _words(statement.text)
    told = [_words(note.text) for note in notes]
    if any(words.isdisjoint(each) for each in told):
        return False
    claim = claims.claim_of(statement.text)
    if claim is not None and _words(claim.value).isdisjoint(set().union(*told)):
        return False
    return _numbers(statement.text) <= _numbers(" ".join([*(note.text for note in notes), *_times(notes)]))


def _times(notes: Sequence[MemoryRecord]) -> set[str]:
    """Days, months and years on which the notes were said, and those that they name; as terms (``times``)."""
    found: set[str] = set()
    for note in notes:
        found |= times.moment_terms(note.said_at).union(times.mentioned_terms(note.text, note.said_at))
    return found


def _told_keys(statement: Statement, notes: Sequence[MemoryRecord]) -> list[str]:
    """The keys that share a word with the statement or a note; other words would find what nobody said."""
    told = _words(" ".join([statement.text, *(note.text for note in notes)]))
    return [key for key in statement.keys if not _words(key).isdisjoint(told)]


def _words(text: str) -> set[str]:
    """Stems, and the words as they are: the language of a few words is a guess, and so are their stems."""
    return {*analysis.query_terms(text), *analysis.without_stop_words(text).casefold().split()}


def _numbers(text: str) -> set[int]:
    return {int(number) for number in regex.findall(r"\p{Nd}{1,40}", text)}


def _is_same(found: MemoryRecord | None, note: MemoryRecord, now: datetime) -> bool:
    return found is not None and found.version == note.version and found.is_recallable(now)


def _is_outdated(user: UserWriter, statement: Statement, notes: Sequence[MemoryRecord], now: datetime) -> bool:
    since = max(note.created_at for note in notes)
    rivals = contradicted(user, statement.text, now)
    return any(rival.created_at > since and rival.id not in {note.id for note in notes} for rival in rivals)


def _start(statement: Statement, notes: Sequence[MemoryRecord]) -> datetime | None:
    """The model's date where a note was said on that day, or names it."""
    day = statement.valid_from
    if day is None or f"{times.TIME_MARK}{day:%Y-%m-%d}" not in _times(notes):
        return None
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def _origin(statement: Statement, notes: Sequence[MemoryRecord], model: str) -> Mapping[str, Any]:
    """Provenance: the model, the notes, and the messages that they come from."""
    sessions = {note.session for note in notes}
    cause = ("session", "request", "role", "message", "digest")
    return {
        "source": SOURCE,
        "model": model,
        "session": sessions.pop() if len(sessions) == 1 else None,
        "notes": [note.id for note in notes],
        "messages": [{name: note.origin[name] for name in cause if name in note.origin} for note in notes],
        "keys": _told_keys(statement, notes),
    }
