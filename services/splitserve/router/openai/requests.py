"""`GET /v1/requests/{id}`: where a request is or was, never what it says."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from splitserve.errors import NotFound
from splitserve.router.openai.api import api_of


async def get_request(http: Request) -> Response:
    """State, workers, attempts and stage durations, from the store: any router can tell."""
    rid = str(http.path_params["id"])
    record = await api_of(http).parts.read_request(rid)
    if record is None:
        raise NotFound(f"there is no request {rid[:80]!r}; finished ones are kept for ten minutes", param="id")
    return JSONResponse({"id": rid, "object": "request", **record})
