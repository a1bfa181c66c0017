"""A path that ends where the id of a memory should stand.

The server redirects ``/v1/memories/`` to ``/v1/memories``; so a deletion that has lost its id, as a client makes of
an empty variable, would become the deletion of everything.
"""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from starlette.convertors import Convertor, register_url_convertor

from memos_vllm.errors import NotFound
from memos_vllm.integration.rest import error_response, router_at

PATH = "/v1/memories"
router = router_at(PATH)


class _Slashes(Convertor[str]):
    regex = "/*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("slashes", _Slashes())


@router.api_route("/{rest:slashes}", methods=["GET", "POST", "PATCH", "DELETE"], include_in_schema=False)
async def without_id(raw_request: Request, rest: str) -> Response:
    if raw_request.method in ("GET", "POST"):  # as the server does by itself
        return RedirectResponse(raw_request.url.replace(path=PATH))
    missing = f"the id of a memory is missing behind {PATH}/"
    if raw_request.method == "DELETE":
        missing += f"; DELETE {PATH}, without the slash, removes everything that the user has"
    return error_response(NotFound(missing))
