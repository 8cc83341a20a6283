"""The least that streaming costs with FastAPI: `python bare_stream.py PORT` answers GET / with 100 frames."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

FRAMES = 100


async def frames() -> AsyncGenerator[str]:
    for _ in range(FRAMES):
        choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
        chunk = {"id": "chatcmpl-0", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


def answer() -> StreamingResponse:
    return StreamingResponse(frames(), media_type="text/event-stream")


if __name__ == "__main__":
    app = FastAPI()
    app.add_api_route("/", answer)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
