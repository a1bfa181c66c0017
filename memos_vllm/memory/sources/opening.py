"""The sources that the configuration names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from memos_vllm.config import MemosConfig
from memos_vllm.core.lifecycle import Aging
from memos_vllm.memory.embedders import Embedder
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.sources.contract import Source
from memos_vllm.memory.sources.folder import FolderSource
from memos_vllm.memory.sources.gathering import Sources
from memos_vllm.memory.sources.refreshing import Refresher
from memos_vllm.memory.sources.web import WebSource
from memos_vllm.memory.store import MemoryStore

NEVER = Aging(archive_after_s=0, remove_after_s=0)


def open_sources(
    config: MemosConfig, path: Path, count_tokens: Callable[[str], int], embedder: Embedder | None
) -> Sources:
    """Opens folders and web search, and begins to look through the folders.

    Args:
        path: the directory of the folders' store; made only if there are folders.

    Raises:
        DataDirError, ConfigError: see ``MemoryStore`` and ``WebSource``.
    """
    wanted = config.sources
    sources: list[Source] = []
    if wanted.folders:
        store = MemoryStore(path, config.memory.max_map_bytes, NEVER)
        without_limits = config.memory.model_copy(update={"max_user_memories": None, "max_user_bytes": None})
        service = MemoryService(store, without_limits, count_tokens, embedder=embedder, keeps_editions=False)
        folders = [
            FolderSource(folder, wanted.deadline_s, service, path / f"{folder.name}.json", config.memory.documents)
            for folder in wanted.folders
        ]
        Refresher(folders, path / "refreshing.lock").start()
        sources += folders
    if wanted.web is not None:
        sources.append(WebSource(wanted.web))
    return Sources(sources, wanted.top_k)
