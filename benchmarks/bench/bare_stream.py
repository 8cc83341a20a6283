"""The least that streaming costs with FastAPI: `python bare_stream.py PORT STEP_MS` answers GET / with 100 frames as fast as
they are written, GET /paced with one each STEP_MS, as a model gives them: each then finds the processor's caches cold.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

FRAMES = 100


async def frames(step_s: float = 0.0) -> AsyncGenerator[str]:
    for _ in range(FRAMES):
        if step_s:
            await asyncio.sleep(step_s)
        choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
        chunk = {"id": "chatcmpl-0", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


def made(step_s: float) -> FastAPI:
    def answer() -> StreamingResponse:
        return StreamingResponse(frames(), media_type="text/event-stream")

    def paced() -> StreamingResponse:
        return StreamingResponse(frames(step_s), media_type="text/event-stream")

    app = FastAPI()
    app.add_api_route("/", answer)
    app.add_api_route("/paced", paced)
    return app


if __name__ == "__main__":
    port, step_ms = sys.argv[1:]
    uvicorn.run(made(float(step_ms) / 1000), host="127.0.0.1", port=int(port), log_level="warning", access_log=False)
