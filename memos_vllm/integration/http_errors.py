"""Errors as the OpenAI API writes them."""

from __future__ import annotations

from http import HTTPStatus

from fastapi.responses import JSONResponse

from memos_vllm.errors import MemosError, RequestError, StoreError


def error_response(error: MemosError) -> JSONResponse:
    status = error.status if isinstance(error, (RequestError, StoreError)) else 500
    return JSONResponse(
        {"error": {"message": str(error), "type": HTTPStatus(status).phrase, "param": None, "code": status}},
        status_code=status,
    )
