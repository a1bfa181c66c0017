"""How long a turn's prompt and answer were, which says something of when the next turn comes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
"""Of vLLM's usage. In what the model said it does not match: there the quotation marks are escaped."""

_CHUNK = "data: {"


@dataclass(slots=True)
class Lengths:
    """In tokens, as far as they were seen; None where not. Prediction takes no more of them than their magnitude."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def read(self, body: bytes) -> None:
        """From the usage in a response, or in a chunk of one; without it nothing changes."""
        if (found := _COMPLETION_TOKENS.search(body)) is not None:
            self.output_tokens = int(found[1])

    async def count(self, chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Hands a stream on. A chunk has one token as a rule; if the client asked for usage, that is exact."""
        num_chunks, is_exact = 0, False
        async for chunk in chunks:
            if isinstance(chunk, str) and chunk.startswith(_CHUNK):
                num_chunks += 1
                if '"completion_tokens":' in chunk:
                    self.read(chunk.encode())
                    is_exact = True
                elif not is_exact:
                    self.output_tokens = max(1, num_chunks - 1)  # the first opens the message
            yield chunk
