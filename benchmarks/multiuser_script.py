"""Who says what, in which order, and how much room it takes: the same for every arm.

A *conversation* is one user with a memory in front. Users take turns in a fixed order, so between
two turns of one user stand the turns of all others, and a pool that holds fewer users has evicted
the first one's blocks by the time he comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from benchmarks import texts
from benchmarks.client import count_tokens
from memos_vllm.memory.assembly import assemble

ROOM_FOR_ANSWER = 12
"""Tokens that an answer may take beyond those generated, in the prompts that follow: its end, and another split."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a run, in tokens unless the name says otherwise.

    Attributes:
        memory_tokens: length of the system message that holds a user's memory.
        query_tokens: length of a question with the template around it.
        max_tokens: of an answer.
        pool_users: how many users' conversations the small pool holds.
    """

    users: int
    turns: int
    memory_tokens: int
    query_tokens: int
    max_tokens: int
    pool_users: int
    block_size: int

    @property
    def longest(self) -> int:
        """Bound on a whole conversation."""
        return self.memory_tokens + self.turns * (self.query_tokens + self.max_tokens + ROOM_FOR_ANSWER)

    @property
    def max_model_len(self) -> int:
        """Also the longest prefill step, so that every arm computes a cold prompt in one piece."""
        return _round_up(self.longest, 512)

    def pool_blocks(self, users: int | None = None) -> int:
        """Blocks that hold so many conversations (``pool_users`` by default) at their longest.

        One more is vLLM's null block. A request of the greatest length must fit in any case.
        """
        blocks = (self.pool_users if users is None else users) * _blocks(self.longest, self.block_size)
        return max(blocks, _blocks(self.max_model_len, self.block_size)) + 1

    @property
    def whole_prompt_block_size(self) -> int:
        """The block size that suits a cache keyed by whole prompts, cut to full blocks: the smallest
        multiple of the usual one for which all turns of a conversation have the same cut."""
        block_size = self.block_size
        while (self.memory_tokens + self.query_tokens) // block_size != self.longest // block_size:
            block_size *= 2
            if block_size > self.memory_tokens:
                return self.block_size  # no block size helps: the memory is too short
        return block_size


@dataclass(frozen=True)
class Conversation:
    """One user's part. ``document`` is his memory; the answers in between come from the server."""

    user: str
    session: str
    document: str
    queries: tuple[str, ...]


@dataclass(frozen=True)
class Script:
    shape: Shape
    conversations: tuple[Conversation, ...]
    rehearsal: Conversation

    def turns(self) -> Iterator[tuple[int, Conversation]]:
        """(turn, conversation) in the order in which they are played; turns count from 0."""
        for turn in range(self.shape.turns):
            for conversation in self.conversations:
                yield turn, conversation


def write(http: httpx.Client, model: str, shape: Shape, seed: int) -> Script:
    """Makes texts of exact token lengths, counted by a server of the model.

    Raises:
        CannotFit: a length has no room for template and text.
    """

    def count_document(document: str) -> int:
        messages = assemble([{"role": "user", "content": ""}], [document])[:1]
        return count_tokens(http, model, messages, add_generation_prompt=False)

    system_tokens = count_document("tea")

    def count_query(query: str) -> int:
        messages = assemble([{"role": "user", "content": query}], ["tea"])
        return count_tokens(http, model, messages, add_generation_prompt=True) - system_tokens

    def conversation(name: str, turns: int) -> Conversation:
        key = f"multiuser-{seed}-{name}"
        queries = [texts.query(f"{key}-{turn}", shape.query_tokens, count_query) for turn in range(turns)]
        document = texts.document(key, shape.memory_tokens, count_document)
        return Conversation(name, f"session-of-{name}", document, tuple(queries))

    return Script(
        shape,
        tuple(conversation(f"user-{number}", shape.turns) for number in range(shape.users)),
        conversation("rehearsal", 1),
    )


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
