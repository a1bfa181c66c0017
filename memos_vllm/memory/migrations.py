"""Schema versions of the store, and the steps between them.

A store is brought up to date when it is opened, all steps in one transaction: it has the old schema
or the new one, never something between. A step works on raw rows, for the classes of today do not
know the rows of then. To change the schema: raise ``tables.SCHEMA_VERSION``, add the step, and a
store of the version before to ``tests/memory/test_migrations.py``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from memos_vllm.core.lifecycle import Aging
from memos_vllm.errors import DataDirError
from memos_vllm.memory import claims, links, records, recount, tables
from memos_vllm.memory.contract import Transaction
from memos_vllm.memory.transactions import UserWriter
from memos_vllm.types import Principal

logger = logging.getLogger(__name__)
Step = Callable[[Transaction, Mapping[str, Any], Aging], None]


def migrate(txn: Transaction, dbs: Mapping[str, Any], store: Path | str, aging: Aging) -> None:
    """Brings the tables up to date; ``dbs`` has all of today's, new ones still empty.

    Args:
        store: what the store is called in messages.

    Raises:
        DataDirError: a newer Memos wrote the store.
    """
    meta = dbs["meta"]
    stored = txn.get(b"schema_version", db=meta)
    schema = int(stored) if stored else tables.SCHEMA_VERSION
    if schema > tables.SCHEMA_VERSION:
        raise DataDirError(
            f"a newer Memos wrote {store} (schema {schema}, this one knows {tables.SCHEMA_VERSION}); "
            "upgrade Memos or choose another store"
        )
    for version in range(schema, tables.SCHEMA_VERSION):
        logger.info("the memory store %s goes from schema %d to %d", store, version, version + 1)
        STEPS[version](txn, dbs, aging)
    txn.put(b"schema_version", str(tables.SCHEMA_VERSION).encode(), db=meta)
    txn.put(b"next_owner", b"1", db=meta, overwrite=False)


def _to_2(txn: Transaction, dbs: Mapping[str, Any], aging: Aging) -> None:
    """Records get state, priority, sensitivity and times; corrections get links; time gets to know the records."""
    new = {"state": "generated", "priority": 0, "sensitivity": "normal", "expires_at": None, "valid_from": None}
    for table in ("versions", "records"):
        with txn.cursor(db=dbs[table]) as cursor:
            for key, raw in cursor:
                cursor.put(key, json.dumps({**new, **json.loads(raw)}, ensure_ascii=False).encode())
    users: dict[bytes, UserWriter] = {}
    for key in list(txn.cursor(db=dbs["records"]).iternext(values=False)):
        record = records.decode(txn.get(key, db=dbs["records"]))
        if key[:8] not in users:
            users[key[:8]] = UserWriter(txn, dbs, Principal(record.tenant, record.user), aging)
        user = users[key[:8]]
        user.schedule(record, user.usage(record.id))
        for claim in claims.keys_of(record.text) if record.is_current else ():  # near-duplicates have keys now
            user.put_row("current", claim, key[8:])
        if record.superseded_by is not None and record.valid_to is not None:
            if user.get(record.superseded_by) is None:  # version 1 left this behind when the newer one was deleted
                user.put(replace(record, superseded_by=None), record)
            else:
                links.connect(user, record.superseded_by, record.id, links.SUPERSEDES, record.valid_to)
        if record.supersedes is not None and user.get(record.supersedes) is None:
            user.put(replace(user.get(record.id) or record, supersedes=None), record)
    for user in users.values():
        user.finish()


def _to_3(txn: Transaction, dbs: Mapping[str, Any], aging: Aging) -> None:
    """Two new tables; they are empty at first."""


def _to_4(txn: Transaction, dbs: Mapping[str, Any], aging: Aging) -> None:
    """More sentences are claims: what was said before is found, and ended, by what is said from now on."""
    for key in list(txn.cursor(db=dbs["records"]).iternext(values=False)):
        record = records.decode(txn.get(key, db=dbs["records"]))
        claim = claims.claim_of(record.text) if record.is_current else None
        if claim is not None:
            txn.put(key[:8] + claims.subject_key(claim), key[8:], db=dbs["current"])


def _to_5(txn: Transaction, dbs: Mapping[str, Any], aging: Aging) -> None:
    """What each user has is counted from now on."""
    recount.write_all(txn, dbs)


def _to_6(txn: Transaction, dbs: Mapping[str, Any], aging: Aging) -> None:
    """What was asserted, and instructions that stand, are found by what takes them back from now on."""
    for key in list(txn.cursor(db=dbs["records"]).iternext(values=False)):
        record = records.decode(txn.get(key, db=dbs["records"]))
        for each in claims.keys_of(record.text) if record.is_current else ():
            txn.put(key[:8] + each, key[8:], db=dbs["current"])


STEPS: dict[int, Step] = {1: _to_2, 2: _to_3, 3: _to_4, 4: _to_5, 5: _to_6}
"""By the version that a step starts from."""
