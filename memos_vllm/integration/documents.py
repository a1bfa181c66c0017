"""REST for documents: store, list, read, delete. They come as they are, or as a form's file."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile

from memos_vllm.errors import DocumentError, RequestError
from memos_vllm.integration.memories import forget
from memos_vllm.integration.rest import FORM_OVERHEAD_BYTES, Body, answering, answers_errors, principal, router_at
from memos_vllm.integration.state import state_of

router = router_at("/v1/memories/documents")

_FILE = "file"


class DocumentFields(Body):
    """Of the query or the form; ``tags`` may come several times."""

    name: str | None = None
    """Of a form the file's, if it is not given."""

    tags: list[str] | None = None
    pinned: bool | None = Field(default=None, strict=False)
    cube: str | None = None


_OPENAPI: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in DocumentFields.model_json_schema()["properties"].items()
    ],
    "requestBody": {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}, "required": True},
}


@router.post("", openapi_extra=_OPENAPI)
@answering(any_query=True)
async def put(raw_request: Request) -> Any:
    """A document, or its new edition; of one whose text has not changed nothing is written."""
    state = state_of(raw_request)
    is_form = raw_request.headers.get("content-type", "").startswith("multipart/form-data")
    _check_length(raw_request, state.config.memory.documents.max_bytes + is_form * FORM_OVERHEAD_BYTES)
    if is_form:
        async with raw_request.form(max_files=1, max_fields=100) as form:
            file = form.get(_FILE)
            if not isinstance(file, UploadFile):
                raise DocumentError(f"the form has no file {_FILE!r}")
            fields = _fields([(name, value) for name, value in form.multi_items() if name != _FILE])
            name, content_type, data = fields.name or file.filename, file.content_type, await file.read()
    else:
        fields = _fields(raw_request.query_params.multi_items())
        name, content_type = fields.name, raw_request.headers.get("content-type")
        data = await raw_request.body()
    if not name:
        raise DocumentError("the document has no name; add ?name=handbook.pdf")
    who = principal(raw_request, state, fields.user)
    given = {"tags": fields.tags, "pinned": fields.pinned, "cube": fields.cube}
    store = partial(state.service.documents.put, who, name, data, content_type, **given)
    stored = await asyncio.get_running_loop().run_in_executor(state.document_threads, store)
    state.metrics.stored("document", stored.added + stored.superseded)
    return stored.as_json()


@router.get("")
@answers_errors
async def list_documents(raw_request: Request, user: str | None = None) -> Any:
    state = state_of(raw_request)
    found = await asyncio.to_thread(state.service.documents.list, principal(raw_request, state, user))
    return {"object": "list", "data": [document.as_json() for document in found]}


@router.get("/{name:path}")
@answers_errors
async def get(raw_request: Request, name: str, user: str | None = None) -> Any:
    """The document and its pieces in their order."""
    state = state_of(raw_request)
    document, pieces = await asyncio.to_thread(state.service.documents.get, principal(raw_request, state, user), name)
    return {**document.as_json(), "data": [record.as_json() for record in pieces]}


@router.delete("/{name:path}")
@answers_errors
async def delete(raw_request: Request, name: str, user: str | None = None) -> Any:
    """Removes every piece that the document has or had, and the KV of all; the receipt says what was where."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    return await forget(state, who, state.service.documents.delete, who, name)


def _check_length(raw_request: Request, max_bytes: int) -> None:
    length = raw_request.headers.get("content-length", "")
    if not length.isdecimal():
        raise DocumentError("a document must say its Content-Length", status=411)
    if int(length) > max_bytes:
        raise DocumentError(
            f"the request has {length} bytes, memory.documents.max_bytes allows a document of {max_bytes}", status=413
        )


def _fields(items: list[tuple[str, Any]]) -> DocumentFields:
    values: dict[str, Any] = {name: value for name, value in items if name != "tags"}
    if tags := [value for name, value in items if name == "tags"]:
        values["tags"] = tags
    try:
        return DocumentFields.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        fields = ", ".join(DocumentFields.model_fields)
        raise RequestError(f"'{where}': {problem['msg']}; a document has the fields {fields}") from error
