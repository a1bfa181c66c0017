"""REST: all memories of a user as lines of JSON, out of a server and into one."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import closing
from typing import Any, BinaryIO, cast

from fastapi import Request
from fastapi.responses import StreamingResponse

from memos_vllm.config import MemosConfig
from memos_vllm.errors import StoreFull, TooLarge
from memos_vllm.integration.rest import answers_errors, principal, router_at
from memos_vllm.integration.state import state_of
from memos_vllm.memory.portability import Imported

router = router_at("/v1/memories")

CONTENT_TYPE = "application/jsonl"
PIECE_BYTES = 2**16
IN_MEMORY_BYTES = 2**22
"""What is larger waits in ``data_dir``, in a file without a name, for its reader or for the rest of it."""

_OPENAPI: dict[str, Any] = {
    "requestBody": {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}, "required": True},
}


@router.get("/export")
@answers_errors
async def export(raw_request: Request, user: str | None = None) -> Any:
    """A header and a line for each memory, earlier version and link, as of one moment."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    await state.wait_for_writes(who)

    def spool() -> BinaryIO:
        file = _spool(state.config)
        try:
            state.service.portability.export(who, file)
        except BaseException as error:
            file.close()
            if isinstance(error, OSError):
                raise _no_room(state.config, error) from error
            raise
        file.seek(0)
        return file

    file = await asyncio.get_running_loop().run_in_executor(state.document_threads, spool)
    headers = {"content-disposition": 'attachment; filename="memories.jsonl"'}
    return StreamingResponse(_pieces(file), media_type=CONTENT_TYPE, headers=headers)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with closing(file):
        while piece := file.read(PIECE_BYTES):
            yield piece


@router.post("/import", openapi_extra=_OPENAPI)
@answers_errors
async def take(raw_request: Request, user: str | None = None) -> Any:
    """Stores what an export has, all of it or nothing; what is here already stays as it is."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    file = _spool(state.config)
    try:
        await _receive(raw_request, state.config, file)
        await state.wait_for_writes(who)
    except BaseException:
        file.close()
        raise

    def store() -> Imported:  # closes the file itself: it goes on if the request is cancelled
        with closing(file):
            return state.service.portability.take(who, file)

    done = await asyncio.get_running_loop().run_in_executor(state.document_threads, store)
    state.metrics.stored("import", done.memories)
    return done.as_json()


async def _receive(raw_request: Request, config: MemosConfig, file: BinaryIO) -> None:
    limit = config.memory.max_import_bytes
    length = raw_request.headers.get("content-length", "")
    size_bytes = int(length) if length.isdecimal() and len(length) < 20 else 0
    _check_size(size_bytes, limit)
    size_bytes = 0
    async for piece in raw_request.stream():
        size_bytes += len(piece)
        _check_size(size_bytes, limit)
        try:
            await asyncio.to_thread(file.write, piece)
        except OSError as error:
            raise _no_room(config, error) from error


def _check_size(size_bytes: int, limit: int) -> None:
    if size_bytes > limit:
        raise TooLarge(f"the import has more than {limit} bytes; the operator may raise memory.max_import_bytes")


def _spool(config: MemosConfig) -> BinaryIO:
    return cast(BinaryIO, tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, dir=config.data_dir))


def _no_room(config: MemosConfig, error: OSError) -> StoreFull:
    return StoreFull(f"{config.data_dir} has no room for the file ({error.strerror}); free some space, then ask again")
