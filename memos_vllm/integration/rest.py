"""What our REST routes share: bodies, who asks, and errors as the OpenAI API writes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from memos_vllm.errors import MemosError, RequestError, StoreError
from memos_vllm.integration import identity
from memos_vllm.integration.state import MemosState
from memos_vllm.types import Principal

Handler = Callable[..., Awaitable[Any]]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    user: str | None = None
    """Which of an application's users; refused where the API key stands for one user."""


def error_response(error: MemosError) -> JSONResponse:
    status = error.status if isinstance(error, (RequestError, StoreError)) else 500
    return JSONResponse(
        {"error": {"message": str(error), "type": HTTPStatus(status).phrase, "param": None, "code": status}},
        status_code=status,
    )


def answers_errors(handler: Handler) -> Handler:
    """Our errors become responses; anything else is vLLM's to handle."""

    @wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Response:
        try:
            return JSONResponse(await handler(*args, **kwargs))
        except MemosError as error:
            return error_response(error)

    return wrapper


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


def principal(raw_request: Request, state: MemosState, user: str | None) -> Principal:
    return identity.resolve(raw_request.headers, state.config.identity, user).principal
