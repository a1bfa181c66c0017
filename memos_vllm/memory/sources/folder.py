"""A local folder as a source: its files are cut and searched as documents are, in a store of its own."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memos_vllm.config import DocumentsConfig, FolderConfig
from memos_vllm.errors import MemosError, NotFound, RequestError, SourceError
from memos_vllm.memory.documents import pieces
from memos_vllm.memory.results import Hit, Passage
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.sources import contract, file_states, scan
from memos_vllm.memory.sources.file_states import FileState
from memos_vllm.memory.sources.scan import Found
from memos_vllm.types import Principal

logger = logging.getLogger(__name__)


class FolderSource:
    """
    Args:
        service: over the sources' store; it holds nobody's memories.
        state_path: where it is kept what the files were when they were read.
        documents: how large a file may be, and how it is cut.
        time_ns: the wall clock, as files' times are given.
    """

    def __init__(
        self,
        config: FolderConfig,
        deadline_s: float,
        service: MemoryService,
        state_path: Path,
        documents: DocumentsConfig,
        time_ns: Callable[[], int] = time.time_ns,
    ):
        self.name = config.name
        self.deadline_s = deadline_s
        self.refresh_s = config.refresh_s
        self._config = config
        self._service = service
        self._owner = Principal("folder", config.name)
        self._state_path = state_path
        self._max_bytes = documents.max_bytes
        self._edition = f"{pieces.VERSION} {documents.piece_words}"
        self._time_ns = time_ns
        self._states: dict[str, FileState] | None = None
        self._problem: str | None = None

    def serves(self, who: Principal) -> bool:
        return contract.is_for(self._config.users, who)

    def search(self, query: str, top_k: int) -> Sequence[Passage]:
        try:
            return [self._passage(hit) for hit in self._service.search(self._owner, query, top_k=top_k)]
        except MemosError as error:
            raise SourceError(f"the folder {self._config.path} cannot be searched: {error}") from error

    def status(self) -> dict[str, Any]:
        states = self._states or {}
        problems = {name: state.problem for name, state in list(states.items()) if state.problem is not None}
        return {
            "name": self.name,
            "kind": "folder",
            "files": len(states) - len(problems) if self._states is not None else None,
            "left_out": len(problems),
            "problem": self._problem,
            "problems": dict(sorted(problems.items())[:100]),
        }

    def load(self) -> None:
        """Makes the index follow the store, so that no question has to wait for that."""
        self._service.prepare(self._owner)

    def refresh(self) -> None:
        """Takes in what has changed in the folder. One process does this at a time.

        Files whose size and time are as they were are not opened. A folder that cannot be read keeps what is
        known of it.
        """
        unknown: set[str] = set()
        if self._states is None:
            indexed = set(self._service.documents.names(self._owner))
            self._states = file_states.load(self._state_path, indexed, self._edition)
            unknown = indexed - self._states.keys()
        before = dict(self._states)
        try:
            found = self._files()
        except OSError as error:
            self._say(f"cannot be read: {error.strerror or error}")
            return
        for name in {*self._states, *unknown} - found.keys():
            self._forget(name)
            self._states.pop(name, None)
        for name, file in found.items():
            known = self._states.get(name)
            if known is None or not known.is_of(file):
                self._take(file, known)
        if self._states != before:
            self._keep_states()

    def _files(self) -> dict[str, Found]:
        found: dict[str, Found] = {}
        known: set[Path] = set()
        problem = None
        for file in scan.files(self._config.path):
            if file.path in known:  # by another name, of a link
                continue
            if len(found) == self._config.max_files:
                problem = f"has more than {self._config.max_files} files; the others are left out (max_files)"
                break
            known.add(file.path)
            found[file.name] = file
        self._say(problem)
        return found

    def _take(self, file: Found, known: FileState | None) -> None:
        """Reads one file; what it said before is gone if it cannot be read now."""
        assert self._states is not None
        is_settled = self._time_ns() - file.mtime_ns > file_states.UNSETTLED_NS
        digest, problem = "", None
        try:
            data = scan.read(self._config.path, file, self._max_bytes)
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            if known is None or known.digest != digest:
                self._service.documents.put(self._owner, file.name, data)
            elif known.problem is not None:
                problem = known.problem
        except (RequestError, OSError) as error:
            problem = str(error)
            logger.warning("source %s: %s is left out: %s", self.name, file.name, problem)
            self._forget(file.name)
        except MemosError as error:  # the store: tried again at the next refresh
            logger.error("source %s: %s could not be stored: %s", self.name, file.name, error)
            self._states.pop(file.name, None)
            return
        self._states[file.name] = FileState(file.mtime_ns, file.size_bytes, digest, is_settled, problem)

    def _forget(self, name: str) -> None:
        with contextlib.suppress(NotFound):  # it never was in the index
            self._service.documents.delete(self._owner, name)

    def _keep_states(self) -> None:
        assert self._states is not None
        try:
            file_states.save(self._state_path, self._states, self._edition)
        except OSError as error:  # they are read again after a restart
            logger.warning("source %s: %s cannot be written: %s", self.name, self._state_path, error)

    def _say(self, problem: str | None) -> None:
        if problem is not None and problem != self._problem:
            logger.warning("source %s: %s %s", self.name, self._config.path, problem)
        self._problem = problem

    def _passage(self, hit: Hit) -> Passage:
        place = hit.record.origin["document"]
        return Passage(
            source=self.name,
            text=hit.record.text,
            cited=place["name"],
            section=tuple(place["section"]),
            page=place.get("page"),
            offset=place["offset"],
            score=hit.score,
            why=hit.why,
        )
