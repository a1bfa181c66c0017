"""What is known of a folder's files since they were last read, kept over restarts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from memos_vllm.memory.sources.scan import Found

logger = logging.getLogger(__name__)

UNSETTLED_NS = 2 * 10**9
"""A file that changed so shortly before it was read may change again within the same tick of its clock, so it is
read once more. Two seconds is the tick of FAT, the coarsest that is common."""


@dataclass(frozen=True, slots=True)
class FileState:
    mtime_ns: int
    size_bytes: int
    digest: str
    is_settled: bool
    problem: str | None = None
    """Why it is not in the index."""

    def is_of(self, found: Found) -> bool:
        """Whether the file is surely as it was."""
        return self.is_settled and (self.mtime_ns, self.size_bytes) == (found.mtime_ns, found.size_bytes)


def load(path: Path, indexed: Collection[str], edition: str) -> dict[str, FileState]:
    """Without those that should be in the index and are not.

    Empty where nothing can be read, or files were cut otherwise than in this ``edition``: all are then read again.
    """
    try:
        kept = json.loads(path.read_text())
        if kept["edition"] != edition:
            return {}
        states = {name: FileState(**values) for name, values in kept["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        logger.warning("%s cannot be read, so all files are: %s", path, error)
        return {}
    return {name: state for name, state in states.items() if state.problem is not None or name in indexed}


def save(path: Path, states: dict[str, FileState], edition: str) -> None:
    temporary = path.with_suffix(".tmp")
    files = {name: asdict(state) for name, state in states.items()}
    temporary.write_text(json.dumps({"edition": edition, "files": files}))
    os.replace(temporary, path)
