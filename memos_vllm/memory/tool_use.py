"""What a conversation shows of tools: how the ones that were called are to be called, and what was done with them.

    tool schema   name, description and parameters of a tool that was called; one memory for each name
    trajectory    a task in the user's words, and the calls that were made for it, with the start of their results

A request of an agent's loop repeats all calls so far, so a trajectory grows: the longer one is a new version
of the shorter. One that has a password or a key in it is not kept, or grows no more. Neither goes into a
prompt by itself, for what a tool answers is not the user's word and may be written to mislead a model;
search finds both, and a pin puts one into prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from memos_vllm.memory import claims, credentials
from memos_vllm.memory.messages import last_user_place, text_of
from memos_vllm.memory.records import MemoryRecord
from memos_vllm.memory.transactions import UserWriter

MAX_TASK_CHARS = 500
MAX_ARGUMENTS_CHARS = 500
MAX_RESULT_CHARS = 200
MAX_SCHEMA_CHARS = 20_000
MAX_STEPS = 50

Message = Mapping[str, Any]


def steps(messages: Sequence[Message]) -> list[str]:
    """A line for each call after the last user message that has its result, in the order of calls."""
    after = messages[last_user_place(messages) + 1 :]
    results = {
        str(message.get("tool_call_id")): text_of(message.get("content"))
        for message in after
        if message.get("role") == "tool"
    }
    lines = [
        f"{name}({_start(arguments, MAX_ARGUMENTS_CHARS)}) -> {_start(results[call_id], MAX_RESULT_CHARS)}"
        for call_id, name, arguments in _calls(after)
        if call_id in results
    ]
    return lines[:MAX_STEPS]


def trajectory(messages: Sequence[Message], num_steps: int | None = None) -> str | None:
    """The text of a trajectory, or of its first steps; None where no call has its result."""
    lines = steps(messages)[:num_steps]
    place = last_user_place(messages)
    if not lines or place < 0:
        return None
    task = _start(text_of(messages[place].get("content")), MAX_TASK_CHARS)
    return "\n".join([f"Task: {task}", *(f"{number}. {line}" for number, line in enumerate(lines, 1))])


def schemas(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name to text of each tool that was called after the last user message."""
    called = {name for _, name, _ in _calls(messages[last_user_place(messages) + 1 :])}
    found = {}
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, Mapping) or function.get("name") not in called:
            continue
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False, sort_keys=True)
        text = f"Tool {function['name']}: {function.get('description') or 'no description'}\nParameters: {parameters}"
        if len(text) <= MAX_SCHEMA_CHARS and claims.tool_of(text) == function["name"]:
            found[str(function["name"])] = text
    return found


def keep(
    user: UserWriter,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    origin: Mapping[str, Any],
    now: datetime,
) -> list[MemoryRecord]:
    """Stores what the last turn shows of tools; what is known already is left as it is."""
    kept = []
    for name, text in schemas(messages, tools).items():
        kept.append(_put(user, "tool_schema", text, _of_type(user, claims.tool_key(name), "tool_schema"), origin, now))
    if (text := trajectory(messages)) is not None and not credentials.are_in(text):
        shorter = (trajectory(messages, number) for number in range(len(steps(messages)), 0, -1))
        known = (_of_type(user, claims.text_key(each), "trajectory") for each in shorter if each)
        kept.append(_put(user, "trajectory", text, next((each for each in known if each), None), origin, now))
    return kept


def _put(
    user: UserWriter, type: str, text: str, known: MemoryRecord | None, origin: Mapping[str, Any], now: datetime
) -> MemoryRecord:
    if known is None:
        values = {"session": origin.get("session"), "origin": {**origin, "rule": type}}
        return user.insert(now, text=text, type=type, pinned=False, tags=(), **values)
    if known.text == text or known.state == "frozen":
        return known
    return user.change(known, now, text=text)


def _of_type(user: UserWriter, key: bytes, type: str) -> MemoryRecord | None:
    return next((record for record in user.holders(key) if record.type == type), None)


def _calls(messages: Sequence[Message]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call."""
    found = []
    for message in messages:
        for call in message.get("tool_calls") or () if message.get("role") == "assistant" else ():
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                found.append((str(call.get("id")), function["name"], _json(function.get("arguments") or "")))
    return found


def _json(arguments: Any) -> str:
    """JSON as clients send it, or what vLLM has read of it."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)


def _start(text: str, num_chars: int) -> str:
    """In one line, cut at its end."""
    line = " ".join(text.split())
    return line if len(line) <= num_chars else line[: num_chars - 1] + "…"
