"""Under which number vLLM knows a content: a table of all numbers ever given, by number."""

from __future__ import annotations

import lmdb

from memos_vllm.adapters import records

TABLE = b"ids"


class Numbers:
    def __init__(self, env: lmdb.Environment) -> None:
        self._table = env.open_db(TABLE)

    def give(self, txn: lmdb.Transaction, digest: bytes) -> int:
        """The content's number for vLLM. A number is never given to a second content, so that a process
        that still has the first one loaded cannot serve it as the second."""
        number = records.first_id(digest)
        while (holder := txn.get(number.to_bytes(4, "big"), db=self._table)) not in (None, digest):
            number = records.next_id(number)
        if holder is None:
            txn.put(number.to_bytes(4, "big"), digest, db=self._table)
        return number
