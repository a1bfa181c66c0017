"""What a deletion's tag leads to, without a look at everything there is: it runs in the engine's loop."""

from __future__ import annotations

from memos_vllm.store import tags


class TagIndex:
    """Names by the parts of the tag that each is filed under; what was added first comes first."""

    def __init__(self) -> None:
        self._names: dict[bytes, dict[str, None]] = {}

    def add(self, name: str, tag: bytes) -> None:
        for part in tags.parts(tag):
            self._names.setdefault(part, {})[name] = None

    def remove(self, name: str, tag: bytes) -> None:
        """It must have been added with this tag."""
        for part in tags.parts(tag):
            names = self._names[part]
            del names[name]
            if not names:
                del self._names[part]

    def find(self, part: bytes) -> list[str]:
        return list(self._names.get(part, ()))

    def __len__(self) -> int:
        return len(self._names)
