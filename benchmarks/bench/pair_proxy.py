"""What vLLM's prefill/decode pair needs in front: `python pair_proxy.py PORT PREFILL_URL DECODE_URL`.

vLLM documents the protocol as `kv_transfer_params`: the prefill server is asked for one token and told that decoding is
remote; what it answers goes, unread, to the decode server with the request itself.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

_UNKNOWN = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
_REMOTE_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    **dict.fromkeys(_UNKNOWN),
}


def make_app(prefill: str, decode: str) -> FastAPI:
    """One route for both kinds of completions."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=900, limits=limits) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response()

    @app.post("/v1/{kind:path}")
    async def generate(kind: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        client: httpx.AsyncClient = request.app.state.client
        body, headers = await request.json(), {"X-Request-Id": uuid4().hex}
        first = {k: v for k, v in body.items() if k not in {"stream_options", "max_completion_tokens"}}
        first |= {"stream": False, "max_tokens": 1, "kv_transfer_params": _REMOTE_DECODE}
        prefilled = await client.post(f"{prefill}/v1/{kind}", json=first, headers=headers)
        prefilled.raise_for_status()
        body["kv_transfer_params"] = prefilled.json()["kv_transfer_params"]
        asked = client.build_request("POST", f"{decode}/v1/{kind}", json=body, headers=headers)
        answer = await client.send(asked, stream=True)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, media_type=answer.headers["Content-Type"])

    return app


if __name__ == "__main__":
    port, prefill_url, decode_url = sys.argv[1:]
    uvicorn.run(make_app(prefill_url, decode_url), host="127.0.0.1", port=int(port), log_level="warning")
