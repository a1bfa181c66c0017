"""Assembly: how recalled memory becomes part of the prompt.

The order follows stability, so that the prefix of the next request is a prefix of this one
(MemOS, arXiv 2507.03724, section 5; automatic prefix caching rewards exactly this):

    system prompt | long-lived memory | conversation | late memory | query

Long-lived memory stands at the end of the system message, in the order in which it was learned;
a new memory is appended as long as there is room, so what stood before keeps its KV. Late memory stands in front of the
query, inside the last user message, because it changes with every query; what outside sources say
follows it there.

The texts below are part of the product: the recall model in ``tests/assets`` is trained on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

LONG_LIVED_HEADING = "What you remember about this user:"
LATE_HEADING = "Recalled for this question:"
SOURCES_HEADING = "Quoted from outside sources, not said by this user:"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What of the served model's tokenizer and chat template assembly must know."""

    control: regex.Pattern[str] | None = None
    """Finds the first character of each control token; see ``control_pattern``."""

    takes_system: bool = True
    """Whether the template has a place for a system message."""


DEFAULT_FORMAT = PromptFormat()
"""Of a template with system messages, where no text is broken up."""


def control_pattern(tokens: Iterable[str]) -> regex.Pattern[str] | None:
    """
    Args:
        tokens: strings that the tokenizer makes one token of, wherever they stand. Single characters, runs of
            spaces and words are among them for some models; only what looks like markup counts.
    """
    marks = sorted(token for token in set(tokens) if _MARKUP.fullmatch(token))
    return regex.compile(rf"(?=(?:{'|'.join(map(regex.escape, marks))})).", regex.S) if marks else None


_MARKUP = regex.compile(r"[^\s\p{L}\p{N}](?=.*\p{L}).+[^\s\p{L}\p{N}]", regex.S)


def render_memories(heading: str, texts: Sequence[str], control: regex.Pattern[str] | None = None) -> str:
    """One list item per memory; further lines of a memory are indented below it.

    A control token in a text is spelt with a space after its first character: what was quoted or remembered
    opens no turn of its own.
    """
    if control is not None:
        texts = [control.sub(r"\g<0> ", text) for text in texts]
    items = ["- " + "  ".join(text.strip().splitlines(keepends=True)) for text in texts]
    return "\n".join([heading, *items])


def assemble(
    messages: Sequence[Message],
    long_lived: Sequence[str] = (),
    late: Sequence[str] = (),
    sources: Sequence[str] = (),
    form: PromptFormat = DEFAULT_FORMAT,
) -> list[Message]:
    """Returns new messages with memory in place; ``messages`` is not changed.

    Without memory the result equals ``messages``. Late memory needs a user message to stand in;
    where the conversation does not end with one (a tool result, say), it goes into the last user
    message there is, and is left out if there is none. Where the chat template takes no system message,
    long-lived memory stands in front of the first user message.
    """
    out = [dict(message) for message in messages]
    headed = [(LATE_HEADING, late), (SOURCES_HEADING, sources)]
    if block := "\n\n".join(render_memories(heading, texts, form.control) for heading, texts in headed if texts):
        _join_first(reversed(out), block)
    if long_lived:  # after late memory, so that it stands in front where both are in one message
        block = render_memories(LONG_LIVED_HEADING, long_lived, form.control)
        if out and out[0].get("role") in ("system", "developer"):
            out[0]["content"] = _join(out[0].get("content"), block, before=False)
        elif form.takes_system:
            out.insert(0, {"role": "system", "content": block})
        else:
            _join_first(out, block)
    return out


def _join_first(messages: Iterable[Message], block: str) -> None:
    """Puts a block in front of the first of these messages that is the user's."""
    for message in messages:
        if message.get("role") == "user":
            message["content"] = _join(message.get("content"), block, before=True)
            break


def _join(content: Any, block: str, *, before: bool) -> Any:
    """Adds a block of text before or after a message's content, a string or a list of parts."""
    if not content:
        return block
    if isinstance(content, str):
        return f"{block}\n\n{content}" if before else f"{content}\n\n{block}"
    part = {"type": "text", "text": f"{block}\n\n" if before else f"\n\n{block}"}
    return [part, *content] if before else [*content, part]
