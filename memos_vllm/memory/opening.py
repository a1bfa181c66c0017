"""Which store a configuration names, opened."""

from __future__ import annotations

from memos_vllm import data_dir
from memos_vllm.config import MemosConfig
from memos_vllm.core.lifecycle import Aging
from memos_vllm.errors import ConfigError
from memos_vllm.memory.abstract_store import Store
from memos_vllm.memory.store import MemoryStore


def open_store(config: MemosConfig, aging: Aging | None = None, *, create: bool = True) -> Store:
    """
    Args:
        create: False for a look that changes nothing, of a database.

    Raises:
        ConfigError: PostgreSQL's client is not installed.
        DataDirError: the store cannot be used; see ``store.MemoryStore`` and ``postgresql.PostgresStore``.
    """
    memory = config.memory
    if memory.store == "lmdb":
        return MemoryStore(data_dir.memory_dir(config.data_dir), memory.max_map_bytes, aging)
    try:
        from memos_vllm.memory.postgresql import PostgresStore
    except ImportError as error:
        raise ConfigError(
            f"'memory.store: postgresql' needs psycopg ({error}); pip install 'memos-vllm[postgresql]'"
        ) from error
    assert memory.dsn is not None
    return PostgresStore(memory.dsn.get_secret_value(), aging, pgvector=memory.pgvector, create=create)
