"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`, for every status."""

from __future__ import annotations

import math

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from splitserve.errors import InvalidRequest, MethodNotAllowed, NotFound, SplitserveError, row_of
from splitserve.router.refusals import GENERATION_PATHS

_RETRY = frozenset({429, 503})


class ClientGone(Exception):
    """The client left before its answer was whole; nobody reads what we send."""


def error_object(error: SplitserveError) -> dict[str, object]:
    row = row_of(error)
    return {"error": {"message": error.message, "type": row.openai_type, "param": error.param, "code": row.code}}


def error_response(error: SplitserveError) -> Response:
    """Status and body by the error table; 429 and 503 say when to come back, in whole seconds."""
    status = row_of(error).http_status
    headers: dict[str, str] = {}
    if status in _RETRY:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(orjson.dumps(error_object(error)), status, headers, media_type="application/json")


async def on_error(request: Request, error: Exception) -> Response:
    """Exception handler for SplitserveError. The observer hears of a generation request that did not get far enough to
    report itself."""
    ours = error if isinstance(error, SplitserveError) else SplitserveError(str(error))
    if request.url.path in GENERATION_PATHS and not getattr(request.state, "reported", False):
        request.app.state.api.parts.observer.refused(ours)
    return error_response(ours)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler for what Starlette itself raises: no such route, no such method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    where = f"{request.method} {request.url.path}"
    ours: SplitserveError
    if status == 404:
        ours = NotFound(f"there is no {where}; /openapi.json lists the routes")
    elif status == 405:
        allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
        ours = MethodNotAllowed(f"{where} is not allowed; this route takes {allowed or 'another method'}")
        response = error_response(ours)
        response.headers["allow"] = allowed
        return response
    else:
        ours = InvalidRequest(str(error)) if 400 <= status < 500 else SplitserveError(str(error))
    return error_response(ours)


async def on_client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)
