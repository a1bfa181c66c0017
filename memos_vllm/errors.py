"""Every error that Memos raises for bad input or a failing environment.

    MemosError
    +-- ConfigError            a value in the configuration; stops the start
    +-- DataDirError           the data directory cannot be used (permission, space, another server)
    |   `-- DataDirInUse       another server holds it
    +-- RequestError           a request is wrong; carries the HTTP status
    |   +-- Unauthorized       401, no identity
    |   +-- Forbidden          403, an identity without the right
    |   +-- NotFound           404, no such memory or adapter for this user
    |   +-- Conflict           409, the memory's state does not allow it
    |   |   `-- LimitReached   the user would have more than he may
    |   +-- TooLarge           413, a body of more bytes than are taken
    |   +-- DocumentError      a document that cannot be taken; 400, 411, 413 or 415
    |   +-- MissingPackage     501, text of a language whose package is not installed
    |   +-- AdapterError       a LoRA adapter that is not taken; 400, 409, 413 or 507
    |   `-- AdapterUnavailable 503, an adapter that is known but cannot be loaded now
    +-- StoreError             plaintext store: a write that was not acknowledged
    |   +-- StoreFull          no room: the disk or the map is full; HTTP 507
    |   +-- StoreUnavailable   the database cannot be reached now; HTTP 503
    |   `-- StoreUncertain     it may have been stored: the database could not be asked
    +-- SourceError            an outside source gave no answer; the chat goes on without
    +-- EmbedderError          no embedding: the embedder is away or failed; search goes on without
    |   `-- EmbedderRefused    it does not take one of these texts; others it may
    `-- KVFileError            a KV file that must not be used; always a miss, never a failed request
        +-- KVFileMismatch     written by another model, dtype, layout, ...
        `-- KVFileCorrupt      truncated or malformed
            `-- KVChecksumMismatch   whole, but with other bytes than were written

A message says what to do about it. Our own invariants are ``assert``, not errors.
"""

from __future__ import annotations


class MemosError(Exception):
    """Base of all errors that Memos raises on purpose."""


class ConfigError(MemosError):
    """A configuration that cannot be used."""


class DataDirError(MemosError):
    """The data directory cannot be used."""


class DataDirInUse(DataDirError):
    """Another server holds the data directory."""


class RequestError(MemosError):
    """A request that cannot be served as it stands."""

    status = 400


class Unauthorized(RequestError):
    status = 401


class Forbidden(RequestError):
    status = 403


class NotFound(RequestError):
    status = 404


class Conflict(RequestError):
    status = 409


class LimitReached(Conflict):
    """The user would have more than he may. 409 as any state that stands against a write until it is changed: the
    request itself is not too large (413), and the server has room (507, which is the operator's affair)."""


class TooLarge(RequestError):
    """A body of more bytes than are taken."""

    status = 413


class DocumentError(RequestError):
    """A document that cannot be taken: its format, its size or what is in it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class MissingPackage(RequestError):
    """Text of a language whose package, a declared dependency, is not installed."""

    status = 501

    def __init__(self, what: str, packages: str) -> None:
        super().__init__(f"{what} needs {packages} where the server runs: pip install {packages}")


class AdapterError(RequestError):
    """A LoRA adapter that is not taken, or not as it is asked for."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class AdapterUnavailable(RequestError):
    """An adapter that is known but cannot be loaded now."""

    status = 503


class StoreError(MemosError):
    """The plaintext store did not take a write; nothing of it is stored."""

    status = 500


class StoreFull(StoreError):
    status = 507


class StoreUnavailable(StoreError):
    """The database cannot be reached now."""

    status = 503


class SourceError(MemosError):
    """An outside source could not be searched."""


class StoreUncertain(StoreError):
    """The connection to the database broke within a commit, and what became of it could not be asked."""


class EmbedderError(MemosError):
    """A text could not be embedded."""


class EmbedderRefused(EmbedderError):
    """The embedder does not take one of these texts, whenever it is asked."""


class KVFileError(MemosError):
    """A KV file that must not be used."""


class KVFileMismatch(KVFileError):
    """The file holds KV of another model, dtype, layout or parallel shape."""


class KVFileCorrupt(KVFileError):
    """The file is truncated or malformed."""


class KVChecksumMismatch(KVFileCorrupt):
    """The file is whole, but a block's bytes are not those that were written."""
