"""`/health`, `/ready`, `/version` and the metrics pages: what probes and scrapers read."""

from __future__ import annotations

import asyncio
import gzip

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from splitserve.errors import Unavailable
from splitserve.router.openai.api import api_of
from splitserve.telemetry.build import installed_version

_LEAST_GZIP = 1024  # bytes


async def health(_: Request) -> Response:
    """This process is alive."""
    return JSONResponse({"status": "ok"})


async def ready(http: Request) -> Response:
    """A generation went through and a decode worker lives; else 503 and the reason."""
    why_not = api_of(http).parts.why_not_ready()
    if why_not:
        raise Unavailable(f"not ready: {why_not}", retry_after_s=1)
    return JSONResponse({"status": "ready"})


async def get_version(_: Request) -> Response:
    """The version of splitserve."""
    return JSONResponse({"version": installed_version()})


async def metrics(http: Request) -> Response:
    """A page of Prometheus metrics, in the format that the Accept header asks for."""
    page = api_of(http).parts.metrics_pages[http.url.path]
    body, content_type = await page(http.headers.get("accept", ""))
    headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
    if "gzip" in http.headers.get("accept-encoding", "") and len(body) >= _LEAST_GZIP:
        body, headers["content-encoding"] = await asyncio.to_thread(gzip.compress, body, 1), "gzip"
    return Response(body, headers=headers)
