"""What our REST routes share: bodies, who asks, and errors as the OpenAI API writes them."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Coroutine
from functools import wraps
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from memos_vllm.errors import Forbidden, MemosError, RequestError, StoreError
from memos_vllm.integration import identity
from memos_vllm.integration.state import MemosState
from memos_vllm.types import Principal

Handler = Callable[..., Awaitable[Any]]

FORM_OVERHEAD_BYTES = 2**16
"""Of an upload as a form, beside its files."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    user: str | None = None
    """Which of an application's users; refused where the API key stands for one user."""


def error_response(error: MemosError) -> JSONResponse:
    return _refusal(str(error), error.status if isinstance(error, (RequestError, StoreError)) else 500)


def _refusal(message: str, status: int) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": message, "type": HTTPStatus(status).phrase, "param": None, "code": status}},
        status_code=status,
    )


class Route(APIRoute):
    """What the framework refuses is answered as what we refuse: a parameter that is no number, a form that is none, a
    body whose client left.

    Else vLLM would answer it, which logs a traceback of each with ``--log-error-stack``, and uvicorn one of what is
    left: anybody could fill the log.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(raw_request: Request) -> Response:
            try:
                return await handle(raw_request)
            except RequestValidationError as error:
                return _refusal(_sentence(error), HTTPStatus.BAD_REQUEST)
            except HTTPException as error:
                return _refusal(str(error.detail), error.status_code)
            except ClientDisconnect:  # nobody reads it
                return _refusal("the client left before its body had ended", HTTPStatus.BAD_REQUEST)

        return answer


def router_at(prefix: str) -> APIRouter:
    """For our routes below a path."""
    return APIRouter(prefix=prefix, tags=["Memos"], route_class=Route)


def _sentence(error: RequestValidationError) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"][1:])
    return f"'{name}': {problem['msg']}"


def answering(*, any_query: bool = False, instead: str = "") -> Callable[[Handler], Handler]:
    """Our errors become responses; anything else is vLLM's to handle.

    A query parameter that the handler does not name is refused: where a filter is not heeded, something else would
    be listed, or deleted, than was asked for.

    Args:
        any_query: the handler reads the query, and checks it, itself.
        instead: what to do instead, for the sentence of the refusal.
    """

    def decorate(handler: Handler) -> Handler:
        known = [name for name in inspect.signature(handler).parameters if name != "raw_request"]

        @wraps(handler)
        async def wrapper(*, raw_request: Request, **values: Any) -> Response:
            try:
                if not any_query:
                    _check_query(raw_request, known, instead)
                answer = await handler(raw_request=raw_request, **values)
                return answer if isinstance(answer, Response) else JSONResponse(answer)
            except MemosError as error:
                return error_response(error)

        return wrapper

    return decorate


answers_errors = answering()


def _check_query(raw_request: Request, known: Collection[str], instead: str) -> None:
    taken = [name for name in known if name not in raw_request.path_params]
    for name in raw_request.query_params:
        if name not in taken:
            raise RequestError(
                f"{raw_request.method} {raw_request.url.path[:200]} knows no query parameter {name[:100]!r}, only "
                f"{', '.join(taken) or 'the body'}" + (f"; {instead}" if instead else "")
            )


async def refuse_body(raw_request: Request, instead: str) -> None:
    """For a deletion of much: who sends a body means less than all, or somebody else."""
    if await raw_request.body():
        raise RequestError(f"{raw_request.method} {raw_request.url.path} takes no body; {instead}")


def takes(model: type[Body]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route whose body ``parse_body`` reads, so that /docs shows its fields."""
    schema = model.model_json_schema()
    content = {"application/json": {"schema": _inlined(schema, schema.pop("$defs", {}))}}
    return {"requestBody": {"content": content, "required": True}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """References into a model's own schema lead nowhere in the schema of all routes."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if name := schema.get("$ref"):
        schema = {**definitions[name.rpartition("/")[2]], **{key: schema[key] for key in schema if key != "$ref"}}
    return {key: _inlined(value, definitions) for key, value in schema.items()}


async def parse_body(raw_request: Request, model: type[Body]) -> Any:
    """Parsed here rather than by FastAPI, for errors in one sentence."""
    raw = await raw_request.body()
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        fields = ", ".join(model.model_fields)
        prefix = f"'{where}': " if where else ""
        raise RequestError(f"{prefix}{problem['msg']}; the body is a JSON object with {fields}") from error


def operator(raw_request: Request, state: MemosState) -> identity.Operator:
    """
    Raises:
        Unauthorized: no key.
        Forbidden: not an operator's.
    """
    found = identity.operator_of(raw_request.headers, state.config.identity)
    if found is None:
        raise Forbidden("this is for operators: keys with 'operator: tenant' or 'operator: all' under identity.keys")
    return found


def principal(raw_request: Request, state: MemosState, user: str | None) -> Principal:
    return identity.resolve(raw_request.headers, state.config.identity, user).principal
