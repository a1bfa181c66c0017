"""REST for adapters: add, list, read, choose, delete. A user sees his own and what is shared with him.

An adapter comes as an upload of its two files, or as a path below ``adapters.import_dir``, which the
operator sets. It is never listed in ``/v1/models``.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import Request
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from memos_vllm.adapters import peft_config, peft_folder
from memos_vllm.adapters.records import Scope
from memos_vllm.compat.error_response import ErrorResponse
from memos_vllm.errors import AdapterError, Forbidden
from memos_vllm.integration.adapter_gate import Choice
from memos_vllm.integration.rest import (
    FORM_OVERHEAD_BYTES,
    Body,
    answers_errors,
    parse_body,
    principal,
    router_at,
    takes,
)
from memos_vllm.integration.state import MemosState, state_of

router = router_at("/v1/adapters")

_FILES = {"config": peft_folder.CONFIG_FILE, "weights": peft_folder.WEIGHTS_FILE}
PROBE_TOKENS = 64


class AddBody(Body):
    name: str
    path: str
    """Of the folder, below ``adapters.import_dir``."""

    scope: Scope = Field(default=Scope.USER, strict=False)


class SelectBody(Body):
    current: int = Field(ge=1)
    """The version that the bare name means from now on."""


class DefaultBody(Body):
    adapter: str | None
    """Name, or name@version, for requests that name none; null: the base model."""


@router.post("", openapi_extra=takes(AddBody))
@answers_errors
async def add(raw_request: Request) -> Any:
    """Keeps a PEFT LoRA folder under a name; a name that exists gets a new version."""
    state = state_of(raw_request)
    if raw_request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await _add_upload(raw_request, state)
    body: AddBody = await parse_body(raw_request, AddBody)
    who = principal(raw_request, state, body.user)
    folder = _import_folder(body.path, state.config.adapters.import_dir)
    origin = {"source": "path", "path": body.path}
    adapter = await asyncio.to_thread(state.adapters.registry.register, who, body.name, folder, body.scope, origin)
    return adapter.as_json(who)


async def _add_upload(raw_request: Request, state: MemosState) -> Any:
    limit = state.config.adapters.max_bytes + peft_config.MAX_CONFIG_BYTES + FORM_OVERHEAD_BYTES
    length = raw_request.headers.get("content-length", "")
    if not length.isdecimal():
        raise AdapterError("an upload must say its Content-Length", status=411)
    if int(length) > limit:
        raise AdapterError(f"the upload has {length} bytes, adapters.max_bytes allows {limit}", status=413)
    async with raw_request.form(max_files=len(_FILES), max_fields=3) as form:
        fields = _fields(form)
        who = principal(raw_request, state, fields.user)
        with tempfile.TemporaryDirectory(prefix="memos-adapter-") as temporary:
            folder = Path(temporary)
            for field, name in _FILES.items():
                await asyncio.to_thread(_save, form, field, folder / name)
            origin = {"source": "upload"}
            adapter = await asyncio.to_thread(
                state.adapters.registry.register, who, fields.name, folder, fields.scope, origin
            )
    return adapter.as_json(who)


class _UploadFields(Body):
    name: str
    scope: Scope = Field(default=Scope.USER, strict=False)


def _fields(form: FormData) -> _UploadFields:
    try:
        return _UploadFields.model_validate({key: value for key, value in form.items() if key not in _FILES})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise AdapterError(
            f"'{where}': {problem['msg']}; an upload has the fields name, scope and user and the files config "
            f"({_FILES['config']}) and weights ({_FILES['weights']})"
        ) from error


def _save(form: FormData, field: str, target: Path) -> None:
    upload = form.get(field)
    if not isinstance(upload, UploadFile):
        raise AdapterError(f"the upload has no file {field!r}; it is to be {target.name}")
    given = Path(upload.filename or target.name).suffix
    if given != target.suffix:
        raise AdapterError(f"the file {field!r} is a {given or 'file without suffix'}; only {target.name} is taken")
    with open(target, "xb") as file:
        shutil.copyfileobj(upload.file, file)


def _import_folder(path: str, import_dir: Path | None) -> Path:
    """The folder that a client's path means; nothing outside ``import_dir``, whatever links there are."""
    if import_dir is None:
        raise Forbidden("this server takes adapters as uploads only; the operator may set adapters.import_dir")
    if "\0" in path:
        raise AdapterError("'path' is no path")
    root = import_dir.resolve()
    folder = (root / path).resolve()
    if folder == root or not folder.is_relative_to(root):
        raise Forbidden("'path' must stay below the folder that the operator set in adapters.import_dir")
    return folder


@router.get("")
@answers_errors
async def list_adapters(raw_request: Request, user: str | None = None) -> Any:
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    found = await asyncio.to_thread(state.adapters.registry.list, who)
    default = await asyncio.to_thread(state.adapters.registry.profile, who)
    return {"object": "list", "data": [adapter.as_json(who) for adapter in found], "default": default}


@router.get("/default")
@answers_errors
async def get_default(raw_request: Request, user: str | None = None) -> Any:
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    return {"adapter": await asyncio.to_thread(state.adapters.registry.profile, who)}


@router.put("/default", openapi_extra=takes(DefaultBody))
@answers_errors
async def set_default(raw_request: Request) -> Any:
    """What the user's requests run with when they name no adapter."""
    state = state_of(raw_request)
    body: DefaultBody = await parse_body(raw_request, DefaultBody)
    who = principal(raw_request, state, body.user)
    await asyncio.to_thread(state.adapters.registry.set_profile, who, body.adapter)
    return {"adapter": body.adapter}


@router.get("/{reference}")
@answers_errors
async def get(raw_request: Request, reference: str, user: str | None = None) -> Any:
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    adapter, _ = await asyncio.to_thread(state.adapters.registry.find, who, reference)
    return adapter.as_json(who)


@router.patch("/{name}", openapi_extra=takes(SelectBody))
@answers_errors
async def select(raw_request: Request, name: str) -> Any:
    """Makes an earlier version current again, or a later one: the undo of an addition."""
    state = state_of(raw_request)
    body: SelectBody = await parse_body(raw_request, SelectBody)
    who = principal(raw_request, state, body.user)
    adapter = await asyncio.to_thread(state.adapters.registry.select, who, name, body.current)
    return adapter.as_json(who)


@router.delete("/{reference}")
@answers_errors
async def delete(raw_request: Request, reference: str, user: str | None = None) -> Any:
    """Removes a name, or one version of it, and everything computed with it; the receipt says what was where."""
    state = state_of(raw_request)
    who = principal(raw_request, state, user)
    removed = await asyncio.to_thread(state.adapters.registry.delete, who, reference)
    return {"deleted": True, **removed.as_json(), **await state.adapters.remove(removed)}


@router.post("/{reference}/probe", openapi_extra=takes(Body))
@answers_errors
async def probe(raw_request: Request, reference: str) -> Any:
    """Parametric to plaintext: what a distilled adapter was made from, and what it says when it is asked,
    without any memory in the prompt."""
    state = state_of(raw_request)
    body: Body = await parse_body(raw_request, Body)
    who = principal(raw_request, state, body.user)
    adapter, version = await asyncio.to_thread(state.adapters.registry.find, who, reference)
    source = version.origin.get("distilled")
    if adapter.owner != who or source is None:
        raise AdapterError(
            "only the owner of a distilled adapter can probe it; others have no record of what they hold"
        )
    serving = raw_request.app.state.openai_serving_chat
    choice = await state.adapters.use(who, f"{adapter.name}@{version.version}", serving, None)
    assert choice is not None
    try:
        answers = [
            await _answer(serving, choice, await asyncio.to_thread(state.salt, who), each["question"])
            for each in source["questions"]
        ]
    finally:
        choice.close()
    asked = [{**each, "answer": answer} for each, answer in zip(source["questions"], answers, strict=True)]
    return {"adapter": choice.header, "memories": source["memories"], "answers": asked}


async def _answer(serving: Any, choice: Choice, salt: str, question: str) -> str:
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": question}], max_tokens=PROBE_TOKENS, temperature=0, cache_salt=salt
    )
    with choice.active():
        response = await serving.create_chat_completion(request, None)
    if isinstance(response, ErrorResponse):
        raise AdapterError(f"the model did not answer {question!r}: {response.error.message}")
    return response.choices[0].message.content or ""
