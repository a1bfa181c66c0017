"""Assembly: how recalled memory becomes part of the prompt.

The order follows stability, so that the prefix of the next request is a prefix of this one
(MemOS, arXiv 2507.03724, section 5; automatic prefix caching rewards exactly this):

    system prompt | long-lived memory | conversation | late memory | query

Long-lived memory stands at the end of the system message, in the order in which it was learned;
a new memory is appended, so what stood before keeps its KV. Late memory stands in front of the
query, inside the last user message, because it changes with every query; what outside sources say
follows it there.

The texts below are part of the product: the recall model in ``tests/assets`` is trained on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONG_LIVED_HEADING = "What you remember about this user:"
LATE_HEADING = "Recalled for this question:"
SOURCES_HEADING = "Quoted from outside sources, not said by this user:"

Message = dict[str, Any]


def render_memories(heading: str, texts: Sequence[str]) -> str:
    """One list item per memory; further lines of a memory are indented below it."""
    items = ["- " + text.strip().replace("\n", "\n  ") for text in texts]
    return "\n".join([heading, *items])


def assemble(
    messages: Sequence[Message],
    long_lived: Sequence[str] = (),
    late: Sequence[str] = (),
    sources: Sequence[str] = (),
) -> list[Message]:
    """Returns new messages with memory in place; ``messages`` is not changed.

    Without memory the result equals ``messages``. Late memory needs a user message to stand in;
    where the conversation does not end with one (a tool result, say), it goes into the last user
    message there is, and is left out if there is none.
    """
    out = [dict(message) for message in messages]
    if long_lived:
        block = render_memories(LONG_LIVED_HEADING, long_lived)
        if out and out[0].get("role") in ("system", "developer"):
            out[0]["content"] = _join(out[0].get("content"), block, before=False)
        else:
            out.insert(0, {"role": "system", "content": block})
    headed = [(LATE_HEADING, late), (SOURCES_HEADING, sources)]
    if block := "\n\n".join(render_memories(heading, texts) for heading, texts in headed if texts):
        for message in reversed(out):
            if message.get("role") == "user":
                message["content"] = _join(message.get("content"), block, before=True)
                break
    return out


def _join(content: Any, block: str, *, before: bool) -> Any:
    """Adds a block of text before or after a message's content, a string or a list of parts."""
    if not content:
        return block
    if isinstance(content, str):
        return f"{block}\n\n{content}" if before else f"{content}\n\n{block}"
    part = {"type": "text", "text": f"{block}\n\n" if before else f"\n\n{block}"}
    return [part, *content] if before else [*content, part]
